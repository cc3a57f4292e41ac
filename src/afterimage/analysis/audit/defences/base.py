"""Base class of a defence's parts, and the cost of sending features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError, FeatureSpec

Map = Float[Tensor, "batch _ _ _"]


@dataclass(frozen=True)
class Wire:
    """Cost of sending one image's features: number of values, bits of each, and total bits of their indices."""

    values: int
    bits: int = 32
    index_bits: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes, rounded up."""
        return math.ceil((self.values * self.bits + self.index_bits) / 8)


class Part(nn.Module):
    """Part of a defence: one step on one feature map.

    Attributes:
        spec: shape of the input features
        sent: shape of the features that `encode` returns
        usage: syntax of the part, for messages
        generator: source of random numbers for experiments; None draws from the global generator
    """

    usage = ""
    learns = False
    """True if the part needs `fit` before it can run."""
    is_random = False
    """True if `encode` draws random numbers on every call, which the receiver cannot repeat."""
    context: ClassVar[tuple[str, ...]] = ()
    """Names of further arguments of the constructor, out of `seed` and `image_size`."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = self.sent = spec
        self.generator: torch.Generator | None = None
        self.register_buffer("fitted", torch.tensor(not self.learns))

    def fit(self, maps: Map) -> None:
        """Let the part learn from features `(N, C, h, w)` if it learns at all."""
        if self.learns:
            self.learn(maps)
            self.fitted.fill_(True)

    def learn(self, maps: Map) -> None:
        """Measure the statistics that `encode` and `decode` need on features `(N, C, h, w)`."""

    def encode(self, maps: Map) -> Map:
        """Return the features to send for features `(B, C, h, w)`."""
        return maps

    def decode(self, sent: Map) -> Map:
        """Return features of the original shape from sent ones."""
        return sent

    def wire(self, wire: Wire) -> Wire:
        """Return the cost after this part from the cost before it."""
        return wire


def number(part: Part, value: int | float, low: float, high: float) -> float:
    """Return a part's argument as a float; raise an `AfterimageError` unless `low < value <= high`."""
    if not (math.isfinite(value) and low < value <= high):
        raise AfterimageError(f"{type(part).__name__.lower()}:{value:g} is out of range; write {part.usage}")
    return float(value)


def by_channel(values: Tensor, maps: Tensor) -> Tensor:
    """Reshape one value per channel `(C,)` for broadcasting over maps `(B, C, h, w)`, on their device."""
    return values.to(maps.device)[:, None, None]
