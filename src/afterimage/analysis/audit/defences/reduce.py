"""Defences that send less: fewer values, directions, channels or locations."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from afterimage.analysis.audit.defences.base import Map, Part, Wire, by_channel, number
from afterimage.config import AfterimageError, Axis, FeatureSpec


class TopK(Part):
    """The `k` values of largest magnitude of each image; the others become 0.

    Indices are sent along: as numbers, or as one bit for each value of the map if that is shorter.
    """

    usage = "topk:FRACTION or topk:COUNT (values kept an image, for example topk:0.1)"

    def __init__(self, spec: FeatureSpec, keep: int | float) -> None:
        super().__init__(spec)
        most = spec.values
        self.k = int(keep) if isinstance(keep, int) else max(1, round(number(self, keep, 0.0, 1.0) * most))
        if not 1 <= self.k <= most:
            raise AfterimageError(
                f"topk:{keep} of {spec.source}, which has {most:,} values; write {self.usage}"
            )

    def encode(self, maps: Map) -> Map:
        flat = maps.flatten(1)
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.abs().topk(self.k).indices, True)
        return torch.where(kept, flat, torch.zeros_like(flat)).view_as(maps)

    def wire(self, wire: Wire) -> Wire:
        places = min(self.k * math.ceil(math.log2(self.spec.values)), self.spec.values)
        return Wire(self.k, wire.bits, places)


class PCA(Part):
    """The first `dimensions` principal components of the channels; each location of each image is a sample.

    `decode` returns the best linear approximation of that rank to the features in `fit` (Pearson 1901).
    """

    usage = "pca:DIMENSIONS (at most the number of channels, for example pca:8)"
    learns = True

    def __init__(self, spec: FeatureSpec, dimensions: int | float) -> None:
        super().__init__(spec)
        if not isinstance(dimensions, int) or not 1 <= dimensions <= spec.channels:
            raise AfterimageError(
                f"pca:{dimensions} of {spec.source}, which has {spec.channels} channels; write {self.usage}"
            )
        self.sent = replace(spec, channels=dimensions)
        self.register_buffer("mean", torch.zeros(spec.channels))
        self.register_buffer("components", torch.zeros(dimensions, spec.channels))

    def learn(self, maps: Map) -> None:
        rows = maps.movedim(1, -1).flatten(0, -2)
        self.mean.copy_(rows.mean(0, dtype=torch.float64))
        covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in rows.split(1 << 16):
            part = part.double() - self.mean
            covariance += part.T @ part
        self.components.copy_(torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : len(self.components)].T)

    def encode(self, maps: Map) -> Map:
        return torch.einsum("dc,bchw->bdhw", self.components, maps - by_channel(self.mean, maps))

    def decode(self, sent: Map) -> Map:
        return torch.einsum("dc,bdhw->bchw", self.components, sent) + self.mean[:, None, None]

    def wire(self, wire: Wire) -> Wire:
        return Wire(self.sent.values)


class Drop(Part):
    """All channels but a fixed random share of them; `decode` replaces the others by their means."""

    usage = "drop:FRACTION (of the channels, for example drop:0.5)"
    learns = True
    context = ("seed",)

    def __init__(self, spec: FeatureSpec, fraction: int | float, seed: int = 0) -> None:
        super().__init__(spec)
        kept = spec.channels - round(number(self, fraction, 0.0, 1.0) * spec.channels)
        if kept < 1:
            raise AfterimageError(
                f"drop:{fraction} leaves none of the {spec.channels} channels of {spec.source}"
            )
        self.sent = replace(spec, channels=kept)
        drawn = torch.randperm(spec.channels, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("kept", drawn[:kept].sort().values)
        self.register_buffer("mean", torch.zeros(spec.channels))

    def learn(self, maps: Map) -> None:
        self.mean.copy_(maps.mean((0, 2, 3)))

    def encode(self, maps: Map) -> Map:
        return maps[:, self.kept]

    def decode(self, sent: Map) -> Map:
        shape = (len(sent), self.spec.channels, *sent.shape[2:])
        return by_channel(self.mean, sent).to(sent.dtype).expand(shape).index_copy(1, self.kept, sent)

    def wire(self, wire: Wire) -> Wire:
        return Wire(self.sent.values, wire.bits)


class Pool(Part):
    """Means over squares of `size` x `size` locations, which `decode` upsamples bilinearly.

    If the size does not divide the map, the last squares hold fewer locations. The sent map then extends
    beyond the image, and its position is known only if `image_size` is given.
    """

    usage = "pool:SIZE (places a side, for example pool:2)"
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
        self.sent = replace(
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

    def wire(self, wire: Wire) -> Wire:
        return Wire(self.sent.values)
