"""Features that are not the image's own: what a trained decoder makes of them is its prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.data.images import ImageSet
from afterimage.models.reconstructor import MultiEncoder

SAMPLE_IMAGES = 64
SAMPLE_VALUES = 20_000
"""Values a channel that its mean, range and levels are taken from."""

Maps = Sequence[Float[Tensor, "batch _ _ _"]]


def shuffle(features: Maps, generator: torch.Generator) -> list[Tensor]:
    """Every map with its locations in random order, a different one for each image; channels stay together."""
    shuffled = []
    for maps in features:
        rows = maps.flatten(2)
        order = torch.stack([torch.randperm(rows.shape[2], generator=generator) for _ in rows])
        order = order.to(rows.device)[:, None].expand_as(rows)
        shuffled.append(rows.gather(2, order).view(maps.shape))
    return shuffled


def level(features: Maps, means: Sequence[Float[Tensor, " channels"]]) -> list[Tensor]:
    """Every channel at one value everywhere: the same features for every image."""
    return [
        mean.to(maps.device)[None, :, None, None].expand_as(maps).contiguous()
        for maps, mean in zip(features, means, strict=True)
    ]


def distance(features: Maps, others: Maps) -> Float[Tensor, " batch"]:
    """`||others - features|| / ||features||`, one value an image; the mean over maps where there are several."""
    ratios = []
    for own, other in zip(features, others, strict=True):
        norm = own.flatten(1).norm(dim=1).clamp_min(1e-12)  # features that are all zero are 0 from themselves
        ratios.append((other - own).flatten(1).norm(dim=1) / norm)
    return torch.stack(ratios).mean(0)


@torch.no_grad()
def sample(
    encoders: MultiEncoder, images: ImageSet, *, device: torch.device | str = "cpu", batch_size: int = 8
) -> list[Float[Tensor, "channels values"]]:
    """Features at random locations of the first images, one table `(C, n)` a source, the same on every call."""
    count = min(len(images), SAMPLE_IMAGES)
    generator = torch.Generator().manual_seed(0)
    parts: list[list[Tensor]] = [[] for _ in encoders.sources]
    for indices in torch.arange(count).split(batch_size):
        for part, maps in zip(parts, encoders(images.crops(indices, device=device)), strict=True):
            rows = maps.flatten(2)
            for row in rows:
                some = torch.randperm(rows.shape[2], generator=generator)[: -(-SAMPLE_VALUES // count)]
                part.append(row[:, some.to(row.device)].float().cpu())
    return [torch.cat(part, 1) for part in parts]
