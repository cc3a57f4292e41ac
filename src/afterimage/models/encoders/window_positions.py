"""Trace positions through operations with windows along an axis: convolutions, pools, interpolation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from afterimage.models.encoders.positions import (
    GLOBAL_MIX_COUNT,
    PADDING_MIX_COUNT,
    Positions,
    average_centres,
    collapse,
    compress,
    concatenate_positions,
    merge_receptive_fields,
    no_positions,
    reduce_positions,
    rounded,
    select_centres,
)

Arguments = dict[str, Any]
"""An operation's arguments by name."""


def nth(values: Sequence[int], axis: int) -> int:
    """Return an option of a convolution or pool along an axis; a single value is valid for all axes."""
    return values[axis] if len(values) > 1 else values[0]


def slide_window(
    source: Positions, dim: int, out: int, kernel: int, stride: int, padding: int, dilation: int = 1
) -> Positions:
    """Trace windows along one axis, as in a convolution or a pool.

    Padding continues the line of centres, so that a window at the border is centred at its own position and
    not at that of the pixels it sees.
    """
    size = source.shape[dim]
    if (kernel, stride, padding, out) == (1, 1, 0, size):
        return source
    starts = torch.arange(out, device="cpu") * stride - padding
    indices = starts[:, None] + torch.arange(kernel, device="cpu") * dilation
    centres = []
    for y, x, mixed in source.centres:
        windows = [_windows(array, dim, indices, size, "line") for array in (y, x)]
        orders = _reset_padding(_windows(mixed, dim, indices, size, "edge"))
        averaged = average_centres((*windows, orders), -1)
        centres.append(tuple(compress(array.squeeze(-1)) for array in averaged))
    receptive_field = [
        tuple(compress(_windows(array, dim, indices, size, "none").amin(-1)) for array in arrays)
        for arrays in source.receptive_field
    ]
    shape = [out if axis == dim else length for axis, length in enumerate(source.shape)]
    return Positions(
        tuple(shape),
        select_centres(centres),
        merge_receptive_fields(receptive_field),
        source.unknown_operations,
    )


def _reset_padding(mixed: Tensor) -> Tensor:
    """Reset the count of padded elements in windows that also hold image elements, so that both are averaged alike."""
    virtual = (mixed >= PADDING_MIX_COUNT) & mixed.isfinite()
    if not bool(virtual.any()):
        return mixed
    return torch.where(virtual & ~virtual.all(-1, keepdim=True), mixed - PADDING_MIX_COUNT, mixed)


def _windows(array: Tensor, dim: int, indices: Tensor, size: int, outside: str) -> Tensor:
    """Take windows of an array along an axis, which becomes `(out, ..., window)`.

    `outside` decides the values at `indices` beyond the ends: `line` extrapolates the values linearly, `edge`
    repeats the last one, and `none` gives infinity.
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


def trace_transposed_convolution(
    source: Positions, dim: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> Positions:
    """Trace a transposed convolution along one axis: outputs are centred between their inputs."""
    index = torch.arange(out, dtype=torch.float64, device="cpu")
    return _resampled(source, dim, (index + padding - (kernel - 1) * dilation / 2) / stride)


def _resampled(source: Positions, dim: int, where: Tensor) -> Positions:
    """Interpolate positions along an axis at the indices `where`; each then sees all pixels along it."""
    low = where.floor().clamp(0, max(source.shape[dim] - 2, 0)).long()
    share = (where - low).reshape([-1 if axis == dim else 1 for axis in range(len(source.shape))])

    def between(array: Tensor) -> Tensor:
        if array.shape[dim] == 1:
            return array
        below, above = array.index_select(dim, low), array.index_select(dim, low + 1)
        return compress(rounded(below + (above - below) * share))

    centres = []
    for y, x, mixed in source.centres:
        least = mixed.amin(dim, keepdim=True) + (y.shape[dim] > 1 or x.shape[dim] > 1)
        centres.append((between(y), between(x), least))
    shape = [len(where) if axis == dim else length for axis, length in enumerate(source.shape)]
    return Positions(
        tuple(shape),
        select_centres(centres),
        merge_receptive_fields(collapse(source.receptive_field, [dim])),
        source.unknown_operations,
    )


def trace_pool(source: Positions, name: str, given: Arguments, shape: Sequence[int]) -> Positions:
    axes = int(name[name.index("pool") + 4])
    kernel = given["kernel_size"]
    options = {"kernel": kernel, "stride": kernel, "padding": [0], "dilation": [1]}
    options |= {key: given[key] for key in ("stride", "padding", "dilation") if given.get(key)}
    for axis in range(axes):
        dim = len(shape) - axes + axis
        one = {key: nth(values, axis) for key, values in options.items()}
        source = slide_window(source, dim, shape[dim], **one)
    return source


def trace_adaptive_pool(source: Positions, shape: Sequence[int], axes: int) -> Positions:
    """Trace an adaptive pool, whose windows cover an axis as evenly as whole numbers allow."""
    for dim in range(len(shape) - axes, len(shape)):
        before, after = source.shape[dim], shape[dim]
        starts = [index * before // after for index in range(after)]
        ends = [-(-(index + 1) * before // after) for index in range(after)]
        step = 1.0 if after > 1 else GLOBAL_MIX_COUNT
        pieces = [
            reduce_positions(
                slide_window(source, dim, end - start, 1, 1, -start), [dim], keepdim=True, step=step
            )
            for start, end in zip(starts, ends, strict=True)
        ]
        source = concatenate_positions(pieces, dim)
    return source


def trace_upsampling(source: Positions, given: Arguments, shape: Sequence[int]) -> Positions:
    """Trace an interpolation to another size: centres lie on the line through their neighbours."""
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


def trace_padding(source: Positions, pad: Sequence[int]) -> Positions:
    """Trace padding, which continues a line of centres, and has no centres if they are not on a line."""
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(source.shape) - 1 - number
        size = source.shape[dim]
        if size > 1 and all(_is_line(array, dim) for centre in source.centres for array in centre[:2]):
            source = slide_window(source, dim, before + size + after, 1, 1, before)
            index = torch.arange(source.shape[dim], device="cpu") - before
            outside = (index < 0) | (index >= size)
            outside = outside.reshape([-1 if axis == dim else 1 for axis in range(len(source.shape))])
            centres = []
            for y, x, mixed in source.centres:
                if not y.shape[dim] == x.shape[dim] == 1:
                    # Count elements in padding as mixed by `PADDING_MIX_COUNT`, unless they already are.
                    virtual = torch.where(mixed < PADDING_MIX_COUNT, mixed + PADDING_MIX_COUNT, mixed)
                    mixed = compress(torch.where(outside, virtual, mixed))
                centres.append((y, x, mixed))
            source = replace(source, centres=tuple(centres))
            continue
        lengths = [
            [count if axis == dim else n for axis, n in enumerate(source.shape)] for count in (before, after)
        ]
        pieces = [no_positions(lengths[0]), source, no_positions(lengths[1])]
        source = concatenate_positions([piece for piece in pieces if piece.shape[dim]], dim)
    return source


def _is_line(array: Tensor, dim: int) -> bool:
    """Return whether an array grows by equal steps along an axis."""
    steps = array.diff(dim=dim)
    return array.shape[dim] < 3 or bool((steps == steps.narrow(dim, 0, 1)).all())
