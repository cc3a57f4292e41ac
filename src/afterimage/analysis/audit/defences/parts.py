"""Parts of defences: noise, shuffled locations, few bits, and fewer values, directions, channels or locations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError, Axis, FeatureSpec

Map = Float[Tensor, "batch _ _ _"]


@dataclass(frozen=True)
class TransmissionCost:
    """Cost of transmitting one image's features: number of values, bits per value, and total bits of their indices."""

    values: int
    bits: int = 32
    index_bits: int = 0

    @property
    def bytes(self) -> int:
        """Size in bytes, rounded up."""
        return math.ceil((self.values * self.bits + self.index_bits) / 8)


class DefenceStep(nn.Module):
    """Part of a defence: one step on one feature map.

    Attributes:
        spec: shape of the input features
        output_spec: shape of the features that `encode` returns
        usage: syntax of the part, for messages
        generator: source of random numbers for experiments; None draws from the global generator
    """

    usage = ""
    requires_fit = False
    """True if the part needs `measure_statistics` before it can run."""
    is_random = False
    """True if `encode` draws random numbers on every call, which the receiver cannot repeat."""
    preserves_positions = True
    """True if sent features stay at their locations in the map."""
    context: ClassVar[tuple[str, ...]] = ()
    """Names of further arguments of the constructor, out of `seed` and `image_size`."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec = self.output_spec = spec
        self.generator: torch.Generator | None = None

    def measure_statistics(self, maps: Map) -> None:
        """Measure the statistics that `encode` and `decode` need on features `(N, C, h, w)`."""

    def encode(self, maps: Map) -> Map:
        """Return the features to send for features `(B, C, h, w)`."""
        return maps

    def decode(self, sent: Map) -> Map:
        """Return features of the original shape from sent ones."""
        return sent

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        """Return the cost after this part from the cost before it."""
        return cost


def check_number(part: DefenceStep, value: int | float, low: float, high: float) -> float:
    """Return a part's argument as a float; raise an `AfterimageError` unless `low < value <= high`."""
    if not (math.isfinite(value) and low < value <= high):
        raise AfterimageError(f"{type(part).__name__.lower()}:{value:g} is out of range; write {part.usage}")
    return float(value)


def broadcast_channels(values: Tensor, maps: Tensor) -> Tensor:
    """Reshape one value per channel `(C,)` for broadcasting over maps `(B, C, h, w)`, on their device."""
    return values.to(maps.device)[:, None, None]


class Noise(DefenceStep):
    """Gaussian noise of `scale` times each channel's standard deviation over images and locations.

    Noise is drawn anew on every call, so a receiver can average it away if an image is sent several times.
    """

    usage = "noise:SCALE (of each channel's standard deviation, for example noise:0.5)"
    requires_fit = True
    is_random = True

    def __init__(self, spec: FeatureSpec, scale: int | float) -> None:
        super().__init__(spec)
        self.scale = check_number(self, scale, 0.0, math.inf)
        self.register_buffer("std", torch.ones(spec.channels))

    def measure_statistics(self, maps: Map) -> None:
        """Measure each channel's standard deviation."""
        self.std.copy_(maps.transpose(0, 1).flatten(1).std(1))

    def encode(self, maps: Map) -> Map:
        drawn = torch.randn(maps.shape, generator=self.generator).to(maps)
        return maps + self.scale * broadcast_channels(self.std, maps) * drawn

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        return TransmissionCost(self.spec.values)


class Shuffle(DefenceStep):
    """Random order of the locations, new for each image; the channels of a location stay together.

    `decode` does not undo it, since the order is not stored. It hardly affects networks that ignore
    positions.
    """

    usage = "shuffle"
    is_random = True
    preserves_positions = False

    def encode(self, maps: Map) -> Map:
        batch, _, height, width = maps.shape
        keys = torch.rand(batch, height * width, generator=self.generator)
        order = keys.argsort(1).to(maps.device)[:, None].expand(-1, maps.shape[1], -1)
        return maps.flatten(2).gather(2, order).view_as(maps)


class Quantise(DefenceStep):
    """Uniform quantisation to `bits` bits between each channel's smallest and largest value in `fit`.

    Inside that range the error is at most half a step, `(max - min) / (2^bits - 1) / 2`; values outside it
    are clipped. Gradients pass straight through (Bengio et al. 2013).
    """

    usage = "intBITS (int2 to int16, for example int8)"
    requires_fit = True

    def __init__(self, spec: FeatureSpec, bits: int) -> None:
        super().__init__(spec)
        if not 2 <= bits <= 16:
            raise AfterimageError(f"a defence int{bits} is out of range; write {self.usage}, or 1bit")
        self.bits = bits
        self.register_buffer("low", torch.zeros(spec.channels))
        self.register_buffer("step", torch.ones(spec.channels))

    def measure_statistics(self, maps: Map) -> None:
        values = maps.transpose(0, 1).flatten(1)
        self.low.copy_(values.amin(1))
        step = (values.amax(1) - self.low) / (2**self.bits - 1)
        self.step.copy_(torch.where(step > 0, step, torch.ones_like(step)))  # constant channels have step 0

    def codes(self, maps: Map) -> Tensor:
        """Return the integers to send, from 0 to 2^bits - 1, `(B, C, h, w)`."""
        scaled = (maps - broadcast_channels(self.low, maps)) / broadcast_channels(self.step, maps)
        return scaled.round().clamp(0, 2**self.bits - 1).to(torch.int32)

    def values(self, codes: Tensor) -> Map:
        """Return the feature values of codes."""
        return codes * broadcast_channels(self.step, codes) + broadcast_channels(self.low, codes)

    def encode(self, maps: Map) -> Map:
        return _StraightThrough.apply(maps, self.values(self.codes(maps)).to(maps.dtype))

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        return replace(cost, bits=self.bits)


class OneBit(DefenceStep):
    """One bit per value, set above its channel's mean; it decodes to the mean of all values on that side.

    This is the two-level quantiser with the means of the two sides as levels (Lloyd 1982, eq. 5, with the
    threshold at the mean). Gradients pass straight through.
    """

    usage = "1bit"
    requires_fit = True

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__(spec)
        for name in ("threshold", "below", "above"):
            self.register_buffer(name, torch.zeros(spec.channels))

    def measure_statistics(self, maps: Map) -> None:
        values = maps.transpose(0, 1).flatten(1)
        mean = values.mean(1)
        self.threshold.copy_(mean)
        high = values > mean[:, None]
        for name, chosen in (("below", ~high), ("above", high)):
            count = chosen.sum(1)
            level = (values * chosen).sum(1) / count.clamp(min=1)
            getattr(self, name).copy_(torch.where(count > 0, level, mean))

    def encode(self, maps: Map) -> Map:
        high = maps > broadcast_channels(self.threshold, maps)
        levels = torch.where(high, broadcast_channels(self.above, maps), broadcast_channels(self.below, maps))
        return _StraightThrough.apply(maps, levels.to(maps.dtype))

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        return replace(cost, bits=1)


class _StraightThrough(torch.autograd.Function):
    """Function that replaces values and passes the gradient on unchanged."""

    @staticmethod
    def forward(ctx, maps, replaced):
        return replaced.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class TopK(DefenceStep):
    """The `k` values of largest magnitude of each image; the others become 0.

    Indices are sent along: as numbers, or as one bit for each value of the map if that is shorter.
    """

    usage = "topk:FRACTION or topk:COUNT (values kept an image, for example topk:0.1)"

    def __init__(self, spec: FeatureSpec, keep: int | float) -> None:
        super().__init__(spec)
        most = spec.values
        self.k = (
            int(keep) if isinstance(keep, int) else max(1, round(check_number(self, keep, 0.0, 1.0) * most))
        )
        if not 1 <= self.k <= most:
            raise AfterimageError(
                f"topk:{keep} of {spec.source}, which has {most:,} values; write {self.usage}"
            )

    def encode(self, maps: Map) -> Map:
        flat = maps.flatten(1)
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.abs().topk(self.k).indices, True)
        return torch.where(kept, flat, torch.zeros_like(flat)).view_as(maps)

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        index_bits = min(self.k * math.ceil(math.log2(self.spec.values)), self.spec.values)
        return TransmissionCost(self.k, cost.bits, index_bits)


class PCA(DefenceStep):
    """The first `dimensions` principal components of the channels; each location of each image is a sample.

    `decode` returns the best linear approximation of that rank to the features in `fit` (Pearson 1901).
    """

    usage = "pca:DIMENSIONS (at most the number of channels, for example pca:8)"
    requires_fit = True

    def __init__(self, spec: FeatureSpec, dimensions: int | float) -> None:
        super().__init__(spec)
        if not isinstance(dimensions, int) or not 1 <= dimensions <= spec.channels:
            raise AfterimageError(
                f"pca:{dimensions} of {spec.source}, which has {spec.channels} channels; write {self.usage}"
            )
        self.output_spec = replace(spec, channels=dimensions)
        self.register_buffer("mean", torch.zeros(spec.channels))
        self.register_buffer("components", torch.zeros(dimensions, spec.channels))

    def measure_statistics(self, maps: Map) -> None:
        rows = maps.movedim(1, -1).flatten(0, -2)
        self.mean.copy_(rows.mean(0, dtype=torch.float64))
        covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in rows.split(1 << 16):
            part = part.double() - self.mean
            covariance += part.T @ part
        self.components.copy_(torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : len(self.components)].T)

    def encode(self, maps: Map) -> Map:
        return torch.einsum("dc,bchw->bdhw", self.components, maps - broadcast_channels(self.mean, maps))

    def decode(self, sent: Map) -> Map:
        return torch.einsum("dc,bdhw->bchw", self.components, sent) + self.mean[:, None, None]

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        return TransmissionCost(self.output_spec.values)


class Drop(DefenceStep):
    """All channels but a fixed random share of them; `decode` replaces the others by their means."""

    usage = "drop:FRACTION (of the channels, for example drop:0.5)"
    requires_fit = True
    context = ("seed",)

    def __init__(self, spec: FeatureSpec, fraction: int | float, seed: int = 0) -> None:
        super().__init__(spec)
        kept = spec.channels - round(check_number(self, fraction, 0.0, 1.0) * spec.channels)
        if kept < 1:
            raise AfterimageError(
                f"drop:{fraction} leaves none of the {spec.channels} channels of {spec.source}"
            )
        self.output_spec = replace(spec, channels=kept)
        drawn = torch.randperm(spec.channels, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("kept", drawn[:kept].sort().values)
        self.register_buffer("mean", torch.zeros(spec.channels))

    def measure_statistics(self, maps: Map) -> None:
        self.mean.copy_(maps.mean((0, 2, 3)))

    def encode(self, maps: Map) -> Map:
        return maps[:, self.kept]

    def decode(self, sent: Map) -> Map:
        shape = (len(sent), self.spec.channels, *sent.shape[2:])
        return broadcast_channels(self.mean, sent).to(sent.dtype).expand(shape).index_copy(1, self.kept, sent)

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        return TransmissionCost(self.output_spec.values, cost.bits)


class Pool(DefenceStep):
    """Means over squares of `size` x `size` locations, which `decode` upsamples bilinearly.

    If the size does not divide the map, the last squares hold fewer locations. The sent map then extends
    beyond the image, and its position is known only if `image_size` is given.
    """

    usage = "pool:SIZE (locations a side, for example pool:2)"
    context = ("image_size",)

    def __init__(
        self, spec: FeatureSpec, size: int | float, image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(spec)
        if not isinstance(size, int) or not 2 <= size <= max(spec.height, spec.width):
            raise AfterimageError(
                f"pool:{size} of {spec.source}, which is {spec.height}x{spec.width}; write {self.usage}"
            )
        self.size = size
        height, width = math.ceil(spec.height / size), math.ceil(spec.width / size)
        pixels = image_size or (None, None)
        self.output_spec = replace(
            spec,
            height=height,
            width=width,
            rows=self._axis(spec.rows, spec.height, pixels[0]),
            columns=self._axis(spec.columns, spec.width, pixels[1]),
        )

    def _axis(self, axis: Axis | None, count: int, pixels: int | None) -> Axis | None:
        """Return the positions of the squares along one axis, computed from those of the locations."""
        if axis is None and (count % self.size == 0 or pixels is None):
            return None
        axis = axis or Axis(0.0, pixels / count, 0, pixels)
        return replace(axis, stride=axis.stride * self.size)

    def encode(self, maps: Map) -> Map:
        return F.avg_pool2d(maps, self.size, ceil_mode=True, count_include_pad=False)

    def decode(self, sent: Map) -> Map:
        whole = [self.size * side for side in sent.shape[-2:]]
        enlarged = F.interpolate(sent, whole, mode="bilinear", align_corners=False)
        return enlarged[..., : self.spec.height, : self.spec.width]

    def transmission_cost(self, cost: TransmissionCost) -> TransmissionCost:
        return TransmissionCost(self.output_spec.values)
