"""Noise on the values of features."""

from __future__ import annotations

import math

import torch

from afterimage.analysis.audit.defences.base import Map, Part, Wire, by_channel, number
from afterimage.config import FeatureSpec


class Noise(Part):
    """Gaussian noise of `scale` times each channel's standard deviation over images and locations.

    Noise is drawn anew on every call, so a receiver can average it away if an image is sent several times.
    """

    usage = "noise:SCALE (of each channel's standard deviation, for example noise:0.5)"
    learns = True
    is_random = True

    def __init__(self, spec: FeatureSpec, scale: int | float) -> None:
        super().__init__(spec)
        self.scale = number(self, scale, 0.0, math.inf)
        self.register_buffer("std", torch.ones(spec.channels))

    def learn(self, maps: Map) -> None:
        """Measure each channel's standard deviation."""
        self.std.copy_(maps.transpose(0, 1).flatten(1).std(1))

    def encode(self, maps: Map) -> Map:
        drawn = torch.randn(maps.shape, generator=self.generator).to(maps)
        return maps + self.scale * by_channel(self.std, maps) * drawn

    def wire(self, wire: Wire) -> Wire:
        return Wire(self.spec.values)
