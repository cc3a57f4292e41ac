"""The base class of a defence's parts, and the cost of sending features."""

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
    """The cost of sending one image's features.

    Attributes:
        values: numbers that are sent
        bits: bits of each number
        index_bits: bits in all that say which numbers they are
    """

    values: int
    bits: int = 32
    index_bits: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes, rounded up."""
        return math.ceil((self.values * self.bits + self.index_bits) / 8)


class Part(nn.Module):
    """One step of a defence on one feature map.

    Attributes:
        spec: shape of the features that go in
        sent: shape of the features that `encode` returns
        usage: how the part is written, for messages
        generator: source of random numbers for experiments; None draws from the global generator
    """

    usage = ""
    learns = False
    """Whether the part needs `fit` before it can run."""
    is_random = False
    """Whether `encode` draws random numbers on every call, which the receiver of the features cannot repeat."""
    preserves_positions = True
    """Whether sent features stay at their locations in the map."""
    context: ClassVar[tuple[str, ...]] = ()
    """Which of `seed` and `image_size` the constructor takes besides its argument."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = self.sent = spec
        self.generator: torch.Generator | None = None
        self.register_buffer("fitted", torch.tensor(not self.learns))

    def fit(self, maps: Map) -> None:
        """Measure what the part needs on features `(N, C, h, w)`, if anything."""
        if self.learns:
            self.learn(maps)
            self.fitted.fill_(True)

    def learn(self, maps: Map) -> None:
        """Measure what `encode` needs on features `(N, C, h, w)`."""

    def encode(self, maps: Map) -> Map:
        """Return the features that are sent for features `(B, C, h, w)`."""
        return maps

    def decode(self, sent: Map) -> Map:
        """Return features of the original shape from sent ones."""
        return sent

    def wire(self, wire: Wire) -> Wire:
        """Return the cost after this part from the cost before it."""
        return wire


def number(part: Part, value: int | float, low: float, high: float) -> float:
    """Return an argument as a float.

    Args:
        part: the part, for the message
        value: the argument
        low: lower bound, excluded
        high: upper bound, included

    Raises:
        AfterimageError: the argument lies outside the bounds
    """
    if not (math.isfinite(value) and low < value <= high):
        raise AfterimageError(f"{type(part).__name__.lower()}:{value:g} is out of range; write {part.usage}")
    return float(value)


def by_channel(values: Tensor, maps: Tensor) -> Tensor:
    """Reshape values of channels for broadcasting.

    Args:
        values: a value for each channel `(C,)`
        maps: the maps `(B, C, h, w)` to broadcast over, which decide the device
    """
    return values.to(maps.device)[:, None, None]
