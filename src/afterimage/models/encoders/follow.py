"""Follow positions through a network: the effect of each operation on the positions of its values.

Operations are observed as they run, also on the meta device. Convolutions and pools average centres as they
average values, views and rolls move them, and sums bring several together. An unknown operation leaves no
centre and is named in `doubts`.
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
    BLANKS,
    VIRTUAL,
    WIDE,
    Positions,
    absent,
    aliased,
    anywhere,
    averaged,
    chosen,
    collapse,
    compress,
    doubtful,
    gathered,
    joined,
    of_image,
    reduced,
    reshape,
    rounded,
    united,
)

Given = dict[str, Any]
"""An operation's arguments by name."""


class PositionFlow:
    """Keeps the positions of every tensor that depends on `images`.

    `needs_values` tells that elements moved to indices that are values of a tensor, which the meta device does
    not have.
    """

    SWEEP = 64
    """Number of operations after which the positions of deleted tensors are dropped."""

    def __init__(self, images: Tensor) -> None:
        self._table: dict[int, dict[tuple, Positions]] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._steps = 0
        self.needs_values = False
        self._set(images, of_image(*images.shape[-2:]).like(images.shape))

    def of(self, tensor: Tensor) -> Positions | None:
        """Return the positions of a tensor's elements; None for a tensor that does not depend on the image."""
        entry = self._table.get(storage(tensor))
        if not entry:
            return None
        place = _place(tensor)
        if place not in entry:
            entry[place] = aliased(list(entry.items()), tensor)
        return entry[place]

    def restrided(self, tensor: Tensor) -> Positions:
        """Return the positions of a tensor whose strides were changed in place, as convolutions do to their results."""
        (positions,) = self._table[storage(tensor)].values()
        if positions.shape != tuple(tensor.shape):
            raise NotImplementedError("as_strided_ to another shape")
        self._table[storage(tensor)].clear()
        return positions

    def step(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Follow an operation that has run.

        Args:
            func: the dispatcher's operation
            args: its positional arguments
            kwargs: its keyword arguments
            result: what it returned
        """
        self._steps += 1
        if self._steps % self.SWEEP == 0:
            for key in [key for key, reference in self._alive.items() if reference.expired()]:
                del self._alive[key], self._table[key]
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made: list[Positions | None] = []
        if any(storage(tensor) in self._table for tensor in sources):
            try:
                made = _followed(self, func, _bind(func, args, kwargs), results)
            except Exception:  # unexpected use of a known operation: treat it as unknown
                known = [positions for tensor in sources if (positions := self.of(tensor)) is not None]
                made = [doubtful(known, out.shape, func._schema.name) for out in results]
        elif func.is_view:
            return
        made += [None] * (len(results) - len(made))  # statistics and indices have no positions
        for out, positions in zip(results, made, strict=True):
            if func._schema.is_mutable:
                self._write(out, positions)
            elif func.is_view:
                self._table[storage(out)][_place(out)] = positions
            else:
                self._set(out, positions)

    def _set(self, tensor: Tensor, positions: Positions | None) -> None:
        key = storage(tensor)
        if positions is None:
            self._table.pop(key, None)
            self._alive.pop(key, None)
        else:
            self._table[key] = {_place(tensor): positions}
            self._alive[key] = StorageWeakRef(tensor.untyped_storage())

    def _write(self, tensor: Tensor, positions: Positions | None) -> None:
        """Record a change in place, which also changes every tensor that shares the memory."""
        entry, place = self._table.get(storage(tensor), {}), _place(tensor)
        if not entry or set(entry) == {place}:
            self._set(tensor, positions)
            return
        positions = absent(tensor.shape) if positions is None else positions
        if entry.get(place) is not positions:
            for other in [other for other in entry if other != place]:
                view = tensor.as_strided(*other)
                entry[other] = aliased([(other, entry[other]), (place, positions)], view)
            entry[place] = positions


def storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, which its views share, so that reading a view counts as reading it."""
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _bind(func: Any, args: Any, kwargs: Any) -> Given:
    """Return an operation's arguments by name, defaults included."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in func._schema.arguments}


def _call(func: Any, given: Given, array: Tensor) -> Any:
    """Run an operation with `array` in place of its first argument."""
    names = [argument.name for argument in func._schema.arguments]
    keywords = {argument.name for argument in func._schema.arguments if argument.kwarg_only}
    values = {**given, names[0]: array}
    return func(*(values[n] for n in names if n not in keywords), **{n: values[n] for n in keywords})


def _tensors(given: Given) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]


def _dims(given: Given, tensor: Tensor) -> list[int]:
    dims = given.get("dim")
    dims = range(tensor.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [dim % tensor.ndim for dim in dims]


def _normal_dims(given: Given, tensor: Tensor) -> Sequence[int]:
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
"""Matrix products, and the names of their factors."""
ALONG: dict[str, Callable[[Given, Tensor], Sequence[int]]] = {
    "native_layer_norm": _normal_dims,
    "_fused_rms_norm": _normal_dims,
    "native_group_norm": lambda given, tensor: range(1, tensor.ndim),
    "native_batch_norm": lambda given, tensor: (),
    "_native_batch_norm_legit_no_training": lambda given, tensor: (),
    **dict.fromkeys(
        ("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"), _dims
    ),
}
"""Operations that keep elements in place but make each depend on all others along some axes."""
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


def _followed(flow: PositionFlow, func: Any, given: Given, results: list[Tensor]) -> list[Positions | None]:
    """Return the positions of an operation's results.

    Raises:
        NotImplementedError: the operation is unknown
    """
    name, out = func._schema.name.removeprefix("aten::"), results[0]
    name = name.removesuffix("_") if func._schema.is_mutable else name
    first = next(iter(given.values()))
    source = flow.of(first) if isinstance(first, Tensor) and name != "as_strided" else None
    if name in PRODUCTS:
        return [_multiplied(flow, name, given, out.shape)]
    if name == "convolution":
        return [_convolved(flow, given, out.shape)]
    if name in ("cat", "stack"):
        return [_concatenated(flow, name, given)]
    if name in ("copy", "fill", "zero"):
        written = flow.of(given["src"]) if name == "copy" else None
        return [None if written is None else gathered([written], out.shape)]
    if name == "as_strided":
        return [flow.restrided(out) if func._schema.is_mutable else flow.of(out)]
    if torch.Tag.pointwise in func.tags or name in ELEMENTWISE:
        operands = [found for tensor in _tensors(given) if (found := flow.of(tensor)) is not None]
        return [gathered(operands, out.shape)]
    if source is None:
        raise NotImplementedError(name)
    if name in RESHAPES:
        return [source.map(out.shape, lambda t: reshape(t, source.shape, tuple(out.shape)))]
    if name in REDUCTIONS:
        return [reduced(source, _dims(given, first), keepdim=bool(given.get("keepdim")))]
    if name in ALONG:
        return [_reaching(source, ALONG[name](given, first))]
    if name in RECURRENT:
        return [_reaching(reduced(source, [out.ndim - 1], keepdim=True).like(out.shape), range(out.ndim))]
    if name in POOLS:
        return [_pooled(source, name, given, out.shape)]
    if "adaptive" in name and "pool" in name:
        return [_adapted(source, out.shape, axes=int(name[name.index("pool") + 4]))]
    if name.startswith(("upsample_", "_upsample_")):
        return [_upsampled(source, given, out.shape)]
    if name in PADS:
        padded = _padded(source, given.get("pad") or given["padding"])
        if name == "constant_pad_nd":
            return [padded]
        (repeated,) = _moved(source, func, given, results)  # padding repeats pixels, but not centres
        return [replace(padded, reach=repeated.reach)]
    if name == "im2col":
        (height, width), given["padding"] = given["padding"], [0, 0]
        return _moved(_padded(source, [width, width, height, height]), func, given, results)
    if func.is_view or name in MOVES:
        others = _tensors(given)[1:]
        flow.needs_values |= any(other.is_meta for other in others)
        if flow.needs_values or any(flow.of(other) is not None for other in others):
            raise NotImplementedError("where elements move to is not known")
        return _moved(source, func, given, results)
    raise NotImplementedError(name)


def _multiplied(flow: PositionFlow, name: str, given: Given, shape: Sequence[int]) -> Positions:
    """Follow a matrix product: the centres of each factor are averaged along the summed axis."""
    keepdim, operands = len(shape) > 1, []
    for key, axis in zip(PRODUCTS[name], (-1, -2), strict=True):
        factor = flow.of(given[key])
        if factor is not None:
            dim = max(len(factor.shape) + axis, 0)
            operands.append(reduced(factor, [dim], keepdim=keepdim).like(shape))
    added = flow.of(given["self"]) if name.startswith(("add", "badd")) else None
    return gathered([*operands, *([] if added is None else [added])], shape)


def _reaching(source: Positions, dims: Sequence[int]) -> Positions:
    """Keep every element's centre, and let it depend on all others along `dims`."""
    return replace(source, reach=united([*source.reach, *collapse(source.reach, dims)])) if dims else source


def _convolved(flow: PositionFlow, given: Given, shape: Sequence[int]) -> Positions:
    source, weight = flow.of(given["input"]), given["weight"]
    operands = []
    if source is not None:
        groups, spatial = given["groups"], source.shape[2:]
        split = (source.shape[0], groups, source.shape[1] // groups, *spatial)
        found = source.map(split, lambda t: reshape(t, source.shape, split))
        found = reduced(found, [2], keepdim=False, step=1.0)
        found = found.map(
            (shape[0], shape[1], *spatial),
            lambda t: t if t.shape[1] == 1 else t.repeat_interleave(shape[1] // groups, 1),
        )
        for axis in range(len(spatial)):
            options = [_nth(given[key], axis) for key in ("stride", "padding", "dilation")]
            move = _spread if given["transposed"] else _slid
            found = move(found, 2 + axis, shape[2 + axis], weight.shape[2 + axis], *options)
        operands.append(found)
    dynamic = flow.of(weight)
    if dynamic is not None:  # weights computed from the image have no position in it
        reach = tuple(anywhere(arrays, shape) for arrays in dynamic.reach)
        operands.append(Positions(tuple(shape), (), reach, dynamic.doubts))
    return gathered(operands, shape)


def _nth(values: Sequence[int], axis: int) -> int:
    return values[axis] if len(values) > 1 else values[0]


def _slid(
    source: Positions, dim: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1
) -> Positions:
    """Follow windows along one axis, as of a convolution or a pool.

    Padding continues the line of centres, so that a window at the border is centred at its own position rather
    than at that of the pixels it sees.
    """
    size = source.shape[dim]
    if (kernel, stride, padding, out) == (1, 1, 0, size):
        return source
    starts = torch.arange(out, device="cpu") * stride - padding
    indices = starts[:, None] + torch.arange(kernel, device="cpu") * dilation
    parts = []
    for y, x, mixed in source.parts:
        windows = [_windows(array, dim, indices, size, "line") for array in (y, x)]
        orders = _real_if_any(_windows(mixed, dim, indices, size, "edge"))
        part = averaged((*windows, orders), -1)
        parts.append(tuple(compress(array.squeeze(-1)) for array in part))
    reach = [
        tuple(compress(_windows(array, dim, indices, size, "none").amin(-1)) for array in arrays)
        for arrays in source.reach
    ]
    shape = [out if axis == dim else length for axis, length in enumerate(source.shape)]
    return Positions(tuple(shape), chosen(parts), united(reach), source.doubts)


def _real_if_any(mixed: Tensor) -> Tensor:
    """Count padding in a window like the window's other elements, if there are any."""
    virtual = (mixed >= VIRTUAL) & mixed.isfinite()
    if not bool(virtual.any()):
        return mixed
    return torch.where(virtual & ~virtual.all(-1, keepdim=True), mixed - VIRTUAL, mixed)


def _windows(array: Tensor, dim: int, indices: Tensor, size: int, outside: str) -> Tensor:
    """Take windows of an array along an axis, which becomes `(out, ..., window)`.

    `outside` decides the values at `indices` beyond the ends: `line` continues the line of values, `edge`
    repeats the last one, and `none` is infinite.
    """
    if array.shape[dim] == 1 and (size > 1 or outside != "none"):
        return array.unsqueeze(-1)
    inside = indices.clamp(0, size - 1)
    values = array.movedim(dim, -1)
    found = values[..., inside]
    if outside == "line":
        steps = [values[..., 1] - values[..., 0], values[..., -1] - values[..., -2]]
        steps = [step[..., None, None] for step in steps]
        found = found + torch.where(indices < 0, *steps) * (indices - inside)
    if outside == "none":
        found = torch.where(indices == inside, found, torch.inf)
    return found.movedim(-2, dim)


def _spread(
    source: Positions, dim: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> Positions:
    """Follow a transposed convolution along one axis: each output is centred between the inputs that reach it."""
    index = torch.arange(out, dtype=torch.float64, device="cpu")
    return _resampled(source, dim, (index + padding - (kernel - 1) * dilation / 2) / stride)


def _resampled(source: Positions, dim: int, where: Tensor) -> Positions:
    """Interpolate positions along an axis at the indices `where`; each then sees all pixels along that axis."""
    low = where.floor().clamp(0, max(source.shape[dim] - 2, 0)).long()
    share = (where - low).reshape([-1 if axis == dim else 1 for axis in range(len(source.shape))])

    def between(array: Tensor) -> Tensor:
        if array.shape[dim] == 1:
            return array
        below, above = array.index_select(dim, low), array.index_select(dim, low + 1)
        return compress(rounded(below + (above - below) * share))

    parts = []
    for y, x, mixed in source.parts:
        least = mixed.amin(dim, keepdim=True) + (y.shape[dim] > 1 or x.shape[dim] > 1)
        parts.append((between(y), between(x), least))
    shape = [len(where) if axis == dim else length for axis, length in enumerate(source.shape)]
    return Positions(tuple(shape), chosen(parts), united(collapse(source.reach, [dim])), source.doubts)


def _pooled(source: Positions, name: str, given: Given, shape: Sequence[int]) -> Positions:
    axes = int(name[name.index("pool") + 4])
    kernel = given["kernel_size"]
    options = {"kernel": kernel, "stride": kernel, "padding": [0], "dilation": [1]}
    options |= {key: given[key] for key in ("stride", "padding", "dilation") if given.get(key)}
    for axis in range(axes):
        dim = len(shape) - axes + axis
        one = {key: _nth(values, axis) for key, values in options.items()}
        source = _slid(source, dim, shape[dim], **one)
    return source


def _adapted(source: Positions, shape: Sequence[int], axes: int) -> Positions:
    """Follow an adaptive pool: windows that cover an axis as evenly as whole numbers allow."""
    for dim in range(len(shape) - axes, len(shape)):
        before, after = source.shape[dim], shape[dim]
        starts = [index * before // after for index in range(after)]
        ends = [-(-(index + 1) * before // after) for index in range(after)]
        step = 1.0 if after > 1 else WIDE
        pieces = [
            reduced(_slid(source, dim, end - start, 1, 1, -start), [dim], keepdim=True, step=step)
            for start, end in zip(starts, ends, strict=True)
        ]
        source = joined(pieces, dim)
    return source


def _upsampled(source: Positions, given: Given, shape: Sequence[int]) -> Positions:
    """Follow an interpolation to another size: centres lie on the line through their neighbours."""
    factors = given.get("scale_factors") or [given.get(f"scales_{axis}") for axis in "dhw"]
    for dim in range(2, len(shape)):
        before, after = source.shape[dim], shape[dim]
        index = torch.arange(after, dtype=torch.float64, device="cpu")
        if given.get("align_corners"):
            where = index * ((before - 1) / max(after - 1, 1))
        else:
            factor = factors[dim - len(shape)] or given.get("scales") or after / before
            where = (index + 0.5) / factor - 0.5
        source = source if before == after else _resampled(source, dim, where)
    return source


def _padded(source: Positions, pad: Sequence[int]) -> Positions:
    """Follow padding: it continues a line of centres, and has no centre where there is no line."""
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(source.shape) - 1 - number
        size = source.shape[dim]
        if size > 1 and all(_is_line(array, dim) for part in source.parts for array in part[:2]):
            source = _slid(source, dim, before + size + after, 1, 1, before)
            index = torch.arange(source.shape[dim], device="cpu") - before
            outside = (index < 0) | (index >= size)
            outside = outside.reshape([-1 if axis == dim else 1 for axis in range(len(source.shape))])
            parts = []
            for y, x, mixed in source.parts:
                if not y.shape[dim] == x.shape[dim] == 1:
                    # Mixed as if the elements were in padding, where they are not already.
                    virtual = torch.where(mixed < VIRTUAL, mixed + VIRTUAL, mixed)
                    mixed = compress(torch.where(outside, virtual, mixed))
                parts.append((y, x, mixed))
            source = replace(source, parts=tuple(parts))
            continue
        lengths = [
            [count if axis == dim else n for axis, n in enumerate(source.shape)] for count in (before, after)
        ]
        pieces = [absent(lengths[0]), source, absent(lengths[1])]
        source = joined([piece for piece in pieces if piece.shape[dim]], dim)
    return source


def _is_line(array: Tensor, dim: int) -> bool:
    """Return whether an array grows by equal steps along an axis."""
    steps = array.diff(dim=dim)
    return array.shape[dim] < 3 or bool((steps == steps.narrow(dim, 0, 1)).all())


def _concatenated(flow: PositionFlow, name: str, given: Given) -> Positions:
    found = []
    for tensor in given["tensors"]:
        if tuple(tensor.shape) == (0,):  # an empty tensor, which may be joined to anything
            continue
        positions = flow.of(tensor) or absent(tensor.shape)
        if name == "stack":
            dim = given["dim"] % (tensor.ndim + 1)
            shape = (*tensor.shape[:dim], 1, *tensor.shape[dim:])
            positions = positions.map(shape, lambda t, dim=dim: t.unsqueeze(dim))
        found.append(positions)
    return joined(found, given["dim"] % len(found[0].shape))


def _moved(source: Positions, func: Any, given: Given, results: list[Tensor]) -> list[Positions | None]:
    """Follow an operation that only moves elements, by running it on the arrays of positions."""
    # Rolls and flips change nothing along axes on which an array is constant.
    as_is = bool(given.get("dims")) and func._schema.name in ("aten::roll", "aten::flip")
    groups = {
        name: [
            [_move(func, given, array if as_is else array.expand(source.shape)) for array in arrays]
            for arrays in getattr(source, name)
        ]
        for name in BLANKS
    }
    return [
        Positions(
            tuple(out.shape),
            chosen([tuple(array[number] for array in arrays) for arrays in groups["parts"]]),
            united([tuple(array[number] for array in arrays) for arrays in groups["reach"]]),
            source.doubts,
        )
        for number, out in enumerate(results)
    ]


def _move(func: Any, given: Given, array: Tensor) -> list[Tensor]:
    """Move the elements of an array of positions as an operation moves a tensor's."""
    moved = _call(func, given, array)
    return [compress(one) for one in ([moved] if isinstance(moved, Tensor) else moved)]
