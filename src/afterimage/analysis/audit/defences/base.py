"""What every part of a defence is, and what features cost to send."""

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
    """What one image's features cost to send: numbers of so many bits, and bits that say which they are."""

    values: int
    bits: int = 32
    index_bits: int = 0

    @property
    def bytes(self) -> int:
        return math.ceil((self.values * self.bits + self.index_bits) / 8)


class Part(nn.Module):
    """One step on one feature map. `spec` is the shape of what goes in, `sent` of what comes out of `encode`."""

    usage = ""
    learns = False
    """Whether `fit` must have seen features before it can run."""
    is_random = False
    """Whether `encode` draws anew each time, which whoever receives the features cannot repeat."""
    preserves_positions = True
    """Whether what is sent still lies where it was in the map."""
    context: ClassVar[tuple[str, ...]] = ()
    """Which of `seed` and `image_size` building the part takes besides its argument."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = self.sent = spec
        self.generator: torch.Generator | None = None
        self.register_buffer("fitted", torch.tensor(not self.learns))

    def fit(self, maps: Map) -> None:
        if self.learns:
            self.learn(maps)
            self.fitted.fill_(True)

    def learn(self, maps: Map) -> None:
        """Measure what `encode` needs on features `(N, C, h, w)`."""

    def encode(self, maps: Map) -> Map:
        return maps

    def decode(self, sent: Map) -> Map:
        return sent

    def wire(self, wire: Wire) -> Wire:
        return wire


def number(part: Part, value: int | float, low: float, high: float) -> float:
    if not (math.isfinite(value) and low < value <= high):
        raise AfterimageError(f"{type(part).__name__.lower()}:{value:g} is out of range; write {part.usage}")
    return float(value)


def by_channel(values: Tensor, maps: Tensor) -> Tensor:
    return values.to(maps.device)[:, None, None]
