"""Feature ablations: replace an image's features by others, from which a decoder can show only its prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.data.images import ImageSet
from afterimage.models.reconstructor import FeatureSource

BATCH = 8
"""Number of images in a batch, which bounds the memory of features."""
SAMPLE_IMAGES = 64
"""Largest number of training images from which the channels' means and ranges are measured."""
SAMPLE_VALUES = 20_000
"""Number of values of each channel that are sampled: 20 of them lie beyond a quantile of 0.1 %."""

Maps = Sequence[Float[Tensor, "batch _ _ _"]]


def shuffle(features: Maps, generator: torch.Generator) -> list[Tensor]:
    """Shuffle the locations of maps `(B, C, h, w)`, differently for each image; their channels stay together."""
    shuffled = []
    for maps in features:
        rows = maps.flatten(2)
        order = torch.stack([torch.randperm(rows.shape[2], generator=generator) for _ in rows])
        order = order.to(rows.device)[:, None].expand_as(rows)
        shuffled.append(rows.gather(2, order).view(maps.shape))
    return shuffled


def fill_channels(features: Maps, means: Sequence[Float[Tensor, " channels"]]) -> list[Tensor]:
    """Return maps of the same shapes whose channels have one value each, `(C,)` for each map."""
    return [
        mean.to(maps.device)[None, :, None, None].expand_as(maps).contiguous()
        for maps, mean in zip(features, means, strict=True)
    ]


def distance(features: Maps, others: Maps) -> Float[Tensor, " batch"]:
    """Compute the relative distance `||others - features|| / ||features||` of each image, as the mean over maps."""
    ratios = []
    for own, other in zip(features, others, strict=True):
        # Features that are all zero have distance 0 from themselves.
        norm = own.flatten(1).norm(dim=1).clamp_min(1e-12)
        ratios.append((other - own).flatten(1).norm(dim=1) / norm)
    return torch.stack(ratios).mean(0)


@torch.no_grad()
def sample_features(
    encoders: FeatureSource, images: ImageSet, *, device: torch.device | str = "cpu"
) -> list[Float[Tensor, "channels values"]]:
    """Sample features at random locations of the first training images, the same ones on every call.

    Returns:
        a table of values `(C, n)` for each source
    """
    count = min(len(images), SAMPLE_IMAGES)
    generator = torch.Generator().manual_seed(0)
    parts: list[list[Tensor]] = [[] for _ in encoders.sources]
    for indices in torch.arange(count).split(BATCH):
        for part, maps in zip(parts, encoders(images.crops(indices, device=device)), strict=True):
            rows = maps.flatten(2)
            for row in rows:
                some = torch.randperm(rows.shape[2], generator=generator)[: -(-SAMPLE_VALUES // count)]
                part.append(row[:, some.to(row.device)].float().cpu())
    return [torch.cat(part, 1) for part in parts]
