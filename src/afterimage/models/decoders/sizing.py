"""Build decoders with a given number of parameters, so that layers are compared at equal capacity."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from afterimage.config import AfterimageError, FeatureSpec
from afterimage.models.decoders.base import Decoder

TOLERANCE = 0.05
"""Accepted relative deviation from the requested number of parameters."""


def options_for(
    cls: type[Decoder],
    specs: Sequence[FeatureSpec],
    image_size: tuple[int, int],
    parameters: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Choose options with which a decoder has a given number of parameters, within 5 %.

    Args:
        cls: the decoder family
        specs: shapes of the features
        image_size: `(height, width)` of the images in pixels
        parameters: requested number of parameters
        options: options that are already given

    Returns:
        `options` and the chosen ones

    Raises:
        AfterimageError: the family has a fixed size, its size option is given in `options`, or no size fits;
            the message names the nearest size
    """
    if cls.size_option is None:
        raise AfterimageError(f"{cls.__name__} has one size only; leave out parameters")
    if cls.size_option in options:
        raise AfterimageError(
            f"{cls.size_option} is chosen so that {cls.__name__} has {parameters:,} parameters: give one of the two"
        )

    def count(chosen: dict[str, Any]) -> int:
        with torch.device("meta"):
            decoder = cls(specs, image_size, **(options | chosen))
        return sum(p.numel() for p in decoder.parameters())

    best, size = _nearest(cls, count, parameters, options, {})
    if size > (1 + TOLERANCE) * parameters and cls.smaller and not cls.smaller.keys() & options.keys():
        best, size = _nearest(cls, count, parameters, options, cls.smaller)
    if abs(size - parameters) > TOLERANCE * parameters:
        raise AfterimageError(
            f"{cls.__name__} cannot be built with {parameters:,} parameters for {specs[0].source}: "
            f"the nearest is {size:,}"
        )
    return options | best


def _nearest(
    cls: type[Decoder],
    count: Callable[[dict[str, Any]], int],
    parameters: int,
    options: dict[str, Any],
    fixed: dict[str, Any],
) -> tuple[dict[str, Any], int]:
    """Find the options, including `fixed`, whose size is nearest to `parameters`; return both."""

    def at(units: int) -> dict[str, Any]:
        return fixed | {cls.size_option: units * cls.size_step}

    low, high = 1, 2
    while count(at(high)) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count(at(middle)) < parameters:
            low = middle
        else:
            high = middle
    candidates = [at(low), at(high)]
    if cls.fine_option is not None and cls.fine_option not in options:
        default = inspect.signature(cls).parameters[cls.fine_option].default
        candidates += [c | {cls.fine_option: default * k / 16} for c in candidates for k in range(8, 33)]
    sizes = [count(chosen) for chosen in candidates]
    nearest = min(range(len(candidates)), key=lambda i: abs(sizes[i] - parameters))
    return candidates[nearest], sizes[nearest]
