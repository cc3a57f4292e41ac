"""Layouts: conversions of a module's output into a feature map `(B, C, h, w)`.

Spatial axes and prefix tokens are measured, not declared. The network runs on two image sizes and two batch
sizes: the axes that grow with the image are its height and width. Prefix tokens are recognised by their
positions in the image (see `positions`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from afterimage.models.encoders.positions import GLOBAL_MIX_COUNT, Positions

MAX_REDUCTION = 128
"""Largest reduction of a feature map; a single location for an image of ordinary size is the result of
pooling."""
ROUND = 64
"""Steps per pixel to which positions of tokens are rounded before the rows of a grid are compared."""
Size = tuple[int, int]
Shape = tuple[int, ...]
Key = tuple[int | str, ...]
Shapes = list[tuple[Key, Shape]]


class NotAFeatureMap(Exception):
    """Error for a module output that is not a feature map; the message gives the reason."""


@dataclass(frozen=True)
class Layout:
    """The position and shape of a feature map in a module's output.

    Attributes:
        axes: order of the tensor's axes: `NCHW`, `NHWC`, `NLC` or `NCL` (L for tokens), `NC` for a vector
        channels: number of channels
        height: locations from top to bottom
        width: locations from left to right
        prefix: tokens before the map's
        key: indices, keys and field names that lead to the tensor
        suffix: tokens after the map's
    """

    axes: str
    channels: int
    height: int
    width: int
    prefix: int = 0
    key: Key = ()
    suffix: int = 0

    def __call__(self, output: Any) -> Tensor:
        """Return the feature map `(B, C, h, w)` of a module's output, as a view if possible."""
        for step in self.key:
            output = output_items(output)[step]
        if self.axes == "NC":
            return output[:, :, None, None]
        if self.axes == "NHWC":
            return output.permute(0, 3, 1, 2)
        if self.axes == "NLC":
            output = output.transpose(1, 2)
        if self.axes in ("NLC", "NCL"):
            locations = output[:, :, self.prefix : output.shape[2] - self.suffix]
            return locations.unflatten(2, (self.height, self.width))
        return output


def tensors(output: Any, key: Key = ()) -> list[tuple[Key, Tensor]]:
    """List every tensor in a module's output, with the keys, indices and field names that lead to it.

    `key` are those that led to the output itself.
    """
    if isinstance(output, Tensor):
        return [(key, output)]
    return [found for step, item in output_items(output).items() for found in tensors(item, (*key, step))]


def output_items(output: Any) -> dict[int | str, Any]:
    """Return the items of a module's output by key, index or field name; empty for a tensor or any other leaf."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    if isinstance(output, SimpleNamespace):
        return dict(vars(output))
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return {}


def reorder(model: nn.Module, path: str) -> Callable[[Tensor], Tensor] | None:
    """Return a function that puts a module's tokens into raster order if the model uses another order.

    Hiera unrolls its tokens so that pooling is a maximum over contiguous tokens (Ryali et al. 2023). They
    can be rolled back, into (B, h, w, C), only after a whole block.

    Args:
        model: the model
        path: path of the module

    Returns:
        the function, or None if the tokens are in raster order

    Raises:
        NotAFeatureMap: the order of this module's tokens is not known
    """
    if not path or not hasattr(model, "reroll") or path.partition(".")[0] == "patch_embed":
        return None
    stem, _, index = path.rpartition(".")
    if stem == "blocks" and index.isdigit():
        return functools.partial(model.reroll.forward, block_idx=int(index))
    raise NotAFeatureMap(
        "its tokens are not in raster order; take patch_embed or a whole block, blocks.0 and on"
    )


def find_vector(first: Shapes, second: Shapes) -> Layout | None:
    """Return the layout of one vector per image, `(B, C)` or `(B, C, 1, 1)`; None for any other output.

    The arguments are the first two of `find_layout`.
    """
    if len(first) != 1 or len(second) != 1:
        return None
    (key, shape), (_, later) = first[0], second[0]
    if (shape[:1], later[:1], shape[1:]) != ((1,), (2,), later[1:]) or shape[2:] not in ((), (1, 1)):
        return None
    return Layout("NCHW" if shape[2:] else "NC", shape[1], 1, 1, key=key)


def find_layout(
    first: Shapes,
    second: Shapes,
    sizes: tuple[Size, Size],
    prefix: int | None = None,
    prefers_nhwc: bool = False,
    positions: Mapping[Key, Positions | None] | None = None,
) -> Layout:
    """Find the layout of a module's output, from its tensors on one image and on two images of another size.

    Args:
        first: keys and shapes of the tensors in the first pass
        second: the same in the second pass
        sizes: `(height, width)` of the images of both passes
        prefix: number of prefix tokens that the model declares, or None
        prefers_nhwc: whether NHWC is preferred if both passes had the same size and the shapes fit both
            orders
        positions: positions in the image of the first pass's tensors; they take precedence over shapes

    Raises:
        NotAFeatureMap: no tensor, or more than one, is a feature map
    """
    later, positions = dict(second), positions or {}
    found: dict[Layout, None] = {}
    reasons: dict[str, None] = {} if first else {"it returns no tensor": None}
    for key, shape in first:
        try:
            if key not in later:
                raise NotAFeatureMap("what it returns changes with the image's size")
            by_positions = (
                _layout_from_positions(key, shape, positions.get(key))
                if _is_batch(shape, later[key])
                else None
            )
            found[by_positions or _layout(key, shape, later[key], sizes, prefix, prefers_nhwc)] = None
        except NotAFeatureMap as reason:
            reasons[f"{'x'.join(map(str, shape)) or 'a single number'}: {reason}"] = None
    if len(found) == 1:
        return next(iter(found))
    if found:
        maps = ", ".join(f"{layout.channels}x{layout.height}x{layout.width}" for layout in found)
        raise NotAFeatureMap(
            f"it returns {len(found)} feature maps ({maps}); take a module inside it that returns one"
        )
    raise NotAFeatureMap("; ".join(reasons))


def _layout(
    key: Key, shape: Shape, later: Shape, sizes: tuple[Size, Size], prefix: int | None, prefers_nhwc: bool
) -> Layout:
    if not shape:
        raise NotAFeatureMap("it has no axis of the batch")
    if not _is_batch(shape, later):
        raise NotAFeatureMap("its first axis is not the batch (windows, or a table)")
    if len(shape) == 2:
        raise NotAFeatureMap("a vector has no locations")
    both, found = (shape, later), []
    if len(shape) == 4:
        for axes, channel, row, column in (("NCHW", 1, 2, 3), ("NHWC", 3, 1, 2)):
            grids = [(s[row], s[column]) for s in both]
            if shape[channel] == later[channel] and all(map(_is_grid, grids, sizes)) and _grows(grids, sizes):
                found.append(Layout(axes, shape[channel], *grids[0], key=key))
        if prefers_nhwc:
            found.reverse()
    if len(shape) == 3 and sizes[0] == sizes[1] and prefix is None:
        raise NotAFeatureMap(
            "which of its tokens lie where in the image cannot be measured, and their number does not tell"
        )
    if len(shape) == 3:
        for axes, channel, token, skipped in (("NLC", 2, 1, prefix or 0), ("NLC", 2, 1, 0), ("NCL", 1, 2, 0)):
            grids = [_grid(s[token] - skipped, size) for s, size in zip(both, sizes, strict=True)]
            if shape[channel] == later[channel] and all(grids) and _grows(grids, sizes):
                found.append(Layout(axes, shape[channel], *grids[0], prefix=skipped, key=key))
    if not found:
        raise NotAFeatureMap(
            "no axes of it grow with the image's height and width as a map's, or a grid of tokens, do"
        )
    return found[0]


def _is_batch(shape: Shape, later: Shape) -> bool:
    return len(shape) == len(later) and (shape[:1], later[:1]) == ((1,), (2,))


def _layout_from_positions(key: Key, shape: Shape, positions: Positions | None) -> Layout | None:
    """Find the layout of tokens from their positions in the image; None if positions do not decide it.

    Raises:
        NotAFeatureMap: the tokens that have positions are not a grid in raster order
    """
    if positions is None or len(shape) != 3 or not positions.centres:
        return None
    centres = [tuple(array.expand(shape)[0] for array in centre) for centre in positions.centres]
    varies = {
        axis
        for centre in positions.centres
        for array in centre
        for axis, size in enumerate(array.shape)
        if size > 1
    }
    if len(varies) != 1:
        return None
    (axis,) = varies
    y, x, mixed = (
        array.select(2 - axis, 0) for array in min(centres, key=lambda centre: centre[2].min().item())
    )
    # Other tokens, such as class tokens, are averaged over the whole image.
    in_map = mixed < mixed.min() + GLOBAL_MIX_COUNT / 2
    y, x = ((array * ROUND).round() for array in (y, x))
    rows, columns = y[in_map].unique(), x[in_map].unique()
    indices = in_map.nonzero().flatten()
    first, count = int(indices[0]), len(indices)
    if (len(rows), len(columns)) == (1, 1) and count > 1:
        return None  # all tokens depend on the whole image in the same way
    grid = torch.cartesian_prod(rows, columns) if count == len(rows) * len(columns) else None
    if (
        int(indices[-1]) != first + count - 1
        or grid is None
        or not torch.equal(grid.reshape(-1, 2), torch.stack([y[in_map], x[in_map]], 1))
    ):
        raise NotAFeatureMap("its tokens are not in raster order")
    return Layout(
        "NLC" if axis == 1 else "NCL",
        shape[3 - axis],
        len(rows),
        len(columns),
        prefix=first,
        key=key,
        suffix=len(in_map) - first - count,
    )


def _is_grid(grid: Size, size: Size) -> bool:
    """Return whether a grid has the image's aspect ratio, up to the effects of padding.

    A grid with a reduction above `MAX_REDUCTION` is the result of pooling and is rejected.
    """
    if not all(grid) or (size[0] == size[1] and grid[0] != grid[1]):
        return False
    reduction = math.sqrt(math.prod(size) / math.prod(grid))
    return reduction <= MAX_REDUCTION and all(
        abs(g - s / reduction) <= max(1.5, 0.1 * g) for g, s in zip(grid, size, strict=True)
    )


def _grows(grids: list[Size], sizes: tuple[Size, Size]) -> bool:
    """Return whether a grid grows along each axis about as much as the image.

    The aspect ratio alone cannot exclude the attention maps of square images, which grow with the image's
    area.
    """
    (before, after), (small, large) = grids, sizes
    return all(
        a == b if s1 == s2 else a < b and 0.6 <= (b / a) / (s2 / s1) <= 1.6
        for a, b, s1, s2 in zip(before, after, small, large, strict=True)
    )


def _grid(count: int, size: Size) -> Size | None:
    """Find the grid `(h, w)` of `count` locations that is closest to the aspect ratio of an image `(height, width)`.

    None if no grid is within one location of it.
    """
    if count < 1:
        return None
    reduction = math.sqrt(math.prod(size) / count)
    height, width = (s / reduction for s in size)
    candidates = [(h, count // h) for h in range(max(1, int(height) - 1), int(height) + 3) if count % h == 0]
    candidates = [c for c in candidates if abs(c[0] - height) < 1 and abs(c[1] - width) < 1]
    return min(candidates, key=lambda c: abs(c[0] - height) + abs(c[1] - width), default=None)
