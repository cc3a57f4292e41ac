"""Canvas: the rectangle of the image plane that the cells of a feature map cover.

A cell is the block of pixels that belongs to one location of the map. The canvas may have another size and position
than the image; this module transfers pixels between both.
"""

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

MAX_ROUNDING = 0.5
"""Largest shift of a cell in pixels by rounding the stride to a whole number, and once more by rounding the start;
decoders learn to compensate for it.
"""


@dataclass(frozen=True)
class Span:
    """The cells of a map along one axis of an image.

    Stride and start are rounded to whole pixels if rounding the stride moves no cell by more than `MAX_ROUNDING`.

    Attributes:
        count: number of cells
        size: length of the image in pixels
        start: position in pixels at which the first cell begins
        stride: length of a cell in pixels
        even: whether the cells divide the image evenly
    """

    count: int
    size: int
    start: float
    stride: float
    even: bool = False

    @classmethod
    def of(cls, axis: Axis | None, count: int, size: int) -> Span:
        """Create the span for an axis of a feature spec.

        Cells that begin before the image or end after it are moved inwards, as long as each location's
        middle stays in its cell: padded convolutions put the first location at the first pixel, although the
        pixels that it depends on lie further inside (docs/LOG.md).

        Args:
            axis: positions of the locations; None if their cells divide the image evenly
            count: number of locations
            size: length of the image in pixels

        Raises:
            AfterimageError: the cells lie outside the image
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
        if whole < 1 or abs(drift) > MAX_ROUNDING:
            span = cls(count, size, start, stride)
            return even if max(abs(start), abs(span.end - size)) <= MAX_ROUNDING else span
        near = {math.floor(start + drift), math.ceil(start + drift)}
        span = max(
            (
                cls(count, size, float(place), float(whole))
                for place in near
                if abs(place - start - drift) <= MAX_ROUNDING
            ),
            key=lambda span: (min(span.end, size) - max(span.start, 0), -abs(span.start)),
        )
        return even if (span.start, span.end) == (0, size) else span

    @property
    def end(self) -> float:
        """Position in pixels at which the last cell ends."""
        return self.start + self.count * self.stride

    @property
    def whole(self) -> bool:
        """True if each pixel of the canvas is a pixel of the image."""
        return self.even or self.stride == int(self.stride)

    @property
    def pixels(self) -> int:
        """Length of the canvas in pixels: the image's if even, else the stride, rounded up, for each cell."""
        return self.size if self.even else self.count * math.ceil(self.stride)

    @property
    def inside(self) -> tuple[int, int]:
        """Range of the image's pixels whose middle lies in a cell; the end is excluded."""
        return max(0, math.ceil(self.start - 0.5)), min(self.size, math.ceil(self.end - 0.5))

    @property
    def cells(self) -> tuple[int, int]:
        """Range of the cells that contain a pixel of the image; the end is excluded."""
        if self.even:
            return 0, self.count
        first, last = ((pixel - self.start) / self.stride for pixel in self.inside)
        return math.floor(first), math.ceil(last)

    def inside_mask(self, block: int) -> Bool[Tensor, "count block"]:
        """Return a mask of the parts of each cell, `block` of equal length, whose middle lies inside the image."""
        parts = torch.arange(self.count * block, dtype=torch.float64, device="cpu") + 0.5
        middles = self.start + parts * (self.stride / block)
        return ((middles > 0) & (middles < self.size)).view(self.count, block)

    def to_image(self, canvas: Tensor, dim: int) -> Tensor:
        """Sample the canvas at the image's pixels in the range `inside`, along its axis `dim`."""
        first, last = self.inside
        if self.whole:
            return canvas.narrow(dim, first - int(self.start), last - first)
        scale = self.pixels / (self.end - self.start)
        return interpolate_axis(
            canvas, [(x + 0.5 - self.start) * scale - 0.5 for x in range(first, last)], dim
        )

    def from_image(self, images: Tensor, dim: int) -> Tensor:
        """Sample the image along its axis `dim` at the canvas' pixels; outside, the outermost pixels are repeated."""
        if self.even:
            return images
        scale = (self.end - self.start) / self.pixels
        return interpolate_axis(
            images, [self.start + (x + 0.5) * scale - 0.5 for x in range(self.pixels)], dim
        )


class Canvas:
    """The position of a feature map's cells in images; transfers pixels between cells and images.

    A decoder fills only the cells, `size` pixels in all. `place` puts them into the image and extrapolates to
    pixels outside all cells; `cut` does the reverse for a given image. If the cells divide the image evenly,
    the canvas is the image.

    Args:
        spec: shape of the features
        image_size: `(height, width)` of the images in pixels
    """

    def __init__(self, spec: FeatureSpec, image_size: tuple[int, int]) -> None:
        self.image_size = tuple(image_size)
        self.rows = Span.of(spec.rows, spec.height, image_size[0])
        self.columns = Span.of(spec.columns, spec.width, image_size[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the canvas in pixels."""
        return self.rows.pixels, self.columns.pixels

    @property
    def even(self) -> bool:
        """True if the cells divide the image evenly, so that the canvas is the image."""
        return self.rows.even and self.columns.even

    @property
    def whole(self) -> bool:
        """True if canvas pixels are pixels of the image's grid, with the same number in every cell."""
        spans = (self.rows, self.columns)
        return all(span.whole and span.pixels % span.count == 0 for span in spans)

    def place(self, canvas: Float[Tensor, "batch c _ _"]) -> Float[Tensor, "batch c height width"]:
        """Return the images of canvases `(B, C, h, w)`; `extrapolate` fills in pixels outside all cells."""
        images = self.columns.to_image(self.rows.to_image(canvas, -2), -1)
        return extrapolate(images, (self.rows.inside, self.columns.inside), self.image_size)

    def cut(self, images: Float[Tensor, "batch c height width"]) -> Float[Tensor, "batch c _ _"]:
        """Return the canvases of images; parts of cells outside the image repeat its outermost pixels."""
        return self.columns.from_image(self.rows.from_image(images, -2), -1)

    def crop(self, crop: FeatureCrop) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Find the part of a crop of a `whole` canvas that lies in the image.

        Returns:
            the part's rows and columns in the crop, and its rows and columns in the image
        """
        top, left, height, width = crop
        within, pixels = [], []
        for span, place, length in ((self.rows, top, height), (self.columns, left, width)):
            block, start = span.pixels // span.count, 0 if span.even else int(span.start)
            first = start + place * block
            inside = max(0, first), min(span.size, first + length * block)
            within.append(slice(inside[0] - first, inside[1] - first))
            pixels.append(slice(*inside))
        return tuple(within), tuple(pixels)


def visible_box(
    specs: Sequence[FeatureSpec], image_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Find the rows and the columns of images on which at least one of several maps depends.

    Args:
        specs: shapes of the features
        image_size: `(height, width)` of the images in pixels

    Returns:
        `((top, bottom), (left, right))` with the ends excluded; None for the whole image
    """

    def seen(axes: list[Axis | None], length: int) -> tuple[int, int]:
        if None in axes:
            return 0, length
        return min(axis.first for axis in axes), max(axis.last for axis in axes)

    rows = seen([spec.rows for spec in specs], image_size[0])
    columns = seen([spec.columns for spec in specs], image_size[1])
    return None if (rows[1] - rows[0], columns[1] - columns[0]) == tuple(image_size) else (rows, columns)


def interpolate_axis(maps: Tensor, indices: list[float], dim: int) -> Tensor:
    """Interpolate maps linearly along an axis at fractional indices; beyond the ends, use the outermost value."""
    last = maps.shape[dim] - 1
    positions = torch.tensor(indices, dtype=torch.float64, device="cpu").clamp(0, last)
    low = positions.floor().long()
    share = (positions - low).to(maps.dtype)
    low = low.to(maps.device)
    if not share.any():
        return maps.index_select(dim, low)
    shape = [1] * maps.ndim
    shape[dim] = len(indices)
    one, two = maps.index_select(dim, low), maps.index_select(dim, (low + 1).clamp(max=last))
    return one.lerp(two, share.to(maps.device).view(shape))


def extrapolate(
    images: Float[Tensor, "batch c _ _"],
    inside: tuple[tuple[int, int], tuple[int, int]],
    size: tuple[int, int],
) -> Float[Tensor, "batch c height width"]:
    """Extrapolate images smoothly to the pixels outside a box.

    The extrapolation is the harmonic function with the box's outermost pixels as border values and zero slope
    at the image's border. If an image's power falls with the square of the frequency, as in photographs
    (Field 1987), this is the mean of all continuations; fine detail along the border fades first. Right and
    left are extrapolated first, then above and below.

    Args:
        images: the pixels of the box `(B, C, h, w)`
        inside: rows and columns of the box in the full images, ends excluded
        size: height and width of the full images

    Returns:
        `(B, C, height, width)`
    """
    for dim, (first, last), length in ((-1, inside[1], size[1]), (-2, inside[0], size[0])):
        for after, missing in ((True, length - last), (False, first)):
            if missing:
                images = _extrapolate_axis(images, missing, dim, after)
    return images


def _extrapolate_axis(images: Tensor, missing: int, dim: int, after: bool) -> Tensor:
    """Extrapolate by `missing` pixels along one axis, after the last pixels or before the first."""
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
    """Return the matrices that map a border of `length` pixels to the pixels at distance 1 to `missing`."""
    index = torch.arange(length, dtype=torch.float64, device="cpu")
    # Cosines are the waves along the border with zero slope at its ends.
    waves = torch.cos(math.pi / length * index[:, None] * (index + 0.5))
    waves *= math.sqrt(2 / length)
    waves[0] *= math.sqrt(0.5)
    steps = torch.arange(1, missing + 1, dtype=torch.float64, device="cpu")[:, None]
    pitch = math.pi / length * index
    # cosh(pitch * (missing + 1/2 - step)) / cosh(pitch * (missing + 1/2)), written so that it cannot
    # overflow.
    depth = missing + 0.5
    fading = torch.exp(-pitch * steps) * (1 + torch.exp(-2 * pitch * (depth - steps)))
    fading /= 1 + torch.exp(-2 * pitch * depth)
    return torch.einsum("ki,dk,kj->dij", waves, fading, waves).float()
