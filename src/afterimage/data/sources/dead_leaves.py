"""Procedural images of dead leaves, the simplest model that has the statistics of natural images.

Opaque shapes of all sizes cover one another. The result is scale invariant, so its power spectrum falls about
as 1/f^2, and has many occlusion edges (Lee, Mumford and Huang, "Occlusion models for natural images", 2001).
Shapes other than discs, colours, shading, textures and shadows are added in the spirit of Baradad et al.,
"Learning to see by looking at noise", 2021, so that trained decoders carry over to photographs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from afterimage.config import AfterimageError
from afterimage.data.originals import Content, FileDigests, Original
from afterimage.data.sampling import Source

VERSION = 1
COVERAGE = 5.0  # mean number of leaves over a point; bare points (0.7 %) count as part of leaf 0
OVERSAMPLING = 2
DEFAULT_COUNT = 1000
MAX_COUNT = 1_000_000


def dead_leaves(series: int, index: int, width: int, height: int) -> Image.Image:
    """Draw image `index` of a series, `width` x `height` pixels, as a pure function of the arguments."""
    random = np.random.Generator(np.random.Philox(key=[series, index]))
    radii = _radii(random, width, height)
    leaves = _paint(random, radii, width, height)
    flat = Image.fromarray(_colours(random, len(radii))[leaves]).reduce(OVERSAMPLING)
    near = np.ascontiguousarray(leaves[::OVERSAMPLING, ::OVERSAMPLING])
    light = _shading(random, near, radii) + _texture(random, near, 0.12) + _illumination(random, near.shape)
    image = np.asarray(flat, np.float32) / 255 * (np.exp(light) * _shadow(random, near))[..., None]
    image += _texture(random, near, 0.03)[..., None] * _chroma(random)
    # Blur slightly: a lens does not resolve single pixels.
    sharp = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
    return sharp.filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.5)))


def _radii(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw the radii in pixels of all leaves that reach into the image, with density r^-3 between two cutoffs.

    A leaf reaches into the image from up to its radius away, so the density of the drawn radii is
    (w + 2r)(h + 2r) r^-3.
    """
    smallest = 2.0 * 4 ** random.random()
    largest = max(0.7 * max(width, height), 2 * smallest)
    grid = np.geomspace(smallest, largest, 256)
    density = (width + 2 * grid) * (height + 2 * grid) * grid**-3
    cumulative = np.concatenate([[0], np.cumsum(np.diff(grid) * (density[1:] + density[:-1]) / 2)])
    # Coverage is the rate of leaves times their mean area: the integral of pi r^2 r^-3.
    count = math.ceil(COVERAGE / (math.pi * math.log(largest / smallest)) * cumulative[-1])
    return np.interp(random.random(count) * cumulative[-1], cumulative, grid)


def _paint(random: np.random.Generator, radii: np.ndarray, width: int, height: int) -> np.ndarray:
    """Paint the leaves, later ones in front.

    Returns:
        index into `radii` of the leaf that is visible at each pixel, `(height, width)` times `OVERSAMPLING`
    """
    count = len(radii)
    x = random.random(count) * (width + 2 * radii) - radii
    y = random.random(count) * (height + 2 * radii) - radii
    corners = random.choice([0, 0, 0, 3, 4, 4, 5, 6], count)  # none: a disc
    x, y, r = x * OVERSAMPLING, y * OVERSAMPLING, radii * OVERSAMPLING
    discs = np.stack([x - r, y - r, x + r, y + r], 1).tolist()
    polygons = _polygons(random, x, y, r, np.maximum(corners, 3)).tolist()
    canvas = Image.new("I", (width * OVERSAMPLING, height * OVERSAMPLING), 0)
    draw = ImageDraw.Draw(canvas)
    for leaf, n in enumerate(corners.tolist()):
        if n == 0:
            draw.ellipse(discs[leaf], fill=leaf)
        else:
            draw.polygon(polygons[leaf][: 2 * n], fill=leaf)
    return np.asarray(canvas)


def _polygons(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, radii: np.ndarray, corners: np.ndarray
) -> np.ndarray:
    """Create stretched, rotated regular polygons of the discs' areas: `(count, 12)`, x and y of up to six corners."""
    turn = random.random(len(x)) * 2 * math.pi
    stretch = np.exp(random.normal(0, 0.2, len(x)))
    radii = radii * np.sqrt(2 * math.pi / (corners * np.sin(2 * math.pi / corners)))
    angle = 2 * math.pi * (np.arange(6) + 0.5) / corners[:, None]
    u = (radii * stretch)[:, None] * np.cos(angle)
    v = (radii / stretch)[:, None] * np.sin(angle)
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    return np.stack([x[:, None] + u * cos - v * sin, y[:, None] + u * sin + v * cos], 2).reshape(-1, 12)


def _chroma(random: np.random.Generator) -> np.ndarray:
    """Draw a direction in RGB that keeps luminance constant; orange and blue are likelier than green."""
    warm, green = random.normal(0, [1, 0.45])
    blue, red = -warm - green, 0.8 * warm - green
    return np.array([1.4 * red, -0.34 * blue - 0.71 * red, 1.77 * blue], np.float32)


def _colours(random: np.random.Generator, count: int) -> np.ndarray:
    """Draw the leaves' colours `(count, 3)` uint8: luminance varies most, chroma is limited to five hues per image."""
    luminance = random.uniform(0.3, 0.6) + random.uniform(0.1, 0.25) * random.normal(0, 1, count)
    luminance = np.clip(luminance, 0.03, 0.97)
    hues = np.stack([_chroma(random) for _ in range(5)]) * random.uniform(0.01, 0.1)
    chroma = hues[random.integers(0, len(hues), count)] * random.gamma(2, 0.5, count)[:, None]
    # Dark leaves cannot be as colourful as bright ones.
    colours = luminance[:, None] + chroma * np.sqrt(2 * luminance)[:, None]
    return (np.clip(colours, 0, 1) * 255 + 0.5).astype(np.uint8)


def _shading(random: np.random.Generator, near: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Draw a linear gradient over each leaf, in log light, with a range that does not depend on the leaf's size."""
    slope_x, slope_y = (random.normal(0, 0.15, (2, len(radii))) / radii).astype(np.float32)
    level = random.normal(0, 0.1, len(radii)).astype(np.float32)
    y, x = _places(near)
    # Centre the gradient on a leaf's visible part: the leaf's own centre may lie outside of the image.
    flat, seen = near.ravel(), np.maximum(np.bincount(near.ravel(), minlength=len(radii)), 1)
    middle_x = (np.bincount(flat, x.ravel(), len(radii)) / seen).astype(np.float32)
    middle_y = (np.bincount(flat, y.ravel(), len(radii)) / seen).astype(np.float32)
    gradient = slope_x[near] * (x - middle_x[near]) + slope_y[near] * (y - middle_y[near])
    return np.clip(gradient, -0.5, 0.5) + level[near]


def _texture(random: np.random.Generator, near: np.ndarray, strength: float) -> np.ndarray:
    """Draw texture in log light: noise with a strength of its own for each leaf, or stripes on some leaves."""
    count = int(near.max()) + 1
    noise = _noise(random, near.shape, random.uniform(0.6, 1.4)).ravel()
    shift = random.integers(0, noise.size, count)
    amplitude = (strength * random.gamma(0.7, 1, count)).astype(np.float32)
    turn = random.random(count) * 2 * math.pi
    frequency = 2 * math.pi / np.exp(random.uniform(math.log(3), math.log(24), count))
    striped = random.random(count) < 0.12
    place = np.arange(noise.size).reshape(near.shape)
    field = noise[(place + shift[near]) % noise.size]
    y, x = _places(near)
    mask = striped[near]
    leaf = near[mask]
    wave = (np.cos(turn) * frequency)[leaf] * x[mask] + (np.sin(turn) * frequency)[leaf] * y[mask]
    field[mask] = np.sin(wave) * math.sqrt(2)
    return field * amplitude[near]


def _noise(random: np.random.Generator, shape: tuple[int, int], exponent: float) -> np.ndarray:
    """Draw periodic noise of unit variance whose amplitude falls as f^-exponent."""
    height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.standard_normal(shape)) * frequency**-exponent
    noise = np.fft.irfft2(spectrum, shape)
    return (noise / max(noise.std(), 1e-9)).astype(np.float32)


def _illumination(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw a smooth change of light over the whole image, in log light."""
    y, x = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])[None]
    a, b, c = random.normal(0, 0.15, 3)
    return (a * x + b * y - 0.5 * abs(c) * (x * x + y * y)).astype(np.float32)


def _shadow(random: np.random.Generator, near: np.ndarray) -> np.ndarray:
    """Return the share of light, at most 1, at each pixel: leaves in front cast a soft shadow on those behind."""
    behind = np.roll(near, random.integers(-4, 5, 2), (0, 1)) > near
    soft = Image.fromarray(behind.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(2))
    return 1 - np.float32(random.uniform(0, 0.6)) * behind * (np.asarray(soft, np.float32) / 255)


def _places(near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height, width = near.shape
    y = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None], near.shape)
    return y, np.broadcast_to(np.arange(width, dtype=np.float32), near.shape)


@dataclass(frozen=True, slots=True)
class DeadLeaves(Original):
    """Procedural image `index` of the series `series`."""

    series: int
    index: int

    @property
    def id(self) -> str:
        return f"dead-leaves-{self.series}-{self.index:06d}"

    def content(self, digests: FileDigests, size: int) -> Content:
        recipe = f"dead leaves {VERSION}, series {self.series}, image {self.index}, size {size}"
        return Content(hashlib.sha256(recipe.encode()).hexdigest(), size * 5 // 4, size)

    def decode_image(self, size: int, content: str) -> Image.Image:
        return dead_leaves(self.series, self.index, size * 5 // 4, size)


def read_dead_leaves(text: str, parts: Collection[str]) -> Source:
    """List procedural images; images for testing alone are a separate series. For the arguments see `SOURCES`.

    Raises:
        AfterimageError: the text is not a whole number between 1 and `MAX_COUNT`
    """
    count = text or str(DEFAULT_COUNT)
    if not (count.isascii() and count.isdigit() and len(count) <= 7 and 1 <= int(count) <= MAX_COUNT):
        raise AfterimageError(
            f"'procedural:{count}': the count must be a whole number between 1 and {MAX_COUNT:,}"
        )
    series = 0 if "train" in parts else 1
    return Source([DeadLeaves(series, index) for index in range(int(count))])
