"""Examine facts about images that affect the meaning of their scores: range of values, and size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

NARROW = 64
"""Largest span of values, of 0 to 255, that counts as narrow: a quarter of the range, over which an error that is the
same share of the contrast scores 12 dB higher. Photographs span twice as much: the narrowest of 900 spans 139."""
FEW = 16
"""Largest number of different values (4 bits) for which an image counts as a mask or drawing, not a photograph."""


class Facts(NamedTuple):
    """Facts about a decoded image before it is resized.

    Attributes:
        low, high: least and greatest value of its channels, 0 to 255
        levels: number of different values
        flat: 1 if all its pixels are equal, otherwise 0
        width, height: sides in pixels
    """

    low: int
    high: int
    levels: int
    flat: int
    width: int
    height: int


def examine(image: Image.Image) -> Facts:
    """Return the facts about an RGB image."""
    used = np.array(image.histogram()).reshape(3, 256) > 0
    values = np.flatnonzero(used.any(0))
    return Facts(int(values[0]), int(values[-1]), len(values), int(used.sum() == 3), *image.size)


def value_notes(parts: Mapping[str, Int[np.ndarray, "_ 6"]]) -> list[str]:
    """Return notes on images, `Facts` of each by split, whose range of values changes the meaning of their scores."""
    low, high, levels, flat, width, height = np.concatenate(list(parts.values())).T
    span, flat = high - low, flat == 1
    narrow = ~flat & (span <= NARROW)
    few = ~flat & ~narrow & (levels <= FEW) & (width * height > 256)  # smaller images have few values anyway
    notes = []
    if flat.any():
        notes.append(f"of one colour each, with nothing to bring back: {_share(flat, parts)}")
    if narrow.any():
        gain = 20 * math.log10(255 / np.median(span[narrow]))
        notes.append(
            f"narrow range of values: {_share(narrow, parts)} use only values from {low[narrow].min()} to "
            f"{high[narrow].max()} of 0 to 255, {levels[narrow].max()} different ones an image at most. PSNR and SSIM "
            "measure against the whole range: an error that is the same share of an image's contrast scores "
            f"{gain:.0f} dB higher here, so do not compare these scores with those of other images"
        )
    if few.any():
        notes.append(
            f"few values: {_share(few, parts)} use {_range(levels[few])} of the 256 levels, as masks and drawings do"
        )
    return notes


def size_notes(parts: Mapping[str, Int[np.ndarray, " _"]], size: int) -> list[str]:
    """Return a note on images, given by shorter side in pixels and split, that are enlarged to `size`, if any are."""
    sides = np.concatenate(list(parts.values()))
    small = sides < size
    if not small.any():
        return []
    most, usual = size / sides[small].min(), size / np.median(sides[small])
    return [
        f"enlarged: {_share(small, parts)}, the side {most:.3g} times at most (median {usual:.3g}): their shorter side "
        f"has {_range(sides[small])} pixels and is made {size}"
    ]


def _share(chosen: Bool[np.ndarray, " _"], parts: Mapping[str, np.ndarray]) -> str:
    """Return a text such as `12 of 40 images (3 of 8 test images)`; `chosen` is a mask over all parts in order."""
    text = f"{chosen.sum():,} of {len(chosen):,} images"
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    test = dict(zip(parts, np.split(chosen, ends), strict=True)).get("test")
    return (
        text if test is None or len(parts) == 1 else f"{text} ({test.sum():,} of {len(test):,} test images)"
    )


def _range(numbers: np.ndarray) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"
