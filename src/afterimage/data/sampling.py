"""Random order of images and random crops, as pure functions.

Each draw is a hash of its purpose, seed, epoch and image index. Resuming a run, grouping runs or spreading them over
processes therefore changes nothing. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afterimage.config import size_pair

_MASK = 2**64 - 1
_ORDER, _CROP = 1, 2


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `n` images in an epoch, a permutation of 0 to n - 1 as `(n,)` int64."""
    return np.argsort(_hash(np.arange(n), _ORDER, seed, epoch), kind="stable")


def crop_places(
    heights: np.ndarray,
    widths: np.ndarray,
    crop: int | tuple[int, int],
    indices: np.ndarray,
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw random crops, uniformly over all places where they fit.

    Args:
        heights, widths: sides of each image in pixels
        crop: height and width of the crops in pixels, or the side of square crops
        indices: indices of the images
        seed, epoch: seed of the draws, and number of the epoch

    Returns:
        top and left in pixels, and whether to flip, for each image
    """
    bits = _hash(indices, _CROP, seed, epoch)
    high = (bits >> np.uint64(33)).astype(np.int64)
    low = ((bits >> np.uint64(2)) & np.uint64(2**31 - 1)).astype(np.int64)
    height, width = size_pair(crop)
    top = (high * (heights - height + 1)) >> 31
    left = (low * (widths - width + 1)) >> 31
    return top, left, (bits & np.uint64(1)).astype(bool)


def centre_places(
    heights: np.ndarray, widths: np.ndarray, crop: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return top and left of centre crops in pixels, rounded half to even as by torchvision's CenterCrop."""
    pairs = zip((heights, widths), size_pair(crop), strict=True)
    return tuple(np.rint((sides - side) / 2).astype(np.int64) for sides, side in pairs)


def fitting_sides(
    heights: np.ndarray | int, widths: np.ndarray | int, crop: tuple[int, int]
) -> np.ndarray | np.int64:
    """Return the shorter side of the largest box with the crop's aspect ratio in each image, in whole pixels.

    For square crops this is the image's shorter side.
    """
    height, width = crop
    short = min(crop)
    return np.minimum(heights * short // height, widths * short // width)


def _hash(numbers: Sequence[int] | np.ndarray, purpose: int, seed: int, epoch: int) -> np.ndarray:
    key = 0
    for part in (purpose, seed, epoch):
        key = int(_mix(np.array([(key ^ part) & _MASK], np.uint64))[0])
    return _mix(_mix(np.asarray(numbers).astype(np.uint64)) ^ np.uint64(key))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
