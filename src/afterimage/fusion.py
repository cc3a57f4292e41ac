"""Several feature maps become one: attention, concat or weighted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError, FeatureSpec, FusionConfig, unknown
from afterimage.decoders.base import resize


class Fusion(nn.Module, ABC):
    """Brings every map to one size and number of channels, then makes one of them.

    Each source has a 1x1 convolution to `channels` and batch norm; it is then resampled bilinearly (antialiased
    where it shrinks) to `size` locations. `spec` describes what comes out.
    """

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.specs, self.size = tuple(specs), size
        self.spec = FeatureSpec(" + ".join(spec.source for spec in specs), channels, *size)
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(spec.channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels)
            )
            for spec in specs
        )

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Every source as `(B, channels, h, w)`; smaller maps are projected before they are enlarged."""
        if len(features) != len(self.specs):
            raise AfterimageError(f"this fusion takes {len(self.specs)} feature maps, got {len(features)}")
        projected = []
        for feature, projection in zip(features, self.projections, strict=True):
            shrinks = feature.shape[-2] > self.size[0] or feature.shape[-1] > self.size[1]
            projected.append(
                projection(resize(feature, self.size)) if shrinks else resize(projection(feature), self.size)
            )
        return projected

    @abstractmethod
    def forward(
        self, features: Sequence[Float[Tensor, "batch _ _ _"]]
    ) -> Float[Tensor, "batch channels h w"]:
        """One feature map `(B, channels, h, w)` from several."""


class AttentionFusion(Fusion):
    """A softmax weight for each source and location, from the projected maps themselves.

    `weights` gives them as `(B, sources, h, w)`, summing to 1 over sources.
    """

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, size: tuple[int, int]) -> None:
        super().__init__(specs, channels, size)
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


class ConcatFusion(Fusion):
    """All projected maps side by side, brought back to `channels` by a 1x1 convolution."""

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, size: tuple[int, int]) -> None:
        super().__init__(specs, channels, size)
        self.mix = nn.Conv2d(len(specs) * channels, channels, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.mix(torch.cat(self.project(features), dim=1))


class WeightedFusion(Fusion):
    """One learned weight a source, the same everywhere; a softmax holds their sum at 1."""

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, size: tuple[int, int]) -> None:
        super().__init__(specs, channels, size)
        self.logits = nn.Parameter(torch.zeros(len(specs)))

    def weights(self, features: Sequence[Tensor]) -> Float[Tensor, "batch sources h w"]:
        b = features[0].shape[0]
        return self.logits.softmax(0)[None, :, None, None].expand(b, -1, *self.size)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        weights = self.logits.softmax(0)
        return sum(weights[i] * maps for i, maps in enumerate(self.project(features)))


class AlignedFusion(nn.Module):
    """Maps side by side at one size, with nothing to learn: what a closed-form decoder can be fitted on."""

    def __init__(self, specs: Sequence[FeatureSpec], channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.spec = FeatureSpec(
            " + ".join(spec.source for spec in specs), sum(spec.channels for spec in specs), *size
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [F.interpolate(f, self.size, mode="bilinear", align_corners=False) for f in features], 1
        )


FUSIONS: dict[str, type[nn.Module]] = {
    "attention": AttentionFusion,
    "concat": ConcatFusion,
    "weighted": WeightedFusion,
    "aligned": AlignedFusion,
}


def create_fusion(config: FusionConfig, specs: Sequence[FeatureSpec]) -> nn.Module | None:
    """Build a fusion for features of the given shapes; None for a single source, which is its own fusion.

    Without a size the maps meet at the finest resolution present. Raises `AfterimageError` for an unknown name.
    """
    if config.name not in FUSIONS:
        raise unknown("fusion", config.name, FUSIONS)
    if len(specs) == 1:
        return None
    finest = max(specs, key=lambda spec: spec.locations)
    size = (config.size, config.size) if config.size is not None else (finest.height, finest.width)
    return FUSIONS[config.name](specs, config.channels, size)
