"""Positions: where in the image the values of a network lie, followed through its operations as they run.

Beside every tensor that depends on the image goes the centre of the pixels that each element is made of. Convolutions
and pools average centres as they average values, views and rolls move them, sums bring several together. No weight
takes part, so that the answer is exact, the same for every seed, and costs no more than the network's shapes: it is
found on the meta device too. Attention and global pools reach over the whole image and say nothing about one place;
what an element is before them says it. So of several centres the one counts that differs between elements, and of
two such the one that was mixed with its neighbours less often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

Shape = tuple[int, ...]
Arrays = tuple[Tensor, ...]
GRAIN = 2.0**16
"""Centres are kept in multiples of 1/65536 pixel, so that rounding never makes equal ones differ."""
INFINITE = math.inf
BLANKS = {"parts": (0.0, 0.0, INFINITE), "reach": (INFINITE,) * 4}
"""What stands for an element that has no centre, or that no pixel influences."""


@dataclass(frozen=True)
class Positions:
    """Where each element of a tensor of `shape` lies. Arrays have size 1 along axes on which they are constant.

    `parts` are alternatives `(y, x, mixed)`: the centre in pixels and how often it was mixed with its neighbours,
    infinite where an element has none. `reach` are `(top, left, -bottom, -right)` of the pixels that influence it,
    infinite where none does; several count together. `doubts` are operations that could not be followed.
    """

    shape: Shape
    parts: tuple[Arrays, ...]
    reach: tuple[Arrays, ...]
    doubts: frozenset[str] = frozenset()

    def map(self, shape: Sequence[int], change: Callable[[Tensor], Tensor]) -> Positions:
        """The same with every array changed, for a tensor of another shape."""
        parts, reach = (
            tuple(tuple(change(array) for array in arrays) for arrays in group)
            for group in (self.parts, self.reach)
        )
        return Positions(tuple(shape), parts, reach, self.doubts)


class PositionFlow:
    """Keeps the positions of every tensor that depends on `images`; `step` follows one operation that has run."""

    def __init__(self, images: Tensor) -> None:
        self._table: dict[int, dict[tuple, Positions]] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._steps = 0
        height, width = images.shape[-2:]
        y = torch.arange(height, dtype=torch.float64, device="cpu")[:, None]
        x = torch.arange(width, dtype=torch.float64, device="cpu")[None]
        arrays = (
            (y + 0.5, x + 0.5, torch.zeros(1, 1, dtype=torch.float64, device="cpu")),
            (y, x, -y - 1, -x - 1),
        )
        part, reach = (tuple(array.reshape(1, 1, *array.shape) for array in group) for group in arrays)
        self._set(images, Positions(tuple(images.shape), (part,), (reach,)))

    def of(self, tensor: Tensor) -> Positions | None:
        """Where a tensor's elements lie; None for one that does not depend on the image."""
        entry = self._table.get(_storage(tensor))
        if not entry:
            return None
        key = _geometry(tensor)
        if key not in entry:
            entry[key] = _alias(list(entry.items()), tensor)
        return entry[key]

    def restrided(self, tensor: Tensor) -> Positions:
        """Positions of a tensor that just got other strides in place, as convolutions do to what they return."""
        (positions,) = self._table[_storage(tensor)].values()
        if positions.shape != tuple(tensor.shape):
            raise NotImplementedError("as_strided_ to another shape")
        self._table[_storage(tensor)].clear()
        return positions

    def step(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Follow one operation of the dispatcher from its arguments to its result."""
        self._steps += 1
        if self._steps % 64 == 0:
            for key in [key for key, ref in self._alive.items() if ref.expired()]:
                self._alive.pop(key), self._table.pop(key, None)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        depends = any(_storage(tensor) in self._table for tensor in tensors)
        mutable = func._schema.is_mutable
        if func.is_view and not mutable and not depends:
            return
        made: list[Positions | None] = [None] * len(results)
        if depends:
            try:
                found = _follow(self, func, _bind(func, args, kwargs), results)
                made = found + [None] * (len(results) - len(found))  # statistics and indices that go with it
            except Exception:  # an operation used in a way that was not thought of is one not understood
                made = [_unknown(self, func, tensors, out) for out in results]
        for out, positions in zip(results, made, strict=True):
            if mutable:
                self._write(out, positions)
            elif func.is_view:
                self._table.setdefault(_storage(out), {})[_geometry(out)] = positions
            else:
                self._set(out, positions)

    def _set(self, tensor: Tensor, positions: Positions | None) -> None:
        key = _storage(tensor)
        if positions is None:
            self._table.pop(key, None)
            return
        self._table[key] = {_geometry(tensor): positions}
        self._alive[key] = StorageWeakRef(tensor.untyped_storage())

    def _write(self, tensor: Tensor, positions: Positions | None) -> None:
        """A tensor was changed in place: whatever shares its memory has changed with it."""
        entry, key = self._table.get(_storage(tensor), {}), _geometry(tensor)
        if positions is None:
            positions = _absent(tensor.shape) if entry else None
        if not entry or set(entry) == {key}:
            self._set(tensor, positions)
        elif entry.get(key) is not positions:
            for other in [other for other in entry if other != key]:
                view = tensor.as_strided(*other)
                entry[other] = _alias([(other, entry[other]), (key, positions)], view)
            entry[key] = positions


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _bind(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """An operation's arguments by name, with its defaults."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in func._schema.arguments}


def _follow(
    flow: PositionFlow, func: Any, given: dict[str, Any], results: list[Tensor]
) -> list[Positions | None]:
    """Positions of what an operation returned. Raises NotImplementedError for one that is not known."""
    name, out = func._schema.name.removeprefix("aten::"), results[0]
    name = name if name == "_" else name.removesuffix("_") if func._schema.is_mutable else name
    first = next(iter(given.values()))
    if name in REDUCTIONS:
        return [_reduce(flow.of(first), _dims(given, first.ndim), bool(given.get("keepdim")))]
    if name in CONTRACTIONS:
        return [_contract(flow, name, given, out.shape)]
    if name in NORMS:
        return [_normalised(flow.of(first), NORMS[name](given, first))]
    if name == "convolution":
        return [_convolve(flow, given, out.shape)]
    if name in POOLS:
        return [_pool(flow.of(first), name, given, out.shape)]
    if name in ADAPTIVE:
        return [_resized(flow.of(first), out.shape, ADAPTIVE[name])]
    if name.startswith(("upsample", "_upsample")):
        return [_resized(flow.of(first), out.shape, lambda t, size: _call(func, given, t))]
    if name in ("constant_pad_nd", *PADS):
        return [_pad(flow.of(first), given.get("pad") or given["padding"], out.shape, name)]
    if name in ("cat", "stack"):
        return [_cat(flow, name, given, out.shape)]
    if name in ("copy", "fill", "zero"):
        source = flow.of(given["src"]) if name == "copy" else None
        return [None if source is None else _gather([source], out.shape)]
    if name in ("view", "_unsafe_view", "_reshape_alias", "reshape"):
        source = flow.of(first)
        return [source.map(out.shape, lambda t: reshape(t, source.shape, tuple(out.shape)))]
    if name == "as_strided":
        return [flow.restrided(out) if func._schema.is_mutable else flow.of(out)]
    if func.is_view or name in MOVES:
        return _moved(flow, func, given, results)
    if torch.Tag.pointwise in func.tags or name in POINTWISE:
        operands = [flow.of(leaf) for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]
        return [_gather([operand for operand in operands if operand is not None], out.shape)]
    if name in RECURRENT:
        source = flow.of(first)
        kept = source.map((*source.shape[:-1], out.shape[-1]), lambda t: _collapse(t, -1))
        return [_normalised(kept, range(out.ndim))]
    raise NotImplementedError(name)


def _dims(given: dict[str, Any], ndim: int) -> list[int]:
    dims = given.get("dim")
    dims = range(ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [dim % ndim for dim in dims]


def _call(func: Any, given: dict[str, Any], array: Tensor) -> Any:
    """Run an operation on an array in place of its first argument."""
    names = [argument.name for argument in func._schema.arguments]
    keywords = {a.name for a in func._schema.arguments if a.kwarg_only}
    values = {**given, names[0]: array}
    positional = [values[name] for name in names if name not in keywords]
    return func(*positional, **{name: values[name] for name in keywords})


REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "logsumexp", "linalg_vector_norm", "norm", "var", "std"),
    *("var_mean", "std_mean", "prod", "any", "all", "median", "argmax", "argmin", "nansum"),
}
CONTRACTIONS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
    "dot": ("self", "tensor"),
}
NORMS: dict[str, Callable[[dict[str, Any], Tensor], Sequence[int]]] = {
    "native_layer_norm": lambda given, t: range(t.ndim - len(given["normalized_shape"]), t.ndim),
    "native_group_norm": lambda given, t: range(1, t.ndim),
    "native_batch_norm": lambda given, t: (),
    "_native_batch_norm_legit_no_training": lambda given, t: (),
    "_softmax": lambda given, t: _dims(given, t.ndim),
    "_safe_softmax": lambda given, t: _dims(given, t.ndim),
    "_log_softmax": lambda given, t: _dims(given, t.ndim),
    "cumsum": lambda given, t: _dims(given, t.ndim),
    "cumprod": lambda given, t: _dims(given, t.ndim),
    "logcumsumexp": lambda given, t: _dims(given, t.ndim),
    "_fused_rms_norm": lambda given, t: range(t.ndim - len(given["normalized_shape"]), t.ndim),
}
POOLS = {
    f"{kind}_pool{n}d{end}" for kind in ("max", "avg") for n in (1, 2, 3) for end in ("", "_with_indices")
}
PADS = {f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)}
MOVES = {
    "roll",
    "flip",
    "index",
    "index_select",
    "gather",
    "repeat",
    "pixel_shuffle",
    "pixel_unshuffle",
    "im2col",
}
MOVES |= {"channel_shuffle", "native_channel_shuffle", "tril", "triu", "split_copy", "take_along_dim"}
POINTWISE = {
    "hardswish",
    "_to_copy",
    "contiguous",
    "lift_fresh",
    "bernoulli",
    "native_dropout",
    "prelu",
    "glu",
}
POINTWISE |= {"_prelu_kernel", "masked_fill", "clone", "log_sigmoid_forward"}
RECURRENT = {"mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu"}


def _absent(shape: Sequence[int]) -> Positions:
    return Positions(tuple(shape), (), ())


def _unknown(flow: PositionFlow, func: Any, tensors: Sequence[Tensor], out: Tensor) -> Positions:
    """An operation that could not be followed: it has no centre, and reaches as far as all that went into it."""
    sources = [source for tensor in tensors if (source := flow.of(tensor)) is not None]
    ones = (1,) * out.ndim
    reach = tuple(
        tuple(array.amin().reshape(ones) for array in arrays) for source in sources for arrays in source.reach
    )
    doubts = frozenset({func._schema.name}).union(*(source.doubts for source in sources))
    return Positions(tuple(out.shape), (), _united(reach), doubts)


def reshape(array: Tensor, old: Shape, new: Shape) -> Tensor:
    """Reshape what stands for a tensor of shape `old`; axes on which it is constant stay of size 1."""
    if array.numel() == 1:
        return array.reshape((1,) * len(new))
    mixed_old, mixed_new, i, j = [], [], 0, 0
    while i < len(old) or j < len(new):
        start, end = (i, j), [i, j]
        before = after = 1
        while True:
            if before == after and (before != 1 or i > start[0] or j > start[1]):
                break
            if before <= after and i < len(old):
                before, i = before * old[i], i + 1
            elif j < len(new):
                after, j = after * new[j], j + 1
            else:
                before, i = before * old[i], i + 1
        end = [i, j]
        varies = any(array.shape[dim] > 1 for dim in range(start[0], end[0]))
        mixed_old += [old[dim] if varies else 1 for dim in range(start[0], end[0])]
        mixed_new += [new[dim] if varies else 1 for dim in range(start[1], end[1])]
    return compress(array.expand(mixed_old).reshape(mixed_new))


def compress(array: Tensor) -> Tensor:
    """Size 1 along every axis on which an array is constant."""
    for dim in range(array.ndim):
        if array.shape[dim] > 1:
            narrow = array.narrow(dim, 0, 1)
            if array.stride(dim) == 0 or torch.equal(array, narrow.expand_as(array)):
                array = narrow
    return array


def _lift(array: Tensor, ndim: int) -> Tensor:
    return array.reshape((1,) * (ndim - array.ndim) + tuple(array.shape)) if array.ndim < ndim else array


def _collapse(array: Tensor, dim: int) -> Tensor:
    return array.amin(dim, keepdim=True) if array.shape[dim] > 1 else array


def _alias(sources: Sequence[tuple[tuple, Positions]], view: Tensor) -> Positions:
    """Positions of a view from those of other views of the same memory, the later of which were written later."""
    size = view.untyped_storage().nbytes() // view.element_size()
    sources = [(key, positions) for key, positions in sources if positions is not None]

    def through(name: str, number: int) -> Arrays:
        arrays = []
        for index, blank in enumerate(BLANKS[name]):
            flat = torch.full((size,), blank, dtype=torch.float64, device="cpu")
            for key, positions in sources:
                group, target = getattr(positions, name), flat.as_strided(*key)
                known = number < len(group)
                target.copy_(group[number][index].expand(key[0])) if known else target.fill_(blank)
            arrays.append(compress(flat.as_strided(*_geometry(view)).contiguous()))
        return tuple(arrays)

    counts = [max((len(getattr(p, name)) for _, p in sources), default=0) for name in ("parts", "reach")]
    parts = tuple(through("parts", number) for number in range(counts[0]))
    reach = tuple(through("reach", number) for number in range(counts[1]))
    doubts = frozenset().union(*(positions.doubts for _, positions in sources))
    return Positions(tuple(view.shape), parts, reach, doubts)


def _pattern(arrays: Arrays) -> frozenset[int]:
    return frozenset(dim for array in arrays for dim, size in enumerate(array.shape) if size > 1)


def _united(reach: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Reaches that count together, one for each set of axes along which they vary."""
    found: dict[frozenset[int], Arrays] = {}
    for arrays in reach:
        key = _pattern(arrays)
        if key in found and found[key] is not arrays:
            arrays = tuple(torch.minimum(a, b) for a, b in zip(found[key], arrays, strict=True))
        found[key] = arrays
    return tuple(found.values())


def _chosen(parts: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """What is left of several centres: those that vary along more axes; of two alike, the less mixed one."""
    found: dict[frozenset[int], Arrays] = {}
    for arrays in parts:
        key = _pattern(arrays)
        found[key] = _less_mixed(found[key], arrays) if key in found else arrays
    left = dict(found)
    for key in sorted(found, key=len):
        wider = [other for other in left if key < other]
        for other in wider:
            if bool(left[other][2].isinf().any()):
                left[other] = _less_mixed(left[other], left[key], fill=True)
        if wider:
            del left[key]
    return tuple(left.values())


def _less_mixed(first: Arrays, second: Arrays, *, fill: bool = False) -> Arrays:
    if first is second:
        return first
    a, b = first[2], second[2]
    if fill:
        b = torch.where(a.isinf(), b, INFINITE)
    same = all(torch.equal(one, two) for one, two in zip(first[:2], second[:2], strict=True))
    if same and not fill:
        return first[0], first[1], compress(torch.minimum(a, b))
    if bool((a < b).all()):
        return first
    if bool((b < a).all()):
        return second
    even = a == b
    centres = (
        torch.where(even, _rounded((one + two) / 2), torch.where(a < b, one, two))
        for one, two in zip(first[:2], second[:2], strict=True)
    )
    return (*map(compress, centres), compress(torch.minimum(a, b)))


def _rounded(array: Tensor) -> Tensor:
    return (array * GRAIN).round() / GRAIN


def _gather(operands: Sequence[Positions], shape: Sequence[int]) -> Positions:
    """Elements made of one element of each operand, with broadcasting."""
    ndim = len(shape)
    if len(operands) == 1 or all(operand is operands[0] for operand in operands):
        if len(operands[0].shape) == ndim:
            return replace(operands[0], shape=tuple(shape))
        return operands[0].map(shape, lambda t: _lift(t, ndim))
    lifted = [operand.map(shape, lambda t: _lift(t, ndim)) for operand in operands]
    return Positions(
        tuple(shape),
        _chosen([arrays for operand in lifted for arrays in operand.parts]),
        _united([arrays for operand in lifted for arrays in operand.reach]),
        frozenset().union(*(operand.doubts for operand in lifted)),
    )


def averaged(part: Arrays, dim: int) -> Arrays:
    """One centre for all elements along an axis: the mean of the least mixed, once more mixed if they differ."""
    y, x, mixed = part
    if all(array.shape[dim] == 1 for array in part):
        return part
    least = mixed.amin(dim, keepdim=True)
    weight = (mixed == least).to(torch.float64)
    differs = torch.zeros_like(least, dtype=torch.bool) | ~(weight == 1).all(dim, keepdim=True)
    centres = []
    for array in (y, x):
        if array.shape[dim] == 1 and mixed.shape[dim] == 1:
            centres.append(array)
            continue
        wide = torch.broadcast_to(array, torch.broadcast_shapes(array.shape, weight.shape))
        # Each less the first of them: equal ones then have their own mean, to the last bit.
        base = wide.narrow(dim, 0, 1)
        base = torch.where(weight > 0, wide, INFINITE).amin(dim, keepdim=True)
        offset = torch.where(weight > 0, wide - base, 0.0)
        weights = torch.broadcast_to(weight, offset.shape)
        centres.append(_rounded(base + offset.sum(dim, keepdim=True) / weights.sum(dim, keepdim=True)))
        differs = differs | (offset != 0).any(dim, keepdim=True)
    return (*map(compress, centres), compress(least + differs))


def _reduce(source: Positions, dims: Sequence[int], keepdim: bool) -> Positions:
    parts, reach = list(source.parts), list(source.reach)
    for dim in dims:
        parts = [averaged(part, dim) for part in parts]
        reach = [tuple(_collapse(array, dim) for array in arrays) for arrays in reach]
    shape = [1 if dim in dims else size for dim, size in enumerate(source.shape)]
    found = Positions(tuple(shape), _chosen(parts), _united(reach), source.doubts)
    if keepdim:
        return found
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    return found.map([source.shape[dim] for dim in kept], lambda t: t.reshape([t.shape[dim] for dim in kept]))


def _contract(flow: PositionFlow, name: str, given: dict[str, Any], shape: Sequence[int]) -> Positions:
    """A matrix product: each factor's centres are averaged along the axis that is summed over."""
    left, right = (flow.of(given[key]) for key in CONTRACTIONS[name])
    operands = []
    if left is not None:
        found = _reduce(left, [len(left.shape) - 1], keepdim=name not in ("mv", "addmv", "dot"))
        operands.append(replace(found, shape=tuple(shape)))
    if right is not None:
        found = _reduce(right, [max(len(right.shape) - 2, 0)], keepdim=name not in ("mv", "addmv", "dot"))
        operands.append(replace(found, shape=tuple(shape)))
    added = flow.of(given["self"]) if name.startswith(("add", "badd")) else None
    operands += [] if added is None else [added]
    return _gather(operands, shape)


def _normalised(source: Positions, dims: Sequence[int]) -> Positions:
    """Every element stays where it is and is influenced by all others along `dims`."""
    reach = source.reach
    for dim in dims:
        reach = tuple(tuple(_collapse(array, dim) for array in arrays) for arrays in reach)
    return replace(source, reach=_united([*source.reach, *reach]) if dims else reach)


def _windowed(array: Tensor, dim: int, indices: Tensor, size: int, outside: str) -> Tensor:
    """Windows of an array along an axis, `(..., out, window)`: `indices` beyond its ends continue the line, repeat the
    last value or are infinite (`outside` is line, edge or none)."""
    if array.shape[dim] == 1 and (size > 1 or outside != "none"):
        return array.unsqueeze(-1)
    inside = indices.clamp(0, size - 1)
    moved = array.movedim(dim, -1)
    found = moved[..., inside]
    if outside == "line" and size > 1:
        first, last = moved[..., 1:2] - moved[..., :1], moved[..., -1:] - moved[..., -2:-1]
        steps = torch.where((indices < 0), first[..., None], last[..., None])
        found = found + steps * (indices - inside)
    if outside == "none":
        found = torch.where(indices == inside, found, INFINITE)
    return found.movedim(-2, dim)


def _slide(
    source: Positions, dim: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1
) -> Positions:
    """Windows along one axis, as of a convolution or a pool. Padding continues the line of centres, so that a window
    at the border has the centre that its place has, not that of the pixels it happens to see."""
    size = source.shape[dim]
    shape = [out if axis == dim else length for axis, length in enumerate(source.shape)]
    if (kernel, stride, padding, out) == (1, 1, 0, size):
        return source
    indices = (torch.arange(out, device="cpu") * stride - padding)[:, None] + (
        torch.arange(kernel, device="cpu") * dilation
    )
    parts = []
    for y, x, mixed in source.parts:
        windows = [_windowed(array, dim, indices, size, "line") for array in (y, x)]
        orders = _windowed(mixed, dim, indices, size, "edge")
        orders = orders.expand(*orders.shape[:-1], kernel) if kernel > 1 else orders
        part = averaged((*windows, orders), -1) if kernel > 1 else (*windows, orders)
        parts.append(tuple(compress(array.squeeze(-1)) for array in part))
    reach = [
        tuple(compress(_windowed(array, dim, indices, size, "none").amin(-1)) for array in arrays)
        for arrays in source.reach
    ]
    return Positions(tuple(shape), _chosen(parts), _united(reach), source.doubts)


def _convolve(flow: PositionFlow, given: dict[str, Any], shape: Sequence[int]) -> Positions:
    source, weight = flow.of(given["input"]), given["weight"]
    operands = []
    if source is not None:
        groups, out = given["groups"], shape[1]
        channels = source.shape[1]
        grouped = source.map(
            (source.shape[0], groups, channels // groups, *source.shape[2:]),
            lambda t: reshape(
                t, source.shape, (source.shape[0], groups, channels // groups, *source.shape[2:])
            ),
        )
        mixed = _reduce(grouped, [2], keepdim=False)
        found = mixed.map(
            (shape[0], out, *source.shape[2:]),
            lambda t: t if t.shape[1] == 1 else t.repeat_interleave(out // groups, 1),
        )
        for axis in range(len(weight.shape) - 2):
            options = [
                values[axis] if len(values) > 1 else values[0]
                for values in (given["stride"], given["padding"], given["dilation"])
            ]
            move = _spread if given["transposed"] else _slide
            stride, padding, dilation = options
            found = move(found, 2 + axis, shape[2 + axis], weight.shape[2 + axis], stride, padding, dilation)
        operands.append(replace(found, shape=tuple(shape)))
    if (
        dynamic := flow.of(weight)
    ) is not None:  # weights made from the image: they reach far and lie nowhere
        ones = (1,) * len(shape)
        reach = [tuple(array.amin().reshape(ones) for array in arrays) for arrays in dynamic.reach]
        operands.append(Positions(tuple(shape), (), tuple(reach), dynamic.doubts))
    return _gather(operands, shape)


def _spread(
    source: Positions, dim: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> Positions:
    """A transposed convolution along one axis: each output lies amid the inputs that reach it."""
    size = source.shape[dim]
    taps = torch.arange(out, device="cpu")[:, None] + padding - torch.arange(kernel, device="cpu") * dilation
    inputs = taps.div(stride, rounding_mode="floor")
    hit = taps % stride == 0
    parts = []
    for y, x, mixed in source.parts:
        order = _windowed(mixed, dim, inputs, size, "edge").movedim(dim, -2)
        order = torch.where(hit, order, INFINITE).movedim(-2, dim)
        windows = [_windowed(array, dim, inputs, size, "line") for array in (y, x)]
        part = averaged((*windows, order), -1)
        parts.append(tuple(compress(array.squeeze(-1)) for array in part))
    reach = []
    for arrays in source.reach:
        wide = [_windowed(array, dim, inputs, size, "none").movedim(dim, -2) for array in arrays]
        wide = [torch.where(hit, array, INFINITE).movedim(-2, dim) for array in wide]
        reach.append(tuple(compress(array.amin(-1)) for array in wide))
    shape = [out if axis == dim else length for axis, length in enumerate(source.shape)]
    return Positions(tuple(shape), _chosen(parts), _united(reach), source.doubts)


def _pool(source: Positions, name: str, given: dict[str, Any], shape: Sequence[int]) -> Positions:
    axes = int(name[name.index("d") - 1])
    options = {"stride": given["kernel_size"], "padding": [0], "dilation": [1]}
    options |= {key: given[key] for key in options if given.get(key)} | {"kernel": given["kernel_size"]}
    for axis in range(axes):
        one = {key: values[axis] if len(values) > 1 else values[0] for key, values in options.items()}
        dim = len(shape) - axes + axis
        source = _slide(source, dim, shape[dim], **one)
    return replace(source, shape=tuple(shape))


def _adaptive(array: Tensor, size: Sequence[int]) -> Tensor:
    pool = (
        torch.nn.functional.adaptive_avg_pool1d if len(size) == 1 else torch.nn.functional.adaptive_avg_pool2d
    )
    return pool(array, size)


ADAPTIVE = {
    name: _adaptive
    for name in ("_adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool1d", "adaptive_max_pool1d")
}


def _resized(
    source: Positions, shape: Sequence[int], resize: Callable[[Tensor, Sequence[int]], Tensor]
) -> Positions:
    """An upsampled map: centres between others lie where interpolation puts them."""
    before, size = source.shape[2:], tuple(shape[2:])

    def apply(array: Tensor) -> Tensor:
        if all(length == 1 for length in array.shape[2:]):
            return array
        return compress(_rounded(resize(array.expand(*array.shape[:2], *before).contiguous(), size)))

    parts = []
    for y, x, mixed in source.parts:
        for axis in range(2, mixed.ndim):
            mixed = _collapse(mixed, axis)
        parts.append((apply(y), apply(x), mixed + 1))
    reach = []
    for arrays in source.reach:
        for axis in range(2, len(shape)):
            arrays = tuple(_collapse(array, axis) for array in arrays)
        reach.append(arrays)
    return Positions(tuple(shape), _chosen(parts), _united(reach), source.doubts)


def _pad(source: Positions, pad: Sequence[int], shape: Sequence[int], name: str) -> Positions:
    """A padded tensor: along a line of centres the padding continues it, elsewhere it has none."""
    for number in range(len(pad) // 2):
        dim = len(shape) - 1 - number
        if (pad[2 * number], pad[2 * number + 1]) == (0, 0):
            continue
        if all(_is_line(array, dim) for part in source.parts for array in part):
            source = _slide(source, dim, shape[dim], 1, 1, pad[2 * number])
            continue
        lengths = [shape[dim] if axis == dim else size for axis, size in enumerate(source.shape)]
        size = source.shape[dim]
        indices = (torch.arange(shape[dim], device="cpu") - pad[2 * number])[:, None]
        grown = {}
        for attribute, blanks in BLANKS.items():
            grown[attribute] = tuple(
                tuple(
                    _padded(array, dim, indices, size, blank)
                    for array, blank in zip(arrays, blanks, strict=True)
                )
                for arrays in getattr(source, attribute)
            )
        source = replace(source, shape=tuple(lengths), **grown)
    return replace(source, shape=tuple(shape))


def _padded(array: Tensor, dim: int, indices: Tensor, size: int, blank: float) -> Tensor:
    wide = array.expand([size if axis == dim else length for axis, length in enumerate(array.shape)])
    found = _windowed(wide, dim, indices, size, "none").squeeze(-1)
    return compress(torch.where(found.isinf(), blank, found))


def _is_line(array: Tensor, dim: int) -> bool:
    """Whether an array grows by equal steps along an axis."""
    if array.shape[dim] < 3:
        return True
    steps = array.diff(dim=dim)
    return bool((steps == steps.narrow(dim, 0, 1)).all())


def _cat(flow: PositionFlow, name: str, given: dict[str, Any], shape: Sequence[int]) -> Positions:
    tensors, dim = given["tensors"], given["dim"] % len(shape)
    found: list[Positions] = []
    for tensor in tensors:
        if tuple(tensor.shape) == (0,):
            continue
        positions = flow.of(tensor) or _absent(tensor.shape)
        if name == "stack":
            lengths = (*tensor.shape[:dim], 1, *tensor.shape[dim:])
            positions = positions.map(lengths, lambda t: t.unsqueeze(dim))
        found.append(positions)

    def joined(attribute: str, number: int) -> Arrays:
        arrays = []
        for index, blank in enumerate(BLANKS[attribute]):
            pieces = []
            for positions in found:
                group = getattr(positions, attribute)
                piece = torch.full((1,) * len(shape), blank, dtype=torch.float64, device="cpu")
                piece = group[number][index] if number < len(group) else piece
                size = positions.shape[dim]
                pieces.append(piece.expand([size if a == dim else n for a, n in enumerate(piece.shape)]))
            common = torch.broadcast_shapes(*((*p.shape[:dim], 1, *p.shape[dim + 1 :]) for p in pieces))
            pieces = [
                p.expand([p.shape[dim] if a == dim else n for a, n in enumerate(common)]) for p in pieces
            ]
            arrays.append(compress(torch.cat(pieces, dim)))
        return tuple(arrays)

    counts = {name: max(len(getattr(positions, name)) for positions in found) for name in BLANKS}
    return Positions(
        tuple(shape),
        _chosen([joined("parts", number) for number in range(counts["parts"])]),
        _united([joined("reach", number) for number in range(counts["reach"])]),
        frozenset().union(*(positions.doubts for positions in found)),
    )


def _moved(
    flow: PositionFlow, func: Any, given: dict[str, Any], results: list[Tensor]
) -> list[Positions | None]:
    """An operation that only moves elements: it is run on the arrays themselves."""
    first, *others = [leaf for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]
    source = flow.of(first)
    if any(flow.of(other) is not None for other in others):
        raise NotImplementedError("where elements move to depends on the image")
    # Along axes on which an array is constant nothing would change.
    along = bool(given.get("dims")) and func._schema.name in ("aten::roll", "aten::flip")

    def apply(array: Tensor) -> list[Tensor]:
        moved = _call(func, given, array if along else array.expand(source.shape))
        return [compress(one) for one in ([moved] if isinstance(moved, Tensor) else moved)]

    parts, reach = (
        [[apply(array) for array in arrays] for arrays in group] for group in (source.parts, source.reach)
    )
    return [
        Positions(
            tuple(out.shape),
            _chosen([tuple(array[number] for array in arrays) for arrays in parts]),
            _united([tuple(array[number] for array in arrays) for arrays in reach]),
            source.doubts,
        )
        for number, out in enumerate(results)
    ]
