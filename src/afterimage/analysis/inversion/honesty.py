"""Controls of a measured bound: scores without the image's own features, and re-identification."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.analysis.inversion.measure import BATCH
from afterimage.evaluation.evaluate import evaluate_together, summarise
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Gallery, reduced
from afterimage.models.reconstructor import Encoders
from afterimage.runs.results import BoundControls, Score

Images = Float[Tensor, "batch 3 height width"]


@torch.no_grad()
def mean_features(encoders: Encoders, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return the mean feature maps `(1, C, h, w)` of images, which belong to no image in particular."""
    sums: list[Tensor] | None = None
    count = 0
    for images in batches:
        found = [map_.float().sum(0, keepdim=True) for map_ in encoders(images)]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        count += len(images)
    return [total / count for total in sums or []]


def bound_controls(
    images: Sequence[tuple[str, np.ndarray, np.ndarray]],
    metrics: Metrics,
    prior: Tensor | None = None,
    *,
    device: str = "cpu",
) -> BoundControls:
    """Score images found against other originals, where they should fail, and identify their own originals.

    Args:
        images: id, original and image found, uint8 `(H, W, 3)`, of each image
        metrics: the metrics of the measured bound itself
        prior: image that the same procedure finds for `mean_features`, `(1, 3, H, W)` in [0, 1], or None
        device: device to measure on

    Returns:
        scores of each image found against another image's original, scores of `prior` against every original,
            and the share of the images found that are nearest to their own original
    """
    ids = [name for name, _, _ in images]
    originals, found = (
        torch.from_numpy(np.stack([entry[side] for entry in images])).permute(0, 3, 1, 2).float().to(device)
        / 255
        for side in (1, 2)
    )

    def scores(outputs: Tensor) -> dict[str, Score | None]:
        parts = torch.arange(len(ids)).split(BATCH)
        batches = ((part, originals[part], [outputs[part]]) for part in parts)
        return summarise(evaluate_together(batches, ids, metrics)[0].rows)

    other = scores(found.roll(1, 0)) if len(ids) > 1 else None
    alone = None if prior is None else scores(prior.to(device).expand_as(originals))
    gallery = Gallery(reduced(originals), metrics.lpips)
    hits = gallery.find(reduced(found))
    distance = "lpips" if "lpips" in hits else "correlation"
    return BoundControls(other, alone, float(hits[distance].mean()), distance, len(ids))
