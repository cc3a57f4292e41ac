"""Decoders, one family per file; `DECODERS` lists them all."""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from afterimage.config import AfterimageError, FeatureSpec, absolute_model, unknown_choice_error
from afterimage.models.decoders.base import Decoder
from afterimage.models.decoders.custom import CustomDecoder, DiffusersDecoder
from afterimage.models.decoders.frequency import FrequencyDecoder
from afterimage.models.decoders.linear import LinearDecoder
from afterimage.models.decoders.residual import ResidualDecoder
from afterimage.models.decoders.transposed import AttentionDecoder, TransposedDecoder
from afterimage.models.decoders.wavelet import WaveletDecoder

MAX_OPTION = 2**24
"""Largest magnitude of a numeric option, since configurations may come from strangers. No useful width, depth
or kernel is larger.
"""
TOLERANCE = 0.05
"""Accepted relative deviation from the requested number of parameters."""
MAX_STEPS = 2**16
"""Largest size that is tried for a requested number of parameters, in steps of the family's size option."""

DECODERS: dict[str, type[Decoder]] = {
    "attention": AttentionDecoder,
    "transposed": TransposedDecoder,
    "linear": LinearDecoder,
    "wavelet": WaveletDecoder,
    "frequency": FrequencyDecoder,
    "residual": ResidualDecoder,
}
"""Decoder families by name."""

EXTERNAL_DECODERS: dict[str, type[CustomDecoder]] = {"python": CustomDecoder, "diffusers": DiffusersDecoder}
"""Families of decoders from outside this package, which are named `PROVIDER/NAME`."""

EXTERNAL_NAME_FORMATS = ("python/package.module:factory", "python/FILE.py:factory", "diffusers/ID_OR_FOLDER")
"""Forms of such names, for error messages."""


def decoder_family(name: str) -> type[Decoder]:
    """Return the class of a decoder.

    Args:
        name: a key of `DECODERS`, or a name in one of the forms of `EXTERNAL_NAME_FORMATS`

    Raises:
        AfterimageError: there is no such decoder; the message lists the valid ones
    """
    family = EXTERNAL_DECODERS.get(name.partition("/")[0]) if "/" in name else DECODERS.get(name)
    if family is None:
        raise unknown_choice_error("decoder", name, [*DECODERS, *EXTERNAL_NAME_FORMATS])
    return family


def decoder_digest(name: str) -> str:
    """Return the SHA-256 of the code or weight file of a decoder from outside; empty for one of `DECODERS`.

    Raises:
        AfterimageError: the file does not exist
    """
    family = decoder_family(name)
    return family.digest(name) if issubclass(family, CustomDecoder) else ""


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
        name: a key of `DECODERS`, or a name in one of the forms of `EXTERNAL_NAME_FORMATS`
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
    is_custom = issubclass(cls, CustomDecoder)
    accepted = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in accepted and not is_custom:
            raise unknown_choice_error(f"option of the {name} decoder", option, accepted)
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
                options |= _sizes(cls, tuple(specs), size, parameters, options)
            if is_custom:
                return cls(tuple(specs), size, name=absolute_model(name), options=options)
            return cls(tuple(specs), size, **options)
        except (TypeError, ValueError) as error:
            raise AfterimageError(f"the {name} decoder cannot be built with {options}: {error}") from None


def _sizes(
    cls: type[Decoder],
    specs: Sequence[FeatureSpec],
    image_size: tuple[int, int],
    parameters: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Choose options, beside those given, with which a decoder has a number of parameters, within 5 %.

    Raises:
        AfterimageError: the family has a fixed size, its size option is given in `options`, or no size fits;
            the message names the nearest size
    """
    if cls.size_option is None:
        raise AfterimageError(f"{cls.__name__} has one size only; omit parameters")
    if cls.size_option in options:
        raise AfterimageError(
            f"{cls.size_option} is chosen so that {cls.__name__} has {parameters:,} parameters: give one of the two"
        )

    def count(chosen: dict[str, Any]) -> int:
        with torch.device("meta"):
            decoder = cls(specs, image_size, **(options | chosen))
        return sum(p.numel() for p in decoder.parameters())

    def nearest(fixed: dict[str, Any]) -> dict[str, Any]:
        sizes = [fixed | {cls.size_option: cls.size_step * steps} for steps in range(1, MAX_STEPS)]
        above = bisect.bisect_left(sizes, parameters, key=count)
        candidates = sizes[max(0, above - 1) : above + 1]
        if cls.fine_option is not None and cls.fine_option not in options:
            default = inspect.signature(cls).parameters[cls.fine_option].default
            candidates += [c | {cls.fine_option: default * k / 16} for c in candidates for k in range(8, 33)]
        return min(candidates, key=lambda chosen: abs(count(chosen) - parameters))

    best = nearest({})
    too_large = count(best) > (1 + TOLERANCE) * parameters
    if too_large and cls.fallback_options and not cls.fallback_options.keys() & options.keys():
        best = nearest(cls.fallback_options)
    if abs(count(best) - parameters) > TOLERANCE * parameters:
        raise AfterimageError(
            f"{cls.__name__} cannot be built with {parameters:,} parameters for {specs[0].source}: "
            f"the nearest is {count(best):,}"
        )
    return best
