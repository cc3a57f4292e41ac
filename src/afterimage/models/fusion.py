"""Fusions, which make one feature map of several: attention, concat, weighted, aligned, stacked and sum."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from afterimage.config import AfterimageError, Axis, FeatureSpec, FusionConfig, check_choice, join_names
from afterimage.models.decoders.base import ClosedForm
from afterimage.models.decoders.canvas import Canvas, Span, visible_box
from afterimage.models.decoders.linear import LinearDecoder
from afterimage.models.layers.blocks import pixel_unshuffle, resize
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup


def fused_spec(
    specs: Sequence[FeatureSpec], channels: int, size: tuple[int, int], image_size: tuple[int, int]
) -> FeatureSpec:
    """Return the spec of a fused map of `size` locations.

    The fused map has the position of the finest input map (the first, if several are equally fine) and depends on
    all pixels on which any input map depends.
    """
    finest = max(specs, key=lambda spec: spec.locations)
    visible = visible_box(specs, image_size) or tuple((0, length) for length in image_size)
    cells = (finest.height, finest.width)
    axes = [
        None if axis is None else Axis(axis.start, axis.stride * before / count, *ends)
        for axis, before, count, ends in zip((finest.rows, finest.columns), cells, size, visible, strict=True)
    ]
    return FeatureSpec(" + ".join(spec.source for spec in specs), channels, *size, *axes)


def align(maps: Tensor, source: Canvas, target: Canvas, *, smooth: bool = True) -> Tensor:
    """Interpolate feature maps `(B, C, h, w)` bilinearly from the cells of one canvas to those of another.

    With `smooth` they are antialiased along axes on which cells become larger.
    """
    cells = (target.rows.count, target.columns.count)
    if source.even and target.even:
        if smooth:
            return resize(maps, cells)
        return F.interpolate(maps, cells, mode="bilinear", align_corners=False)
    if (source.rows, source.columns) == (target.rows, target.columns):
        return maps
    rows, columns = (
        _weights(one, other, smooth).to(maps.device, maps.dtype)
        for one, other in ((source.rows, target.rows), (source.columns, target.columns))
    )
    return rows @ maps @ columns.mT


@functools.lru_cache(maxsize=64)
def _weights(source: Span, target: Span, smooth: bool) -> Float[Tensor, "target source"]:
    """Return the interpolation weights along one axis: triangles as wide as the larger of the two cells."""
    middles = (
        target.start + (torch.arange(target.count, dtype=torch.float64, device="cpu") + 0.5) * target.stride
    )
    indices = ((middles - source.start) / source.stride - 0.5).clamp(0, source.count - 1)
    radius = max(1.0, target.stride / source.stride) if smooth else 1.0
    distance = (indices[:, None] - torch.arange(source.count, dtype=torch.float64, device="cpu")).abs()
    weights = (1 - distance / radius).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


class Fusion(ClosedForm, nn.Module, ABC):
    """Base class of fusions, which make one feature map `(B, C, h, w)` of several; `spec` describes it.

    Every map is resampled to the positions of the fused cells, so that features of the same part of the image
    meet. One that is trained by gradient descent projects every map to the configured channels first.
    """

    has_weights = False
    """True if `weights(features)` returns the weight of each source, `(B, sources, h, w)` with sum 1 over
    sources."""

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        channels: int,
        size: tuple[int, int],
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.specs, self.size = tuple(specs), size
        self.spec = fused_spec(specs, channels, size, image_size)
        self.canvas = Canvas(self.spec, image_size)
        self.canvases = [Canvas(spec, image_size) for spec in specs]

    @abstractmethod
    def forward(
        self, features: Sequence[Float[Tensor, "batch _ _ _"]]
    ) -> Float[Tensor, "batch channels h w"]:
        """Fuse several feature maps into one, `(B, C, h, w)`."""


class ProjectedFusion(Fusion):
    """Base class of fusions that first project all maps to one number of channels (1x1 conv, batch norm).

    Maps are resampled bilinearly, with antialiasing if they shrink.
    """

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, *sizes: tuple[int, int]) -> None:
        super().__init__(specs, channels, *sizes)
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(spec.channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels)
            )
            for spec in specs
        )

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return every source as `(B, channels, h, w)`; maps that shrink are resampled before projection."""
        if len(features) != len(self.specs):
            raise AfterimageError(f"this fusion takes {len(self.specs)} feature maps, got {len(features)}")
        projected = []
        for feature, canvas, projection in zip(features, self.canvases, self.projections, strict=True):
            shrinks = feature.shape[-2] > self.size[0] or feature.shape[-1] > self.size[1]
            projected.append(
                projection(align(feature, canvas, self.canvas))
                if shrinks
                else align(projection(feature), canvas, self.canvas)
            )
        return projected


class AttentionFusion(ProjectedFusion):
    """Weighted sum with a softmax weight for each source and location, computed from the projected maps.

    `weights` returns these weights as `(B, sources, h, w)`, with sum 1 over sources.
    """

    has_weights = True

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, *sizes: tuple[int, int]) -> None:
        super().__init__(specs, channels, *sizes)
        self.score = nn.Sequential(
            nn.Conv2d(len(specs) * channels, channels, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, len(specs), kernel_size=1),
        )

    def weights(self, features: Sequence[Tensor]) -> Float[Tensor, "batch sources h w"]:
        return self._weights(self.project(features))

    def _weights(self, projected: Sequence[Tensor]) -> Tensor:
        return self.score(torch.cat(projected, dim=1)).softmax(dim=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        projected = self.project(features)
        weights = self._weights(projected)
        return sum(weights[:, i : i + 1] * maps for i, maps in enumerate(projected))


class ConcatFusion(ProjectedFusion):
    """Concatenation of all projected maps, reduced to `channels` by a 1x1 convolution."""

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, *sizes: tuple[int, int]) -> None:
        super().__init__(specs, channels, *sizes)
        self.mix = nn.Conv2d(len(specs) * channels, channels, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.mix(torch.cat(self.project(features), dim=1))


class WeightedFusion(ProjectedFusion):
    """Weighted sum with one learned weight per source, the same everywhere; a softmax makes their sum 1."""

    has_weights = True

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, *sizes: tuple[int, int]) -> None:
        super().__init__(specs, channels, *sizes)
        self.logits = nn.Parameter(torch.zeros(len(specs)))

    def weights(self, features: Sequence[Tensor]) -> Float[Tensor, "batch sources h w"]:
        b = features[0].shape[0]
        return self.logits.softmax(0)[None, :, None, None].expand(b, -1, *self.size)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        weights = self.logits.softmax(0)
        return sum(weights[i] * maps for i, maps in enumerate(self.project(features)))


class AlignedFusion(Fusion):
    """Concatenation of all maps at one size, without parameters, for decoders fitted in closed form."""

    trainable = False

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, *sizes: tuple[int, int]) -> None:
        super().__init__(specs, sum(spec.channels for spec in specs), *sizes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        pairs = zip(features, self.canvases, strict=True)
        return torch.cat([align(maps, canvas, self.canvas, smooth=False) for maps, canvas in pairs], 1)


class StackedFusion(Fusion):
    """Concatenation of the finest maps and of images decoded from each coarser map (stacking, Wolpert 1992).

    A location of a coarse map encodes the layout within its block of pixels, which enlarging its channels
    would blur. So each coarser map first gets its own `LinearDecoder`, fitted in closed form, and each
    location of the fused map gets the decoded pixels in its cell. Nothing is trained by gradient descent.
    """

    closed_form = True
    trainable = False

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        channels: int,
        size: tuple[int, int],
        image_size: tuple[int, int],
    ) -> None:
        super().__init__(specs, channels, size, image_size)
        self.block = max(1, round(math.sqrt(math.prod(self.canvas.size) / (size[0] * size[1]))))
        self.readers = nn.ModuleDict(
            {
                str(i): LinearDecoder([spec], image_size, rows_per_input=200)
                for i, spec in enumerate(specs)
                if spec.height < size[0] or spec.width < size[1]
            }
        )
        read = len(self.readers) * 3 * self.block**2
        kept = sum(spec.channels for i, spec in enumerate(specs) if str(i) not in self.readers)
        self.spec = replace(self.spec, channels=kept + read)

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        views = [reader.begin_fit(images, seed, ranks) for reader in self.readers.values()]
        return max(views, default=0)

    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        for i, reader in self.readers.items():
            reader.partial_fit([features[int(i)]], images, validation=validation)

    @property
    def fit_bytes(self) -> int:
        return sum(reader.fit_bytes for reader in self.readers.values())

    def fit_macs(self, images: int) -> int:
        return sum(reader.fit_macs(images) for reader in self.readers.values())

    def finalize_fit(self) -> list[str]:
        return [
            f"{reader.spec.source}: {note}"
            for reader in self.readers.values()
            for note in reader.finalize_fit()
        ]

    def forward(self, features: Sequence[Float[Tensor, "batch _ _ _"]]) -> Float[Tensor, "batch _ h w"]:
        parts = [
            self._read(self.readers[str(i)], maps)
            if str(i) in self.readers
            else align(maps, self.canvases[i], self.canvas)
            for i, maps in enumerate(features)
        ]
        return torch.cat(parts, dim=1)

    def _read(self, reader: LinearDecoder, maps: Tensor) -> Tensor:
        """Decode a coarse map; return the pixels of each fused cell as channels `(B, 3 block^2, h, w)`."""
        pixels = (self.size[0] * self.block, self.size[1] * self.block)
        images = reader.canvas.place(reader.decode(maps))
        return pixel_unshuffle(resize(self.canvas.cut(images), pixels), (self.block, self.block))


class SumFusion(Fusion):
    """Sum of all maps at one size, without parameters, as representation autoencoders sum layers.

    A vector is added at every location.

    Raises:
        AfterimageError: the maps have different numbers of channels
    """

    trainable = False

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, *sizes: tuple[int, int]) -> None:
        if len({spec.channels for spec in specs}) > 1:
            shapes = [f"{spec.source} is {'x'.join(map(str, spec.shape))}" for spec in specs]
            raise AfterimageError(
                f"a sum needs layers with one number of channels: {join_names(shapes)}; fusions that take any: "
                + ", ".join(name for name, cls in FUSIONS.items() if cls is not SumFusion)
            )
        super().__init__(specs, specs[0].channels, *sizes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        pairs = zip(features, self.canvases, strict=True)
        return sum(align(maps, canvas, self.canvas) for maps, canvas in pairs)


FUSIONS: dict[str, type[Fusion]] = {
    "attention": AttentionFusion,
    "concat": ConcatFusion,
    "weighted": WeightedFusion,
    "aligned": AlignedFusion,
    "stacked": StackedFusion,
    "sum": SumFusion,
}


def create_fusion(
    config: FusionConfig, specs: Sequence[FeatureSpec], image_size: int | tuple[int, int] = 224
) -> Fusion | None:
    """Build a fusion for features of the given shapes.

    Args:
        config: name and options of the fusion; without a size the maps meet at the finest resolution present
        specs: measured shapes of the features
        image_size: side of the images in pixels, or `(height, width)`

    Returns:
        the fusion; None for a single source, which needs none

    Raises:
        AfterimageError: the name is unknown, or the maps do not suit the fusion
    """
    check_choice("fusion", config.name, FUSIONS)
    if len(specs) == 1:
        return None
    finest = max(specs, key=lambda spec: spec.locations)
    size = (config.size, config.size) if config.size is not None else (finest.height, finest.width)
    pixels = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    return FUSIONS[config.name](specs, config.channels, size, pixels)


class WeightMaps:
    """Weights that a fusion with `weights` gave each source, collected batch by batch.

    Args:
        fusion: the fusion
        keep: number of images whose weight maps are stored
    """

    def __init__(self, fusion: AttentionFusion | WeightedFusion, keep: int) -> None:
        self.fusion, self.keep = fusion, keep
        self._kept: list[Tensor] = []
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, features: Sequence[Float[Tensor, "batch _ _ _"]]) -> None:
        weights = self.fusion.weights(features).float()
        wanted = max(0, self.keep - sum(map(len, self._kept)))
        self._kept.append(self._in_image(weights[:wanted]).mul(255).round().to(torch.uint8).cpu())
        self._sums.append(weights.mean((2, 3)).cpu().double())

    def _in_image(self, weights: Tensor) -> Tensor:
        """Return weight maps in the image's frame, at the image's size if fused cells divide it unevenly."""
        canvas = self.fusion.canvas
        return weights if canvas.even else canvas.place(F.interpolate(weights, canvas.size)).clamp(0, 1)

    def gather(self, ranks: ProcessGroup) -> None:
        """Add the other ranks' parts of every batch, in the order of a single process."""
        self._sums = ranks.gather_batches(self._sums)
        kept = torch.cat(ranks.gather_batches(self._kept))
        self._kept = [kept[: self.keep]]

    @property
    def means(self) -> list[float]:
        """Weight of each source, averaged over images and locations."""
        return torch.cat(self._sums).mean(0).tolist()

    @property
    def images(self) -> list[UInt8[np.ndarray, "sources h w"]]:
        """Weight maps of the first `keep` images; 255 is a weight of 1."""
        return list(torch.cat(self._kept).numpy())
