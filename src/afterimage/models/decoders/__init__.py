"""Decoders, one family per file; `DECODERS` lists them all."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from afterimage.config import AfterimageError, FeatureSpec, absolute_model, unknown
from afterimage.models.decoders.attention import AttentionDecoder
from afterimage.models.decoders.base import Decoder
from afterimage.models.decoders.frequency import FrequencyDecoder
from afterimage.models.decoders.linear import LinearDecoder
from afterimage.models.decoders.own import DiffusersDecoder, OwnDecoder
from afterimage.models.decoders.residual import ResidualDecoder
from afterimage.models.decoders.sizing import options_for
from afterimage.models.decoders.transposed import TransposedDecoder
from afterimage.models.decoders.wavelet import WaveletDecoder

MAX_OPTION = 2**24
"""Largest magnitude of a numeric option, since configurations may come from strangers. No useful width, depth
or kernel is larger.
"""

DECODERS: dict[str, type[Decoder]] = {
    "attention": AttentionDecoder,
    "transposed": TransposedDecoder,
    "linear": LinearDecoder,
    "wavelet": WaveletDecoder,
    "frequency": FrequencyDecoder,
    "residual": ResidualDecoder,
}
"""Decoder families by name."""

FOREIGN: dict[str, type[OwnDecoder]] = {"python": OwnDecoder, "diffusers": DiffusersDecoder}
"""Families of decoders from outside this package, which are named `PROVIDER/NAME`."""


SPELLINGS = ("python/package.module:factory", "python/FILE.py:factory", "diffusers/ID_OR_FOLDER")
"""Forms of such names, for error messages."""


def decoder_family(name: str) -> type[Decoder]:
    """Return the class of a decoder.

    Args:
        name: a key of `DECODERS`, or a name in one of the forms of `SPELLINGS`

    Raises:
        AfterimageError: there is no such decoder; the message lists the valid ones
    """
    family = FOREIGN.get(name.partition("/")[0]) if "/" in name else DECODERS.get(name)
    if family is None:
        raise unknown("decoder", name, [*DECODERS, *SPELLINGS])
    return family


def decoder_digest(name: str) -> str:
    """Return the SHA-256 of a foreign decoder's code or weight file; empty for one of `DECODERS`.

    Raises:
        AfterimageError: the file does not exist
    """
    family = decoder_family(name)
    return family.digest(name) if issubclass(family, OwnDecoder) else ""


def create_decoder(
    name: str,
    specs: Sequence[FeatureSpec],
    image_size: int | tuple[int, int] = 224,
    *,
    seed: int | None = None,
    parameters: int | None = None,
    **options: Any,
) -> Decoder:
    """Create a decoder for features of the given shapes.

    Args:
        name: a key of `DECODERS`, or a name in one of the forms of `SPELLINGS`
        specs: measured shapes of the features
        image_size: side of the images in pixels, or `(height, width)`
        seed: seed of the initial weights, which then depend on nothing else; None draws from torch's global
            generator
        parameters: number of parameters to build the decoder with, within 5 %; None for the family's default
            size
        options: options of the family, or of the user's factory

    Returns:
        the decoder, from feature maps `(B, C, h, w)` to images `(B, 3, H, W)` in [0, 1]

    Raises:
        AfterimageError: the family or an option is unknown (the message lists the valid ones), the options do
            not fit the features, or a user's module cannot be built or does not turn such features into such
            images
    """
    cls = decoder_family(name)
    is_own = issubclass(cls, OwnDecoder)
    accepted = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in accepted and not is_own:
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
            if is_own:
                return cls(tuple(specs), size, name=absolute_model(name), options=options)
            return cls(tuple(specs), size, **options)
        except (TypeError, ValueError) as error:
            raise AfterimageError(f"the {name} decoder cannot be built with {options}: {error}") from None
