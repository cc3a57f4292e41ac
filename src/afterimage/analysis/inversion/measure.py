"""Search for images batch by batch, and measure the images found, the course of the search, and controls of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from afterimage.analysis.inversion.invert import Inversion
from afterimage.config import AfterimageError
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import evaluate_batches, summarise
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Gallery, downscale
from afterimage.models.reconstructor import FeatureSource
from afterimage.models.weight_files import load_tensors, to_safetensors_form
from afterimage.runs.files import write_atomic
from afterimage.runs.results import BoundControls, Score
from afterimage.runtime.terminal import Progress, no_progress

Images = Float[Tensor, "batch 3 height width"]
Search = Callable[..., Iterator[Inversion]]
"""Function that searches for a batch, `search(images, progress=)`, and yields its course and, last, its result."""
Curve = list[dict[str, Any]]
"""Scores by image and number of passes."""

BATCH = 4


class BatchCache:
    """Files of finished batches in one folder, from which an interrupted search resumes.

    A damaged file counts as missing, and so does one that was written for other images or another `made_for`.

    Args:
        folder: folder of the files
        made_for: everything but the images that the results depend on, as JSON values
    """

    def __init__(self, folder: Path, made_for: Any) -> None:
        self.folder, self.made_for = folder, json.dumps([made_for, torch.__version__], sort_keys=True)

    def load(self, images: Images) -> tuple[Inversion, Curve] | None:
        """Return the stored result of the search for `images` and its curve, or None if there is none."""
        key = self._key(images)
        try:
            tensors, metadata = load_tensors(self._path(key))
            if metadata["key"] != key:
                return None
            facts = json.loads(metadata["facts"])
            found, loss = (tensors[name].to(images.device) for name in ("images", "loss"))
            return Inversion(found, loss, facts["seconds"], facts["step"]), facts["curve"]
        except (AfterimageError, KeyError, ValueError):
            return None

    def save(self, images: Images, result: Inversion, curve: Curve) -> None:
        """Store the result of the search for `images` and its curve."""
        tensors = to_safetensors_form({"images": result.images, "loss": result.loss})
        facts = json.dumps({"seconds": result.seconds, "step": result.step, "curve": curve})
        key = self._key(images)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(key), save(tensors, {"key": key, "facts": facts}))

    def clear(self) -> None:
        """Remove the files."""
        for path in self.folder.glob("batch-*.safetensors"):
            path.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"batch-{key[:16]}.safetensors"

    def _key(self, images: Tensor) -> str:
        pixels = images.detach().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(self.made_for.encode() + pixels).hexdigest()


def best_step(curve: Curve) -> int:
    """Return the number of passes (from 1) of least mean LPIPS or, without LPIPS, of highest mean PSNR."""
    totals: dict[int, float] = {}
    for row in curve:
        loss = -row["psnr"] if row["lpips"] is None else row["lpips"]
        if row["step"] > 0:
            totals[row["step"]] = totals.get(row["step"], 0.0) + loss
    return min(totals, key=totals.__getitem__)


@dataclass
class InversionMeasurement:
    """Scores by image; ids, originals and images found, uint8 `(H, W, 3)`; seconds of search an image; the curve."""

    rows: list[dict[str, Any]]
    images: list[tuple[str, Any, Any]]
    seconds: float
    curve: Curve


def measure(
    search: Search,
    image_set: ImageSet,
    metrics: Metrics,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
    snapshot: Callable[[Images], None] | None = None,
    batches: BatchCache | None = None,
) -> InversionMeasurement:
    """Search for every image of a set, then score the images found; arguments as for `search_batch`."""
    curve: Curve = []
    losses: list[float] = []
    found: list[Tensor] = []
    parts, seconds = torch.arange(len(image_set)).split(BATCH), 0.0
    for part in parts:
        images, ids = image_set.crops(part, device=device), [image_set.ids[i] for i in part.tolist()]
        result, batch_curve = search_batch(
            search, images, ids, metrics, progress=progress, snapshot=snapshot, batches=batches
        )
        curve += batch_curve
        seconds += result.seconds
        losses += result.loss.tolist()
        # One memory layout for loaded and new batches, since sums depend on it.
        found.append(result.images.contiguous().cpu())

    reconstructed = (
        (part, image_set.crops(part, device=device), [images.to(device)])
        for part, images in zip(parts, found, strict=True)
    )
    (scored,) = evaluate_batches(
        reconstructed, image_set.ids, metrics, progress=progress, keep=len(image_set)
    )
    rows = [row | {"feature_loss": loss} for row, loss in zip(scored.rows, losses, strict=True)]
    return InversionMeasurement(rows, scored.images, seconds / len(image_set), curve)


def search_batch(
    search: Search,
    images: Images,
    ids: Sequence[str] = (),
    metrics: Metrics | None = None,
    *,
    progress: Progress = no_progress,
    snapshot: Callable[[Images], None] | None = None,
    batches: BatchCache | None = None,
) -> tuple[Inversion, Curve]:
    """Search for `images` and store the result, or load it if it is stored already.

    Args:
        search: the search
        images: the originals, `(B, 3, H, W)` in [0, 1]
        ids: names of the images, for the curve
        metrics: metrics of the curve; None for no curve
        progress: called during the search
        snapshot: called with the best images so far at every step of the curve
        batches: store of finished batches; None to store nothing
    """
    stored = batches.load(images) if batches else None
    if stored is not None and (metrics is None or stored[1]):
        return stored
    curve: Curve = []
    for found in search(images, progress=progress):
        if metrics is None:
            continue
        scores, seconds = metrics.to(images.device)(found.images, images), found.seconds / len(images)
        columns = (ids, scores["psnr"], scores["lpips"] or [None] * len(ids), found.loss.tolist())
        for name, psnr, lpips, loss in zip(*columns, strict=True):
            row = {"id": name, "step": found.step, "seconds": seconds, "psnr": psnr, "lpips": lpips}
            curve.append(row | {"feature_loss": loss})
        if snapshot is not None:
            snapshot(found.images)
    if batches:
        batches.save(images, found, curve)
    return found, curve


@torch.no_grad()
def mean_features(encoders: FeatureSource, batches: Iterable[Tensor]) -> list[Tensor]:
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
        prior: image that the same procedure finds for `mean_features`, `(1, 3, H, W)` in [0, 1], to be scored against
            every original; None for none
        device: device to measure on
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
        return summarise(evaluate_batches(batches, ids, metrics)[0].rows)

    other = scores(found.roll(1, 0)) if len(ids) > 1 else None
    prior_scores = None if prior is None else scores(prior.to(device).expand_as(originals))
    gallery = Gallery(downscale(originals), metrics.lpips)
    hits = gallery.identify(downscale(found))
    distance = "lpips" if "lpips" in hits else "correlation"
    return BoundControls(other, prior_scores, float(hits[distance].mean()), distance, len(ids))
