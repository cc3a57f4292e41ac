"""Trace the image positions of tensor elements through the operations of a network.

Operations are observed as they run, also on the meta device. Convolutions and pools average centres as they
average values, views and rolls move them, and sums combine several. The result of an unknown operation has no
centre, and the operation is named in `Positions.unknown_operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from afterimage.models.encoders.positions import (
    Positions,
    broadcast_positions,
    collapse,
    compress,
    concatenate_positions,
    image_positions,
    merge_elements,
    merge_receptive_fields,
    no_positions,
    reduce_positions,
    reshape,
    select_centres,
    unknown_positions,
    view_positions,
)
from afterimage.models.encoders.window_positions import (
    Arguments,
    nth,
    slide_window,
    trace_adaptive_pool,
    trace_padding,
    trace_pool,
    trace_transposed_convolution,
    trace_upsampling,
)


class PositionTracer:
    """Positions of every tensor that depends on `images`, updated operation by operation.

    `needs_values` becomes true if elements were moved to indices that are values of a tensor: the meta device
    has no values.
    """

    SWEEP = 64
    """Number of operations after which the positions of deleted tensors are dropped."""

    def __init__(self, images: Tensor) -> None:
        self._table: dict[int, dict[tuple, Positions]] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._steps = 0
        self.needs_values = False
        self._set(images, image_positions(*images.shape[-3:]).with_shape(images.shape))

    def positions_of(self, tensor: Tensor) -> Positions | None:
        """Return the positions of a tensor's elements; None for a tensor that does not depend on the image."""
        entry = self._table.get(storage(tensor))
        if not entry:
            return None
        strides = _strides(tensor)
        if strides not in entry:
            entry[strides] = view_positions(list(entry.items()), tensor)
        return entry[strides]

    def restrided(self, tensor: Tensor) -> Positions:
        """Return the positions of a tensor whose strides were changed in place, as after a convolution."""
        (positions,) = self._table[storage(tensor)].values()
        if positions.shape != tuple(tensor.shape):
            raise NotImplementedError("as_strided_ to another shape")
        self._table[storage(tensor)].clear()
        return positions

    def trace_operation(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record the positions of the result of an operation of torch's dispatcher that has run."""
        self._steps += 1
        if self._steps % self.SWEEP == 0:
            for key in [key for key, reference in self._alive.items() if reference.expired()]:
                del self._alive[key], self._table[key]
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made: list[Positions | None] = []
        if any(storage(tensor) in self._table for tensor in sources):
            try:
                made = _trace(self, func, _bind(func, args, kwargs), results)
            except Exception:  # unexpected use of a known operation: treat it as unknown
                known = [
                    positions for tensor in sources if (positions := self.positions_of(tensor)) is not None
                ]
                made = [unknown_positions(known, out.shape, func._schema.name) for out in results]
        elif func.is_view:
            return
        made += [None] * (len(results) - len(made))  # statistics and indices have no positions
        for out, positions in zip(results, made, strict=True):
            if func._schema.is_mutable:
                self._write(out, positions)
            elif func.is_view:
                self._table[storage(out)][_strides(out)] = positions
            else:
                self._set(out, positions)

    def _set(self, tensor: Tensor, positions: Positions | None) -> None:
        key = storage(tensor)
        if positions is None:
            self._table.pop(key, None)
            self._alive.pop(key, None)
        else:
            self._table[key] = {_strides(tensor): positions}
            self._alive[key] = StorageWeakRef(tensor.untyped_storage())

    def _write(self, tensor: Tensor, positions: Positions | None) -> None:
        """Record a change in place, which also changes all tensors that share the memory."""
        entry, strides = self._table.get(storage(tensor), {}), _strides(tensor)
        if not entry or set(entry) == {strides}:
            self._set(tensor, positions)
            return
        positions = no_positions(tensor.shape) if positions is None else positions
        if entry.get(strides) is not positions:
            for other in [other for other in entry if other != strides]:
                view = tensor.as_strided(*other)
                entry[other] = view_positions([(other, entry[other]), (strides, positions)], view)
            entry[strides] = positions


def storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, shared by its views: reading a view reads the tensor."""
    return tensor.untyped_storage()._cdata


def _strides(tensor: Tensor) -> tuple:
    """Return the arguments of `as_strided` that make this view of the tensor's memory."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _bind(func: Any, args: Any, kwargs: Any) -> Arguments:
    """Return an operation's arguments by name, defaults included."""
    passed = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return {a.name: passed.get(a.name, a.default_value) for a in func._schema.arguments}


def _tensors(given: Arguments) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]


def _dims(given: Arguments, tensor: Tensor) -> list[int]:
    dims = given.get("dim")
    dims = range(tensor.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [dim % tensor.ndim for dim in dims]


def _normal_dims(given: Arguments, tensor: Tensor) -> Sequence[int]:
    return range(tensor.ndim - len(given["normalized_shape"]), tensor.ndim)


REDUCTIONS = {
    "mean", "sum", "nansum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "median", "any", "all",
    "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp",
}  # fmt: skip
"""Operations that reduce axes."""
PRODUCTS = {
    "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"), "addmv": ("mat", "vec"), "dot": ("self", "tensor"),
}  # fmt: skip
"""Matrix products, with the names of their factors."""
AXIS_MIXING: dict[str, Callable[[Arguments, Tensor], Sequence[int]]] = {
    "native_layer_norm": _normal_dims,
    "_fused_rms_norm": _normal_dims,
    "native_group_norm": lambda given, tensor: range(1, tensor.ndim),
    "native_batch_norm": lambda given, tensor: (),
    "_native_batch_norm_legit_no_training": lambda given, tensor: (),
    **dict.fromkeys(
        ("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"), _dims
    ),
}
"""Operations that leave elements in place but make each one depend on all others along some axes."""
RECURRENT = {"mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu"}
"""Recurrent networks."""
POOLS = {
    f"{kind}_pool{n}d{end}" for kind in ("max", "avg") for n in (1, 2, 3) for end in ("", "_with_indices")
}
PADS = {"constant_pad_nd"} | {f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)}
RESHAPES = {"view", "_unsafe_view", "_reshape_alias", "reshape"}
MOVES = {
    "roll", "flip", "index", "index_select", "gather", "take_along_dim", "repeat", "tril", "triu",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
}  # fmt: skip
ELEMENTWISE = {
    "hardswish", "_to_copy", "contiguous", "lift_fresh", "native_dropout", "_prelu_kernel", "clone",
}  # fmt: skip
"""Operations that are pointwise although the dispatcher does not mark them as such."""


def _trace(
    flow: PositionTracer, func: Any, given: Arguments, results: list[Tensor]
) -> list[Positions | None]:
    """Return the positions of an operation's results.

    Raises:
        NotImplementedError: the operation is unknown
    """
    name, out = func._schema.name.removeprefix("aten::"), results[0]
    name = name.removesuffix("_") if func._schema.is_mutable else name
    first = next(iter(given.values()))
    source = flow.positions_of(first) if isinstance(first, Tensor) and name != "as_strided" else None
    if name in PRODUCTS:
        return [_trace_matmul(flow, name, given, out.shape)]
    if name == "convolution":
        return [_trace_convolution(flow, given, out.shape)]
    if name in ("cat", "stack"):
        return [_trace_concatenation(flow, name, given)]
    if name in ("copy", "fill", "zero"):
        written = flow.positions_of(given["src"]) if name == "copy" else None
        return [None if written is None else broadcast_positions([written], out.shape)]
    if name == "as_strided":
        return [flow.restrided(out) if func._schema.is_mutable else flow.positions_of(out)]
    if torch.Tag.pointwise in func.tags or name in ELEMENTWISE:
        operands = [found for tensor in _tensors(given) if (found := flow.positions_of(tensor)) is not None]
        return [broadcast_positions(operands, out.shape)]
    if source is None:
        raise NotImplementedError(name)
    if name in RESHAPES:
        return [source.map(out.shape, lambda t: reshape(t, source.shape, tuple(out.shape)))]
    if name in REDUCTIONS:
        return [reduce_positions(source, _dims(given, first), keepdim=bool(given.get("keepdim")))]
    if name in AXIS_MIXING:
        return [_widen_receptive_field(source, AXIS_MIXING[name](given, first))]
    if name in RECURRENT:
        return [
            _widen_receptive_field(
                reduce_positions(source, [out.ndim - 1], keepdim=True).with_shape(out.shape), range(out.ndim)
            )
        ]
    if name in POOLS:
        return [trace_pool(source, name, given, out.shape)]
    if "adaptive" in name and "pool" in name:
        return [trace_adaptive_pool(source, out.shape, axes=int(name[name.index("pool") + 4]))]
    if name.startswith(("upsample_", "_upsample_")):
        return [trace_upsampling(source, given, out.shape)]
    if name in PADS:
        found = trace_padding(source, given.get("pad") or given["padding"])
        if name == "constant_pad_nd":
            return [found]
        (repeated,) = _trace_move(source, func, given, results)  # padding repeats pixels, but not centres
        return [replace(found, receptive_field=repeated.receptive_field)]
    if name == "im2col":
        (height, width), given["padding"] = given["padding"], [0, 0]
        return _trace_move(trace_padding(source, [width, width, height, height]), func, given, results)
    if func.is_view or name in MOVES:
        others = _tensors(given)[1:]
        flow.needs_values |= any(other.is_meta for other in others)
        if flow.needs_values or any(flow.positions_of(other) is not None for other in others):
            raise NotImplementedError("the indices that elements are moved to are unknown")
        return _trace_move(source, func, given, results)
    raise NotImplementedError(name)


def _trace_matmul(flow: PositionTracer, name: str, given: Arguments, shape: Sequence[int]) -> Positions:
    """Trace a matrix product: the centres of each factor are averaged along the summed axis."""
    keepdim, operands = len(shape) > 1, []
    for key, axis in zip(PRODUCTS[name], (-1, -2), strict=True):
        factor = flow.positions_of(given[key])
        if factor is not None:
            dim = max(len(factor.shape) + axis, 0)
            operands.append(reduce_positions(factor, [dim], keepdim=keepdim).with_shape(shape))
    added = flow.positions_of(given["self"]) if name.startswith(("add", "badd")) else None
    return broadcast_positions([*operands, *([] if added is None else [added])], shape)


def _widen_receptive_field(source: Positions, dims: Sequence[int]) -> Positions:
    """Return positions with the same centres whose elements depend on all others along `dims`."""
    return (
        replace(
            source,
            receptive_field=merge_receptive_fields(
                [*source.receptive_field, *collapse(source.receptive_field, dims)]
            ),
        )
        if dims
        else source
    )


def _trace_convolution(flow: PositionTracer, given: Arguments, shape: Sequence[int]) -> Positions:
    source, weight = flow.positions_of(given["input"]), given["weight"]
    operands = []
    if source is not None:
        groups, spatial = given["groups"], source.shape[2:]
        split = (source.shape[0], groups, source.shape[1] // groups, *spatial)
        found = source.map(split, lambda t: reshape(t, source.shape, split))
        found = reduce_positions(found, [2], keepdim=False, step=1.0)
        found = found.map(
            (shape[0], shape[1], *spatial),
            lambda t: t if t.shape[1] == 1 else t.repeat_interleave(shape[1] // groups, 1),
        )
        for axis in range(len(spatial)):
            options = [nth(given[key], axis) for key in ("stride", "padding", "dilation")]
            move = trace_transposed_convolution if given["transposed"] else slide_window
            found = move(found, 2 + axis, shape[2 + axis], weight.shape[2 + axis], *options)
        operands.append(found)
    dynamic = flow.positions_of(weight)
    if dynamic is not None:  # weights computed from the image have no position in it
        receptive_field = tuple(merge_elements(box, shape) for box in dynamic.receptive_field)
        operands.append(Positions(tuple(shape), (), receptive_field, dynamic.unknown_operations))
    return broadcast_positions(operands, shape)


def _trace_concatenation(flow: PositionTracer, name: str, given: Arguments) -> Positions:
    found = []
    for tensor in given["tensors"]:
        if tuple(tensor.shape) == (0,):  # an empty tensor, which may be joined to anything
            continue
        positions = flow.positions_of(tensor) or no_positions(tensor.shape)
        if name == "stack":
            dim = given["dim"] % (tensor.ndim + 1)
            shape = (*tensor.shape[:dim], 1, *tensor.shape[dim:])
            positions = positions.map(shape, lambda t, dim=dim: t.unsqueeze(dim))
        found.append(positions)
    return concatenate_positions(found, given["dim"] % len(found[0].shape))


def _trace_move(
    source: Positions, func: Any, given: Arguments, results: list[Tensor]
) -> list[Positions | None]:
    """Trace an operation that only moves elements, by running it on the arrays of positions."""
    arguments = func._schema.arguments
    # Rolls and flips change nothing along axes on which an array is constant.
    as_is = bool(given.get("dims")) and func._schema.name in ("aten::roll", "aten::flip")

    def move(array: Tensor) -> list[Tensor]:
        values = {**given, arguments[0].name: array if as_is else array.expand(source.shape)}
        moved = func(
            *(values[argument.name] for argument in arguments if not argument.kwarg_only),
            **{argument.name: values[argument.name] for argument in arguments if argument.kwarg_only},
        )
        return [compress(one) for one in ([moved] if isinstance(moved, Tensor) else moved)]

    centres, receptive_field = (
        [[move(array) for array in arrays] for arrays in group]
        for group in (source.centres, source.receptive_field)
    )
    return [
        Positions(
            tuple(out.shape),
            select_centres([tuple(array[number] for array in arrays) for arrays in centres]),
            merge_receptive_fields([tuple(array[number] for array in arrays) for arrays in receptive_field]),
            source.unknown_operations,
        )
        for number, out in enumerate(results)
    ]
