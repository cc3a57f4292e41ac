"""Decode, then refine: inversion that starts from what a decoder made of the features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.invert.config import InvertConfig
from afterimage.invert.optimise import Inversion, invert
from afterimage.reconstructor import Reconstructor

Images = Float[Tensor, "batch 3 height width"]


def refine(
    reconstructor: Reconstructor,
    images: Images,
    *,
    steps: int | None = None,
    method: InvertConfig | None = None,
    **options: Any,
) -> Inversion:
    """Encode `images`, decode them, and search on from there for pictures with the same features.

    `steps` overrides the config's; other options are `invert`'s. The decoder's own time is not in `seconds`.
    """
    config = method or InvertConfig()
    config = config if steps is None else replace(config, steps=steps)
    with torch.no_grad():
        targets = [target.clone() for target in reconstructor.encoders(images)]
        start = reconstructor.head(targets)
    with differentiable(reconstructor.encoders) as features_of:
        return invert(features_of, targets, tuple(images.shape[-2:]), start=start, method=config, **options)


@contextlib.contextmanager
def differentiable(encoders: nn.Module) -> Iterator[Callable[[Images], Sequence[Tensor]]]:
    """Inside the block, an `Encoder` or `Encoders` whose features can be differentiated by the pictures."""
    with contextlib.ExitStack() as stack:
        for encoder in getattr(encoders, "encoders", [encoders]):
            stack.enter_context(encoder.gradients())
        yield encoders
