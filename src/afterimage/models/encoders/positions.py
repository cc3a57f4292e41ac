"""Positions in the image of each element of a tensor, and rules to combine several positions.

For every element of a tensor that depends on the image, the centre of its receptive field is tracked:
`position_tracing` carries these centres through a network's operations. The values of weights do not matter, so
the result is exact and the same for every seed.

Attention and global pools see the whole image and have no position of their own; an element keeps the position
that it had before them. An element with several candidate centres takes one that varies between elements; among
those, the one that was averaged with its neighbours least often.
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
"""Amount that attention or a global pool adds to `mixed`, the number of times that a centre was averaged; a window
adds 1. It exceeds any number of windows.
"""
PADDING_MIX_COUNT = 2.0**40
"""Amount that padding adds to `mixed` of its elements, which have a position but depend on no pixel yet."""
MAX_CENTRES = 4
"""Largest number of candidate centres that vary along the same axes; beyond it, two are averaged."""
EMPTY_VALUES = {"centres": (0.0, 0.0, math.inf), "receptive_field": (math.inf,) * 4}
"""Values for elements without a centre, and for elements that depend on no pixel."""


@dataclass(frozen=True)
class Positions:
    """The positions of a tensor's elements. Arrays have size 1 along axes on which they are constant.

    Attributes:
        shape: shape of the tensor
        centres: candidate centres `(y, x, mixed)`: the position in pixels, and the number of times that it was
            averaged with its neighbours, which is infinite for elements without a centre
        receptive_field: boxes `(top, left, -bottom, -right)` in pixels that an element depends on, infinite if
            there is none; several boxes count together
        unknown_operations: operations whose effect on positions is unknown
    """

    shape: Shape
    centres: tuple[Arrays, ...]
    receptive_field: tuple[Arrays, ...]
    unknown_operations: frozenset[str] = frozenset()

    def map(self, shape: Sequence[int], change: Callable[[Tensor], Tensor]) -> Positions:
        """Apply a change to every array; the result describes a tensor of `shape`."""
        centres, receptive_field = (
            tuple(tuple(change(array) for array in arrays) for arrays in group)
            for group in (self.centres, self.receptive_field)
        )
        return Positions(tuple(shape), centres, receptive_field, self.unknown_operations)

    def with_shape(self, shape: Sequence[int]) -> Positions:
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
    """Return the positions of the result of an operation whose effect is unknown.

    The result has no centres and depends on everything that its sources depend on.
    """
    operations = frozenset({operation}).union(*(source.unknown_operations for source in sources))
    return Positions(
        tuple(shape),
        (),
        merge_receptive_fields(
            [merge_elements(box, shape) for source in sources for box in source.receptive_field]
        ),
        operations,
    )


def merge_elements(box: Arrays, shape: Sequence[int]) -> Arrays:
    """Return one box for all elements of a tensor of `shape`, which covers the boxes of all elements of another."""
    return tuple(array.amin().reshape((1,) * len(shape)) for array in box)


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


def collapse(boxes: Sequence[Arrays], dims: Sequence[int]) -> list[Arrays]:
    """Return the boxes of elements that depend on all elements along some axes."""
    for dim in dims:
        boxes = [
            tuple(a.amin(dim, keepdim=True) if a.shape[dim] > 1 else a for a in arrays) for arrays in boxes
        ]
    return list(boxes)


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


def average_centres(centres: Arrays, dim: int, step: float = 1.0) -> Arrays:
    """Average centres along an axis.

    Args:
        centres: `(y, x, mixed)`; only those with the smallest `mixed` are averaged
        dim: the axis
        step: amount added to `mixed` if the centres differ
    """
    y, x, mixed = centres
    if all(array.shape[dim] == 1 for array in centres):
        return centres
    least = mixed.amin(dim, keepdim=True)
    counted, differs = mixed == least, mixed.isinf().any(dim, keepdim=True)
    averaged = []
    for array in (y, x):
        if array.shape[dim] == 1 and mixed.shape[dim] == 1:
            averaged.append(array)
            continue
        wide, mask = torch.broadcast_tensors(array, counted)
        # Average the differences from the smallest centre, so that the mean of equal centres is exactly that
        # centre.
        base = torch.where(mask, wide, math.inf).amin(dim, keepdim=True)
        offset = torch.where(mask, wide - base, 0.0)
        averaged.append(rounded(base + offset.sum(dim, keepdim=True) / mask.sum(dim, keepdim=True)))
        differs = differs | (offset != 0).any(dim, keepdim=True)
    return (*map(compress, averaged), compress(least + step * differs))


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
    centres = list(source.centres)
    for dim in dims:
        centres = [average_centres(candidate, dim, step) for candidate in centres]
    shape = [1 if dim in dims else size for dim, size in enumerate(source.shape)]
    reduced = Positions(
        tuple(shape),
        select_centres(centres),
        merge_receptive_fields(collapse(source.receptive_field, dims)),
        source.unknown_operations,
    )
    if keepdim:
        return reduced
    remaining = [dim for dim in range(len(shape)) if dim not in dims]
    return reduced.map(
        [shape[dim] for dim in remaining], lambda t: t.reshape([t.shape[dim] for dim in remaining])
    )


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
        select_centres([arrays for operand in lifted for arrays in operand.centres]),
        merge_receptive_fields([arrays for operand in lifted for arrays in operand.receptive_field]),
        frozenset().union(*(operand.unknown_operations for operand in lifted)),
    )


def concatenate_positions(pieces: Sequence[Positions], dim: int) -> Positions:
    """Return the positions of tensors that are concatenated along an axis."""

    def join(arrays: Sequence[Tensor], blank: float) -> Tensor:
        common = torch.broadcast_shapes(*((*a.shape[:dim], 1, *a.shape[dim + 1 :]) for a in arrays))
        lengths = [piece.shape[dim] for piece in pieces]
        wide = [
            array.expand([*common[:dim], length, *common[dim + 1 :]])
            for array, length in zip(arrays, lengths, strict=True)
        ]
        return torch.cat(wide, dim)

    first = pieces[0].shape
    length = sum(piece.shape[dim] for piece in pieces)
    return _combined(pieces, (*first[:dim], length, *first[dim + 1 :]), join)


def view_positions(sources: Sequence[tuple[tuple, Positions]], view: Tensor) -> Positions:
    """Return the positions of a view from those of other views of the same memory.

    Args:
        sources: other views as `(size, stride, offset)`, and their positions; later ones overwrite earlier ones
        view: the view
    """
    size = view.untyped_storage().nbytes() // view.element_size()

    def read(arrays: Sequence[Tensor], blank: float) -> Tensor:
        memory = torch.full((size,), blank, dtype=torch.float64, device="cpu")
        for (strides, _), array in zip(sources, arrays, strict=True):
            memory.as_strided(*strides).copy_(array.expand(strides[0]))
        return memory.as_strided(view.shape, view.stride(), view.storage_offset()).contiguous()

    return _combined([positions for _, positions in sources], tuple(view.shape), read)


def _combined(
    sources: Sequence[Positions], shape: Shape, combine: Callable[[Sequence[Tensor], float], Tensor]
) -> Positions:
    """Combine positions array by array; an array that a source lacks is replaced by `EMPTY_VALUES`."""

    def arrays(name: str, number: int) -> Arrays:
        result = []
        for index, blank in enumerate(EMPTY_VALUES[name]):
            inputs = []
            for positions in sources:
                group = getattr(positions, name)
                empty = torch.full((1,) * len(positions.shape), blank, dtype=torch.float64, device="cpu")
                inputs.append(group[number][index] if number < len(group) else empty)
            result.append(compress(combine(inputs, blank)))
        return tuple(result)

    centres, receptive_field = (
        [arrays(name, number) for number in range(max(len(getattr(source, name)) for source in sources))]
        for name in EMPTY_VALUES
    )
    operations = frozenset().union(*(source.unknown_operations for source in sources))
    return Positions(shape, select_centres(centres), merge_receptive_fields(receptive_field), operations)


def merge_receptive_fields(boxes: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Merge the boxes of a receptive field that vary along the same axes into one that covers them."""
    merged: dict[frozenset[int], Arrays] = {}
    for arrays in boxes:
        key = _varying_axes(arrays)
        if key in merged and merged[key] is not arrays:
            arrays = tuple(torch.minimum(a, b) for a, b in zip(merged[key], arrays, strict=True))
        merged[key] = arrays
    return tuple(merged.values())


def select_centres(centres: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Reduce candidate centres to those that vary along most axes, and of equal ones to the less mixed."""
    found: dict[frozenset[int], list[Arrays]] = {}
    for arrays in centres:
        group = found.setdefault(_varying_axes(arrays), [])
        for index, other in enumerate(group):
            group[index], *left = _less_mixed(other, arrays)
            if not left:
                break
            (arrays,) = left
        else:
            group.append(arrays)
        if len(group) > MAX_CENTRES:
            last = group.pop()
            group[-1] = (*_mean_centre(group[-1], last), torch.minimum(group[-1][2], last[2]))
    for key in sorted(found, key=len):
        wider = [other for other in found if key < other]
        for other in wider:
            found[other] = [_fill_missing(arrays, found[key][0]) for arrays in found[other]]
        if wider:
            del found[key]
    return tuple(arrays for group in found.values() for arrays in group)


def _varying_axes(arrays: Arrays) -> frozenset[int]:
    return frozenset(dim for array in arrays for dim, size in enumerate(array.shape) if size > 1)


def _mean_centre(first: Arrays, second: Arrays) -> list[Tensor]:
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
            [(*_mean_centre(first, second), a)]
            if all(_are_close(*pair) for pair in pairs)
            else [first, second]
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


def _fill_missing(arrays: Arrays, other: Arrays) -> Arrays:
    """Return centres in which elements without one take it from `other`."""
    empty = arrays[2].isinf()
    if not bool(empty.any()):
        return arrays
    return tuple(compress(torch.where(empty, two, one)) for one, two in zip(arrays, other, strict=True))
