"""The canvas of a feature map: the part of the plane that its cells cover, and where that lies in the image."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from afterimage.config import AfterimageError, Axis, FeatureSpec

FeatureCrop = tuple[int, int, int, int]
"""Top, left, height and width of a part of a feature map, in locations."""

ROUNDED = 0.5
"""Pixels that a cell may be moved by for a whole stride, and again for a whole start: a decoder learns that."""


@dataclass(frozen=True)
class Span:
    """The cells of a map along one axis of an image of `size` pixels: `count` of them, from `start`, `stride` wide.

    `stride` and `start` are whole numbers of pixels wherever moving no cell by more than `ROUNDED` makes the stride
    one. An `even` span is the image itself, divided by however many cells there are.
    """

    count: int
    size: int
    start: float
    stride: float
    even: bool = False

    @classmethod
    def of(cls, axis: Axis | None, count: int, size: int) -> Span:
        """The span that a spec's axis describes. Raises `AfterimageError` where it misses the image.

        Cells that begin before the image, or end behind it, are moved inwards as far as that helps while the middle
        of each location stays in its cell: padded convolutions put the first location at the first pixel, and what it
        tells is of the pixels behind (docs/LOG.md).
        """
        even = cls(count, size, 0.0, size / count, even=True)
        if axis is None:
            return even
        start, stride, end = axis.start, axis.stride, axis.start + count * axis.stride
        if stride <= 0 or min(end, size) - max(start, 0) < 1:
            raise AfterimageError(
                f"the locations of a feature map lie from pixel {start:g} to {end:g}, beside an image of {size} pixels"
            )
        most = max(0.0, (stride - 1) / 2)
        start += min(-start, most) if start < 0 else -max(0.0, min(start, end - size, most))
        whole = round(stride)
        drift = (stride - whole) * count / 2
        if whole < 1 or abs(drift) > ROUNDED:
            found = cls(count, size, start, stride)
            return even if max(abs(start), abs(found.end - size)) <= ROUNDED else found
        near = {math.floor(start + drift), math.ceil(start + drift)}
        found = max(
            (
                cls(count, size, float(place), float(whole))
                for place in near
                if abs(place - start - drift) <= ROUNDED
            ),
            key=lambda span: (min(span.end, size) - max(span.start, 0), -abs(span.start)),
        )
        return even if (found.start, found.end) == (0, size) else found

    @property
    def end(self) -> float:
        return self.start + self.count * self.stride

    @property
    def whole(self) -> bool:
        """Whether pixels of the canvas are pixels of the image."""
        return self.even or self.stride == int(self.stride)

    @property
    def pixels(self) -> int:
        """The canvas's length: that of the image, or whole pixels a cell, never fewer than the cell has."""
        return self.size if self.even else self.count * math.ceil(self.stride)

    @property
    def inside(self) -> tuple[int, int]:
        """The first pixel of the image whose middle lies in a cell, and the first one after these."""
        if self.even:
            return 0, self.size
        return max(0, math.ceil(self.start - 0.5)), min(self.size, math.ceil(self.end - 0.5))

    @property
    def cells(self) -> tuple[int, int]:
        """The first cell that holds a pixel of the image, and the first one after these."""
        if self.even:
            return 0, self.count
        first, last = ((pixel - self.start) / self.stride for pixel in self.inside)
        return math.floor(first), math.ceil(last)

    def present(self, block: int) -> Bool[Tensor, "count block"]:
        """Which of the `block` parts of each cell have their middle in the image."""
        if self.even:
            return torch.ones(self.count, block, dtype=torch.bool, device="cpu")
        parts = torch.arange(self.count * block, dtype=torch.float64, device="cpu") + 0.5
        middles = self.start + parts * (self.stride / block)
        return ((middles > 0) & (middles < self.size)).view(self.count, block)

    def to_image(self, canvas: Tensor, dim: int) -> Tensor:
        """The canvas's pixels at those of the image that lie `inside`."""
        first, last = self.inside
        if self.whole:
            return canvas.narrow(dim, first - int(self.start), last - first)
        scale = self.pixels / (self.end - self.start)
        return sample(canvas, [(x + 0.5 - self.start) * scale - 0.5 for x in range(first, last)], dim)

    def from_image(self, images: Tensor, dim: int) -> Tensor:
        """The image's pixels at those of the canvas; beyond its border its outermost ones."""
        if self.even:
            return images
        scale = (self.end - self.start) / self.pixels
        return sample(images, [self.start + (x + 0.5) * scale - 0.5 for x in range(self.pixels)], dim)


class Canvas:
    """Where the cells of one feature map lie in images, and how what a decoder makes of them gets there.

    A decoder fills the cells alone, evenly: pixels `(height, width)` in all. `place` puts them into the image and
    carries on what they show to where there is no cell; `cut` is what the cells hold of a given image. Where the
    cells divide the image evenly the canvas is the image.
    """

    def __init__(self, spec: FeatureSpec, image_size: tuple[int, int]) -> None:
        self.image_size = tuple(image_size)
        self.rows = Span.of(spec.rows, spec.height, image_size[0])
        self.columns = Span.of(spec.columns, spec.width, image_size[1])

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.pixels, self.columns.pixels

    @property
    def even(self) -> bool:
        return self.rows.even and self.columns.even

    @property
    def whole(self) -> bool:
        """Whether every pixel of the canvas is one of the image's plane, and every cell has as many."""
        spans = (self.rows, self.columns)
        return all(span.whole and span.pixels % span.count == 0 for span in spans)

    def place(self, canvas: Float[Tensor, "batch c _ _"]) -> Float[Tensor, "batch c height width"]:
        """Images from canvases. What lies in no cell is what those beside it show, carried on by `carry_on`."""
        if self.even:
            return canvas
        images = self.columns.to_image(self.rows.to_image(canvas, -2), -1)
        return carry_on(images, (self.rows.inside, self.columns.inside), self.image_size)

    def cut(self, images: Float[Tensor, "batch c height width"]) -> Float[Tensor, "batch c _ _"]:
        """Canvases from images; the part of a cell that lies beyond the border repeats the outermost pixels."""
        if self.even:
            return images
        return self.columns.from_image(self.rows.from_image(images, -2), -1)

    def crop(self, crop: FeatureCrop) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Of a crop of a `whole` canvas what lies in the image: where in the crop, and where in the image."""
        top, left, height, width = crop
        within, pixels = [], []
        for span, place, length in ((self.rows, top, height), (self.columns, left, width)):
            block, start = span.pixels // span.count, 0 if span.even else int(span.start)
            first = start + place * block
            inside = max(0, first), min(span.size, first + length * block)
            within.append(slice(inside[0] - first, inside[1] - first))
            pixels.append(slice(*inside))
        return tuple(within), tuple(pixels)


def seen_box(
    specs: Sequence[FeatureSpec], image_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The rows and the columns of images (first, and the one after the last) that any of several maps sees.

    None where that is all of them.
    """
    rows, columns = (
        (
            min(0 if axis is None else axis.first for axis in axes),
            max(length if axis is None else axis.last for axis in axes),
        )
        for axes, length in zip(
            ([spec.rows for spec in specs], [spec.columns for spec in specs]), image_size, strict=True
        )
    )
    return None if (rows, columns) == ((0, image_size[0]), (0, image_size[1])) else (rows, columns)


def sample(maps: Tensor, at: list[float], dim: int) -> Tensor:
    """Values between those of `maps` along one axis, linearly; places beyond the ends get the outermost values."""
    last = maps.shape[dim] - 1
    places = torch.tensor(at, dtype=torch.float64, device="cpu").clamp(0, last)
    low = places.floor().long()
    share = (places - low).to(maps.dtype)
    low = low.to(maps.device)
    if not share.any():
        return maps.index_select(dim, low)
    shape = [1] * maps.ndim
    shape[dim] = len(at)
    one, two = maps.index_select(dim, low), maps.index_select(dim, (low + 1).clamp(max=last))
    return one.lerp(two, share.to(maps.device).view(shape))


def carry_on(
    images: Float[Tensor, "batch c _ _"],
    inside: tuple[tuple[int, int], tuple[int, int]],
    size: tuple[int, int],
) -> Float[Tensor, "batch c height width"]:
    """Images of `size` of which the pixels `inside` (rows, then columns, the end excluded) are given.

    The rest is the smoothest continuation: the harmonic function that has the outermost given pixels as its border and
    no slope at the image's own. That is the mean of what may follow where power falls with the square of frequency,
    as it does in photographs (Field 1987): fine detail along the border fades first. Right and left come first, then
    above and below.
    """
    for dim, (first, last), length in ((-1, inside[1], size[1]), (-2, inside[0], size[0])):
        for after, missing in ((True, length - last), (False, first)):
            if missing:
                images = _continued(images, missing, dim, after)
    return images


def _continued(images: Tensor, missing: int, dim: int, after: bool) -> Tensor:
    edge = images.select(dim, -1 if after else 0)
    steps = _harmonic(edge.shape[-1], missing).to(edge.device, torch.float32)
    exact = nullcontext() if edge.is_meta else torch.autocast(edge.device.type, enabled=False)
    with exact:
        strip = torch.einsum("dij,bcj->bcdi", steps, edge.float()).to(images.dtype)
    strip = strip if after else strip.flip(-2)
    strip = strip if dim == -2 else strip.mT
    return torch.cat((images, strip) if after else (strip, images), dim)


@functools.lru_cache(maxsize=32)
def _harmonic(length: int, missing: int) -> Float[Tensor, "missing length length"]:
    """What becomes of a border of so many pixels, 1 to `missing` pixels away from it: each step a matrix."""
    index = torch.arange(length, dtype=torch.float64, device="cpu")
    # The cosines are the waves along the border that have no slope at its ends.
    waves = torch.cos(math.pi / length * index[:, None] * (index + 0.5))
    waves *= math.sqrt(2 / length)
    waves[0] *= math.sqrt(0.5)
    steps = torch.arange(1, missing + 1, dtype=torch.float64, device="cpu")[:, None]
    pitch = math.pi / length * index
    # cosh(pitch * (missing + 1/2 - step)) / cosh(pitch * (missing + 1/2)), which would overflow.
    depth = missing + 0.5
    fading = torch.exp(-pitch * steps) * (1 + torch.exp(-2 * pitch * (depth - steps)))
    fading /= 1 + torch.exp(-2 * pitch * depth)
    return torch.einsum("ki,dk,kj->dij", waves, fading, waves).float()
