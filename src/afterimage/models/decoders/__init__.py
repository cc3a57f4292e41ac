"""Decoders, one family in each file; `DECODERS` lists them all."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from afterimage.config import AfterimageError, FeatureSpec, unknown
from afterimage.models.decoders.attention import AttentionDecoder
from afterimage.models.decoders.base import Decoder
from afterimage.models.decoders.frequency import FrequencyDecoder
from afterimage.models.decoders.linear import LinearDecoder
from afterimage.models.decoders.residual import ResidualDecoder
from afterimage.models.decoders.sizing import options_for
from afterimage.models.decoders.transposed import TransposedDecoder
from afterimage.models.decoders.wavelet import WaveletDecoder

MAX_OPTION = 2**24
"""Largest magnitude of an option: no useful width, depth or kernel is larger, and configurations may come from
strangers.
"""

DECODERS: dict[str, type[Decoder]] = {
    "attention": AttentionDecoder,
    "transposed": TransposedDecoder,
    "linear": LinearDecoder,
    "wavelet": WaveletDecoder,
    "frequency": FrequencyDecoder,
    "residual": ResidualDecoder,
}
"""The decoder families by name."""


def create_decoder(
    name: str,
    specs: Sequence[FeatureSpec],
    image_size: int | tuple[int, int] = 224,
    *,
    seed: int | None = None,
    parameters: int | None = None,
    **options: Any,
) -> Decoder:
    """Create a decoder for features of given shapes.

    Args:
        name: a key of `DECODERS`
        specs: measured shapes of the features
        image_size: side of the images in pixels, or `(height, width)`
        seed: seed of the initial weights, which then depend on nothing else; None draws from torch's global
            generator
        parameters: number of parameters to build it at, within 5 %; None for the family's default size
        options: options of the family

    Returns:
        the decoder, from feature maps `(B, C, h, w)` to images `(B, 3, H, W)` in [0, 1]

    Raises:
        AfterimageError: the family or an option is unknown, with the valid ones, or the options do not fit the
            features
    """
    if name not in DECODERS:
        raise unknown("decoder", name, DECODERS)
    cls = DECODERS[name]
    accepted = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in accepted:
            raise unknown(f"option of the {name} decoder", option, accepted)
        if isinstance(options[option], int | float) and not abs(options[option]) <= MAX_OPTION:
            raise AfterimageError(
                f"{option} of the {name} decoder must be at most {MAX_OPTION:,}, got {options[option]!r}"
            )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            if parameters is not None:
                options = options_for(cls, tuple(specs), size, parameters, options)
            return cls(tuple(specs), size, **options)
        except (TypeError, ValueError) as error:
            raise AfterimageError(f"the {name} decoder cannot be built with {options}: {error}") from None
