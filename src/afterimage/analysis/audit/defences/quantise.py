"""Defences that send values with few bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afterimage.analysis.audit.defences.base import Map, Part, Wire, by_channel
from afterimage.config import AfterimageError, FeatureSpec


class Quantise(Part):
    """Uniform quantisation to `bits` bits between each channel's smallest and largest value in `fit`.

    Inside that range the error is at most half a step, `(max - min) / (2^bits - 1) / 2`; values outside it
    are clipped. Gradients pass straight through (Bengio et al. 2013).
    """

    usage = "intBITS (int2 to int16, for example int8)"
    learns = True

    def __init__(self, spec: FeatureSpec, bits: int) -> None:
        super().__init__(spec)
        if not 2 <= bits <= 16:
            raise AfterimageError(f"a defence int{bits} is out of range; write {self.usage}, or 1bit")
        self.bits = bits
        self.register_buffer("low", torch.zeros(spec.channels))
        self.register_buffer("step", torch.ones(spec.channels))

    def learn(self, maps: Map) -> None:
        values = maps.transpose(0, 1).flatten(1)
        self.low.copy_(values.amin(1))
        step = (values.amax(1) - self.low) / (2**self.bits - 1)
        self.step.copy_(torch.where(step > 0, step, torch.ones_like(step)))  # constant channels have step 0

    def codes(self, maps: Map) -> Tensor:
        """Return the integers to send, from 0 to 2^bits - 1, `(B, C, h, w)`."""
        scaled = (maps - by_channel(self.low, maps)) / by_channel(self.step, maps)
        return scaled.round().clamp(0, 2**self.bits - 1).to(torch.int32)

    def values(self, codes: Tensor) -> Map:
        """Return the feature values of codes."""
        return codes * by_channel(self.step, codes) + by_channel(self.low, codes)

    def encode(self, maps: Map) -> Map:
        return _StraightThrough.apply(maps, self.values(self.codes(maps)).to(maps.dtype))

    def wire(self, wire: Wire) -> Wire:
        return replace(wire, bits=self.bits)


class OneBit(Part):
    """One bit per value, set above its channel's mean; it decodes to the mean of all values on that side.

    This is the two-level quantiser with the means of the two sides as levels (Lloyd 1982, eq. 5, with the
    threshold at the mean). Gradients pass straight through.
    """

    usage = "1bit"
    learns = True

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__(spec)
        for name in ("threshold", "below", "above"):
            self.register_buffer(name, torch.zeros(spec.channels))

    def learn(self, maps: Map) -> None:
        values = maps.transpose(0, 1).flatten(1)
        mean = values.mean(1)
        self.threshold.copy_(mean)
        high = values > mean[:, None]
        for name, chosen in (("below", ~high), ("above", high)):
            count = chosen.sum(1)
            level = (values * chosen).sum(1) / count.clamp(min=1)
            getattr(self, name).copy_(torch.where(count > 0, level, mean))

    def encode(self, maps: Map) -> Map:
        high = maps > by_channel(self.threshold, maps)
        levels = torch.where(high, by_channel(self.above, maps), by_channel(self.below, maps))
        return _StraightThrough.apply(maps, levels.to(maps.dtype))

    def wire(self, wire: Wire) -> Wire:
        return replace(wire, bits=1)


class _StraightThrough(torch.autograd.Function):
    """Function that replaces values and passes the gradient on unchanged."""

    @staticmethod
    def forward(ctx, maps, replaced):
        return replaced.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
