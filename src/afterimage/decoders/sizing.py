"""Decoders at a given number of parameters, so that layers can be compared at equal capacity."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from afterimage.config import AfterimageError, FeatureSpec
from afterimage.decoders.base import Decoder

TOLERANCE = 0.05


def options_for(
    cls: type[Decoder],
    specs: Sequence[FeatureSpec],
    image_size: tuple[int, int],
    parameters: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Options with which `cls` has `parameters` parameters, within 5 %.

    Raises `AfterimageError` that names the nearest size where none fits.
    """
    if cls.size_option is None:
        raise AfterimageError(f"{cls.__name__} has one size only; leave out parameters")

    def count(**chosen: Any) -> int:
        with torch.device("meta"):
            decoder = cls(specs, image_size, **(options | chosen))
        return sum(p.numel() for p in decoder.parameters())

    low, high = 1, 2
    while count(**{cls.size_option: high * cls.size_step}) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count(**{cls.size_option: middle * cls.size_step}) < parameters:
            low = middle
        else:
            high = middle
    candidates = [{cls.size_option: units * cls.size_step} for units in (low, high)]
    if cls.fine_option is not None and cls.fine_option not in options:
        default = inspect.signature(cls).parameters[cls.fine_option].default
        candidates += [c | {cls.fine_option: default * k / 16} for c in candidates for k in range(8, 33)]
    best = min(candidates, key=lambda chosen: abs(count(**chosen) - parameters))
    size = count(**best)
    if abs(size - parameters) > TOLERANCE * parameters:
        raise AfterimageError(
            f"{cls.__name__} cannot be built with {parameters:,} parameters for {specs[0].source}: "
            f"the nearest is {size:,}"
        )
    return options | best
