"""Search for images batch by batch, then score what was found and the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.analysis.inversion.batches import Batches, Curve
from afterimage.analysis.inversion.invert import (
    Inversion,
    Snapshot,
)
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import (
    Reconstructed,
    evaluate_together,
)
from afterimage.evaluation.metrics import Metrics
from afterimage.runtime.progress import Progress, silent

Images = Float[Tensor, "batch 3 height width"]

BATCH = 4


def curve_steps(steps: int) -> list[int]:
    """Where a saturation curve is measured: about six times a doubling of the passes, the last included."""
    return sorted(
        {max(1, round(2 ** (i / 3))) for i in range(3 * steps.bit_length())} & set(range(steps)) | {steps}
    )


@dataclass
class Measured:
    """What one way of inverting came to: rows and curve by image, seconds an image without the measuring."""

    rows: list[dict[str, Any]]
    images: list[tuple[str, Any, Any]]
    seconds: float
    curve: list[dict[str, Any]] = field(default_factory=list)


def measure(
    search: Callable[..., Inversion],
    image_set: ImageSet,
    metrics: Metrics,
    steps: int,
    *,
    batch_size: int = BATCH,
    device: str = "cpu",
    progress: Progress = silent,
    snapshot: Callable[[Images], None] | None = None,
    batches: Batches | None = None,
) -> Measured:
    """Search for every image, then score what was found, and the way there.

    Args:
        search: is called as `search(images, callback=, milestones=, progress=)`, a batch at a time.
        image_set: the images whose features are inverted.
        metrics: what is measured of the images found.
        steps: how many passes a search takes.
        batch_size: images at a time.
        device: where.
        progress: is told how far each search is, and then how many images have been measured.
        snapshot: is given the images so far at every milestone.
        batches: keeps finished batches, and gives back those that it has.
    """
    parts = torch.arange(len(image_set)).split(batch_size)
    curve: Curve = []
    losses: list[float] = []
    found: list[Tensor] = []
    seconds = 0.0
    for indices in parts:
        images = image_set.crops(indices, device=device)
        kept = batches.load(images) if batches else None
        if kept is None:
            ids, own = [image_set.ids[index] for index in indices.tolist()], []

            def callback(look: Snapshot, ids=ids, images=images, own=own) -> None:
                own += curve_rows(ids, images, look, metrics)
                if snapshot is not None:
                    snapshot(look.images)

            result = search(images, callback=callback, milestones=curve_steps(steps), progress=progress)
            if batches:
                batches.save(images, result, own)
        else:
            result, own = kept
        curve += own
        seconds += result.seconds
        losses += result.loss.tolist()
        # In one order of memory, whether it was kept or not: sums depend on it.
        found.append(result.images.contiguous().cpu())

    def reconstructions() -> Iterator[Reconstructed]:
        for indices, images in zip(parts, found, strict=True):
            yield indices, image_set.crops(indices, device=device), [images.to(device)]

    (scored,) = evaluate_together(
        reconstructions(), image_set.ids, metrics, progress=progress, keep=len(image_set)
    )
    rows = [row | {"feature_loss": loss} for row, loss in zip(scored.rows, losses, strict=True)]
    return Measured(rows, scored.images, seconds / len(image_set), curve)


def curve_rows(ids: Sequence[str], images: Images, look: Snapshot, metrics: Metrics) -> Curve:
    """A row an image: how near it is after so many passes, in PSNR, in LPIPS and in its features."""
    scores = metrics(look.images, images)
    return [
        {
            "id": name,
            "step": look.step,
            "seconds": look.seconds / len(images),
            "psnr": scores["psnr"][i],
            "lpips": scores["lpips"][i] if scores["lpips"] else None,
            "feature_loss": float(look.loss[i]),
        }
        for i, name in enumerate(ids)
    ]


def best_step(curve: Curve) -> int:
    """The number of passes, from 1 on, of the least mean LPIPS, or without LPIPS of the highest mean PSNR."""
    totals: dict[int, float] = {}
    for row in curve:
        loss = -row["psnr"] if row["lpips"] is None else row["lpips"]
        if row["step"] > 0:
            totals[row["step"]] = totals.get(row["step"], 0.0) + loss
    return min(totals, key=totals.__getitem__)
