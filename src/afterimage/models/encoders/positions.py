"""Positions in the image of each element of a tensor, and rules to combine several positions.

Every tensor that depends on the image is accompanied by the centre, for each element, of the pixels that it
is computed from; `follow` carries these centres through a network's operations. Weights take no part, so the
result is exact and the same for every seed.

Attention and global pools reach over the whole image and have no position of their own; an element keeps the
position that it had before them. Of several centres, one that differs between elements is preferred, then the
one that was mixed with its neighbours less often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shape = tuple[int, ...]
Arrays = tuple[Tensor, ...]

GRAIN = 2.0**16
"""Steps per pixel to which centres are rounded, so that rounding errors never make equal centres differ."""
GLOBAL_MIX_COUNT = 2.0**20
"""Count added to `mixed` for mixing along a whole axis (a window adds 1); above any number of windows."""
PADDING_MIX_COUNT = 2.0**40
"""Count added to `mixed` for elements in padding, which have a position but depend on no pixel yet."""
MOST_PARTS = 4
"""Number of alternative centres of one kind that are kept; beyond it, two are averaged."""
EMPTY_VALUES = {"parts": (0.0, 0.0, math.inf), "reach": (math.inf,) * 4}
"""Values for elements without a centre (`parts`) or that depend on no pixel (`reach`)."""


@dataclass(frozen=True)
class Positions:
    """The positions of a tensor's elements. Arrays have size 1 along axes on which they are constant.

    Attributes:
        shape: shape of the tensor
        parts: alternatives `(y, x, mixed)`: the centre in pixels, and the number of times that it was mixed
            with its neighbours, which is infinite for elements without a centre
        reach: `(top, left, -bottom, -right)` in pixels of the region that an element depends on, infinite if
            there is none; several reaches count together
        doubts: operations that could not be followed
    """

    shape: Shape
    parts: tuple[Arrays, ...]
    reach: tuple[Arrays, ...]
    doubts: frozenset[str] = frozenset()

    def map(self, shape: Sequence[int], change: Callable[[Tensor], Tensor]) -> Positions:
        """Apply a change to every array; the result describes a tensor of `shape`."""
        parts, reach = (
            tuple(tuple(change(array) for array in arrays) for arrays in group)
            for group in (self.parts, self.reach)
        )
        return Positions(tuple(shape), parts, reach, self.doubts)

    def like(self, shape: Sequence[int]) -> Positions:
        """Return these positions for a tensor with other lengths along axes on which they are constant."""
        return replace(self, shape=tuple(shape))


def image_positions(channels: int, height: int, width: int) -> Positions:
    """Return the positions of an image's pixels `(1, channels, height, width)`, each at its own centre."""
    y = torch.arange(height, dtype=torch.float64, device="cpu").reshape(1, 1, -1, 1)
    x = torch.arange(width, dtype=torch.float64, device="cpu").reshape(1, 1, 1, -1)
    never = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device="cpu")
    return Positions((1, channels, height, width), ((y + 0.5, x + 0.5, never),), ((y, x, -y - 1, -x - 1),))


def no_positions(shape: Sequence[int]) -> Positions:
    """Return the positions of a tensor of `shape` that does not depend on the image."""
    return Positions(tuple(shape), (), ())


def unknown_positions(sources: Sequence[Positions], shape: Sequence[int], operation: str) -> Positions:
    """Return the positions of the result of an operation that could not be followed.

    The result has no centres and depends on everything that its sources depend on.
    """
    doubts = frozenset({operation}).union(*(source.doubts for source in sources))
    return Positions(
        tuple(shape),
        (),
        merge_receptive_fields([merge_elements(r, shape) for s in sources for r in s.reach]),
        doubts,
    )


def merge_elements(reach: Arrays, shape: Sequence[int]) -> Arrays:
    """Return one reach for all elements of a tensor of `shape`, from the reach of each element of another."""
    return tuple(array.amin().reshape((1,) * len(shape)) for array in reach)


def rounded(array: Tensor) -> Tensor:
    """Round to multiples of 1 / `GRAIN` pixel."""
    return (array * GRAIN).round() / GRAIN


def compress(array: Tensor) -> Tensor:
    """Reduce to size 1 every axis on which an array is constant."""
    for dim in range(array.ndim):
        if array.shape[dim] > 1:
            first = array.narrow(dim, 0, 1)
            if array.stride(dim) == 0 or torch.equal(array, first.expand_as(array)):
                array = first
    return array


def collapse(reach: Sequence[Arrays], dims: Sequence[int]) -> list[Arrays]:
    """Return the reaches of elements that depend on everything along some axes."""
    for dim in dims:
        reach = [
            tuple(a.amin(dim, keepdim=True) if a.shape[dim] > 1 else a for a in arrays) for arrays in reach
        ]
    return list(reach)


def reshape(array: Tensor, old: Shape, new: Shape) -> Tensor:
    """Reshape an array of positions as its tensor is, from `old` to `new`; constant axes keep size 1."""
    if array.numel() == 1:
        return array.reshape((1,) * len(new))
    before, after = [], []
    for these, those in _groups(old, new):
        varies = any(array.shape[dim] > 1 for dim in these)
        before += [old[dim] if varies else 1 for dim in these]
        after += [new[dim] if varies else 1 for dim in those]
    return compress(array.expand(before).reshape(after))


def _groups(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Group the axes of two shapes of a tensor into the smallest groups with the same number of elements."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start, left, right = (i, j), 1, 1
        while left != right or (i, j) == start:
            if i < len(old) and (left <= right or j == len(new)):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(start[0], i), range(start[1], j)))
    return groups


def average_centres(part: Arrays, dim: int, step: float = 1.0) -> Arrays:
    """Average centres along an axis.

    Args:
        part: the centres `(y, x, mixed)`; only the least mixed ones are averaged
        dim: the axis
        step: amount added to `mixed` if the centres differ
    """
    y, x, mixed = part
    if all(array.shape[dim] == 1 for array in part):
        return part
    least = mixed.amin(dim, keepdim=True)
    counted, differs = mixed == least, mixed.isinf().any(dim, keepdim=True)
    centres = []
    for array in (y, x):
        if array.shape[dim] == 1 and mixed.shape[dim] == 1:
            centres.append(array)
            continue
        wide, mask = torch.broadcast_tensors(array, counted)
        # Average the differences from the smallest centre, so that the mean of equal centres is exactly that
        # centre.
        base = torch.where(mask, wide, math.inf).amin(dim, keepdim=True)
        offset = torch.where(mask, wide - base, 0.0)
        centres.append(rounded(base + offset.sum(dim, keepdim=True) / mask.sum(dim, keepdim=True)))
        differs = differs | (offset != 0).any(dim, keepdim=True)
    return (*map(compress, centres), compress(least + step * differs))


def reduce_positions(
    source: Positions, dims: Sequence[int], *, keepdim: bool, step: float = GLOBAL_MIX_COUNT
) -> Positions:
    """Return the positions of a tensor that is summed, averaged or otherwise reduced.

    Args:
        source: positions of the operand
        dims: the reduced axes
        keepdim: whether these axes stay, with size 1
        step: see `average_centres`
    """
    parts = list(source.parts)
    for dim in dims:
        parts = [average_centres(part, dim, step) for part in parts]
    shape = [1 if dim in dims else size for dim, size in enumerate(source.shape)]
    found = Positions(
        tuple(shape),
        select_centres(parts),
        merge_receptive_fields(collapse(source.reach, dims)),
        source.doubts,
    )
    if keepdim:
        return found
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    return found.map([shape[dim] for dim in kept], lambda t: t.reshape([t.shape[dim] for dim in kept]))


def broadcast_positions(operands: Sequence[Positions], shape: Sequence[int]) -> Positions:
    """Return the positions of a tensor whose elements depend on one element of every operand, as broadcast."""
    lifted = [
        operand.map(shape, lambda array: array.reshape((1,) * (len(shape) - array.ndim) + tuple(array.shape)))
        for operand in operands
    ]
    if len(lifted) == 1:
        return lifted[0]
    return Positions(
        tuple(shape),
        select_centres([arrays for operand in lifted for arrays in operand.parts]),
        merge_receptive_fields([arrays for operand in lifted for arrays in operand.reach]),
        frozenset().union(*(operand.doubts for operand in lifted)),
    )


def concatenate_positions(found: Sequence[Positions], dim: int) -> Positions:
    """Return the positions of tensors that are concatenated along an axis."""

    def join(arrays: Sequence[Tensor], blank: float) -> Tensor:
        common = torch.broadcast_shapes(*((*a.shape[:dim], 1, *a.shape[dim + 1 :]) for a in arrays))
        lengths = [positions.shape[dim] for positions in found]
        wide = [
            array.expand([*common[:dim], length, *common[dim + 1 :]])
            for array, length in zip(arrays, lengths, strict=True)
        ]
        return torch.cat(wide, dim)

    first = found[0].shape
    length = sum(positions.shape[dim] for positions in found)
    return _combined(found, (*first[:dim], length, *first[dim + 1 :]), join)


def view_positions(sources: Sequence[tuple[tuple, Positions]], view: Tensor) -> Positions:
    """Return the positions of a view from those of other views of the same memory.

    Args:
        sources: other views as `(size, stride, offset)`, and their positions; later ones overwrite earlier ones
        view: the view
    """
    size = view.untyped_storage().nbytes() // view.element_size()

    def read(arrays: Sequence[Tensor], blank: float) -> Tensor:
        memory = torch.full((size,), blank, dtype=torch.float64, device="cpu")
        for (place, _), array in zip(sources, arrays, strict=True):
            memory.as_strided(*place).copy_(array.expand(place[0]))
        return memory.as_strided(view.shape, view.stride(), view.storage_offset()).contiguous()

    return _combined([positions for _, positions in sources], tuple(view.shape), read)


def _combined(
    sources: Sequence[Positions], shape: Shape, combine: Callable[[Sequence[Tensor], float], Tensor]
) -> Positions:
    """Combine positions array by array; where a source has no array, a blank one takes its place."""

    def arrays(name: str, number: int) -> Arrays:
        result = []
        for index, blank in enumerate(EMPTY_VALUES[name]):
            own = []
            for positions in sources:
                group = getattr(positions, name)
                empty = torch.full((1,) * len(positions.shape), blank, dtype=torch.float64, device="cpu")
                own.append(group[number][index] if number < len(group) else empty)
            result.append(compress(combine(own, blank)))
        return tuple(result)

    parts, reach = (
        [arrays(name, number) for number in range(max(len(getattr(source, name)) for source in sources))]
        for name in EMPTY_VALUES
    )
    doubts = frozenset().union(*(source.doubts for source in sources))
    return Positions(shape, select_centres(parts), merge_receptive_fields(reach), doubts)


def merge_receptive_fields(reach: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Combine reaches that count together: one for each set of axes along which they vary."""
    found: dict[frozenset[int], Arrays] = {}
    for arrays in reach:
        key = _pattern(arrays)
        if key in found and found[key] is not arrays:
            arrays = tuple(torch.minimum(a, b) for a, b in zip(found[key], arrays, strict=True))
        found[key] = arrays
    return tuple(found.values())


def select_centres(parts: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Reduce alternative centres to those that vary along most axes, and of equal ones to the less mixed."""
    found: dict[frozenset[int], list[Arrays]] = {}
    for arrays in parts:
        group = found.setdefault(_pattern(arrays), [])
        for index, other in enumerate(group):
            group[index], *left = _less_mixed(other, arrays)
            if not left:
                break
            (arrays,) = left
        else:
            group.append(arrays)
        if len(group) > MOST_PARTS:
            last = group.pop()
            group[-1] = (*_between(group[-1], last), torch.minimum(group[-1][2], last[2]))
    for key in sorted(found, key=len):
        wider = [other for other in found if key < other]
        for other in wider:
            found[other] = [_filled(arrays, found[key][0]) for arrays in found[other]]
        if wider:
            del found[key]
    return tuple(arrays for group in found.values() for arrays in group)


def _pattern(arrays: Arrays) -> frozenset[int]:
    return frozenset(dim for array in arrays for dim, size in enumerate(array.shape) if size > 1)


def _between(first: Arrays, second: Arrays) -> list[Tensor]:
    return [compress(rounded((one + two) / 2)) for one, two in zip(first[:2], second[:2], strict=True)]


def _less_mixed(first: Arrays, second: Arrays) -> list[Arrays]:
    """Return the less mixed of two centres, element by element; their mean or both if equally mixed."""
    if first is second:
        return [first]
    a, b = first[2], second[2]
    pairs = list(zip(first[:2], second[:2], strict=True))
    if all(torch.equal(one, two) for one, two in pairs):
        return [(first[0], first[1], compress(torch.minimum(a, b)))]
    if bool((a < b).all()):
        return [first]
    if bool((b < a).all()):
        return [second]
    if torch.equal(a, b):
        return (
            [(*_between(first, second), a)] if all(_are_close(*pair) for pair in pairs) else [first, second]
        )
    both = [
        tuple(compress(torch.where(condition, one, two)) for one, two in zip(first, second, strict=True))
        for condition in (a <= b, a < b)
    ]
    return both if any(not torch.equal(*pair) for pair in zip(*both, strict=True)) else both[:1]


def _are_close(one: Tensor, two: Tensor) -> bool:
    """Return whether two arrays of centres differ by at most half the distance between neighbours."""
    steps = [one.diff(dim=dim).abs().max().item() for dim, size in enumerate(one.shape) if size > 1]
    return (one - two).abs().max().item() <= max(steps, default=0.0) / 2


def _filled(arrays: Arrays, other: Arrays) -> Arrays:
    """Return centres in which elements without one take it from `other`."""
    empty = arrays[2].isinf()
    if not bool(empty.any()):
        return arrays
    return tuple(compress(torch.where(empty, two, one)) for one, two in zip(arrays, other, strict=True))
