"""Search for images batch by batch, then score the images found and the course of the search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.analysis.inversion.batches import Batches, Curve
from afterimage.analysis.inversion.invert import Inversion, Snapshot
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import Reconstructed, evaluate_together
from afterimage.evaluation.metrics import Metrics
from afterimage.runtime.terminal import Progress, silent

Images = Float[Tensor, "batch 3 height width"]

BATCH = 4


def curve_steps(steps: int) -> list[int]:
    """Return the steps of a saturation curve: about three for each doubling of the passes, and the last."""
    return sorted(
        {max(1, round(2 ** (i / 3))) for i in range(3 * steps.bit_length())} & set(range(steps)) | {steps}
    )


@dataclass
class Measured:
    """Measurements of one inversion method.

    Attributes:
        rows: scores, one row per image
        images: id, original and image found, uint8 `(H, W, 3)`, of each image
        seconds: time of the search per image, without measuring
        curve: scores by image and number of passes
    """

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
    """Search for every image, then score the images found.

    Args:
        search: called for each batch as `search(images, callback=, milestones=, progress=)`.
        image_set: the images whose features are inverted.
        metrics: metrics of the images found.
        steps: number of passes of a search.
        batch_size: number of images in a batch.
        device: device to compute on.
        progress: called during each search, and then with the number of images measured.
        snapshot: called with the best images so far at every milestone of the curve.
        batches: store of finished batches, which are not searched again.
    """
    parts = torch.arange(len(image_set)).split(batch_size)
    curve: Curve = []
    losses: list[float] = []
    found: list[Tensor] = []
    seconds = 0.0
    for indices in parts:
        result, own = search_batch(
            search, image_set.crops(indices, device=device), steps, [image_set.ids[i] for i in indices.tolist()],
            metrics, progress=progress, snapshot=snapshot, batches=batches,
        )  # fmt: skip
        curve += own
        seconds += result.seconds
        losses += result.loss.tolist()
        # One memory layout for loaded and new batches, since sums depend on it.
        found.append(result.images.contiguous().cpu())

    def reconstructions() -> Iterator[Reconstructed]:
        for indices, images in zip(parts, found, strict=True):
            yield indices, image_set.crops(indices, device=device), [images.to(device)]

    (scored,) = evaluate_together(
        reconstructions(), image_set.ids, metrics, progress=progress, keep=len(image_set)
    )
    rows = [row | {"feature_loss": loss} for row, loss in zip(scored.rows, losses, strict=True)]
    return Measured(rows, scored.images, seconds / len(image_set), curve)


def search_batch(
    search: Callable[..., Inversion],
    images: Images,
    steps: int,
    ids: Sequence[str] = (),
    metrics: Metrics | None = None,
    *,
    progress: Progress = silent,
    snapshot: Callable[[Images], None] | None = None,
    batches: Batches | None = None,
) -> tuple[Inversion, Curve]:
    """Search for `images` and store the result, or load it if it is stored already.

    Args:
        search: called as in `measure`.
        images: `(B, 3, H, W)` in [0, 1].
        steps: number of passes of a search.
        ids: names of the images, for the curve.
        metrics: metrics of the curve; None for no curve.
        progress: called during the search.
        snapshot: called with the best images so far at every milestone of the curve.
        batches: store of finished batches; None to store nothing.

    Returns:
        The images found, and the curve.
    """
    kept = batches.load(images) if batches else None
    if kept is not None and (metrics is None or kept[1]):
        return kept
    curve: Curve = []
    watched: dict[str, Any] = {}
    if metrics is not None:
        metrics.to(images.device)

        def callback(look: Snapshot) -> None:
            curve.extend(_curve_rows(ids, images, look, metrics))
            if snapshot is not None:
                snapshot(look.images)

        watched = {"callback": callback, "milestones": curve_steps(steps)}
    result = search(images, progress=progress, **watched)
    if batches:
        batches.save(images, result, curve)
    return result, curve


def _curve_rows(ids: Sequence[str], images: Images, look: Snapshot, metrics: Metrics) -> Curve:
    """Return the curve's rows for one snapshot, a row per image: PSNR, LPIPS and feature distance."""
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
    """Return the number of passes (from 1) of least mean LPIPS or, without LPIPS, of highest mean PSNR."""
    totals: dict[int, float] = {}
    for row in curve:
        loss = -row["psnr"] if row["lpips"] is None else row["lpips"]
        if row["step"] > 0:
            totals[row["step"]] = totals.get(row["step"], 0.0) + loss
    return min(totals, key=totals.__getitem__)
