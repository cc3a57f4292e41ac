"""Score reconstructions image by image, and summarise the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError
from afterimage.data.images import ImageSet
from afterimage.evaluation.metrics import PSNR_CAP, Metrics, find_invalid_image
from afterimage.runs.results import METRICS, FeatureMap, Score
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from afterimage.runtime.terminal import Progress, no_progress

VISIBLE_SUFFIX = "_seen"
"""Suffix of the columns with scores over the visible region: the pixels in the receptive fields of all locations."""

Box = tuple[tuple[int, int], tuple[int, int]]
"""Part of images as `((top, bottom), (left, right))` in pixels; bottom and right are exclusive."""

Images = Float[Tensor, "batch 3 height width"]


class Evaluation(NamedTuple):
    """Scores of all images.

    Attributes:
        rows: one row for each image, in order: `id`, `psnr` in dB, `ssim`, `lpips` (None where unavailable), and
            `psnr_seen` and so on if the visible region is only a part of the images
        images: the first `keep` images: `(id, original, reconstruction)`, uint8 `(H, W, 3)`
    """

    rows: list[dict[str, Any]]
    images: list[tuple[str, np.ndarray, np.ndarray]]


def evaluate(
    reconstruct: Callable[[Images], Images],
    image_set: ImageSet,
    metrics: Metrics,
    *,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    progress: Progress = no_progress,
    keep: int = 0,
    seen: Box | None = None,
) -> Evaluation:
    """Measure how well images are reconstructed.

    Args:
        reconstruct: function from images `(B, 3, H, W)` in [0, 1] to reconstructions of the same shape; a module is in
            evaluation mode meanwhile
        image_set: the images
        metrics: the metrics to compute
        batch_size: number of images in a batch
        device: device of the images; by default the module's, else the CPU
        progress: called with the name of the task, the number of images measured, and the total
        keep: number of images that are returned with their reconstructions, as uint8
        seen: visible box of the features, within which images are also scored separately; None for whole images only

    Raises:
        AfterimageError: as `evaluate_batches`.
    """
    modules = [reconstruct] if isinstance(reconstruct, nn.Module) else []
    if device is None:
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with eval_mode(*modules):
        batches = reconstruct_batches(
            lambda images: [reconstruct(images)], image_set, batch_size=batch_size, device=device
        )
        options = {"progress": progress, "keep": keep, "seen": [seen]}
        (result,) = evaluate_batches(batches, image_set.ids, metrics, **options)
    return result


Reconstructed = tuple[Tensor, Tensor, Sequence[Tensor]]
"""Batch `(indices, images, reconstructions)`: the images' indices in their set `(B,)`, the images `(B, 3, H, W)` in
[0, 1], and a batch of reconstructions of the same shape for each of several methods."""


def reconstruct_batches(
    reconstruct: Callable[[Images], Sequence[Images]],
    image_set: ImageSet,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Iterator[Reconstructed]:
    """Yield the images of a set with their reconstructions by several methods, batch by batch.

    Put the modules that `reconstruct` calls into evaluation mode first (see `eval_mode`).
    """
    for indices in torch.arange(len(image_set)).split(batch_size):
        images = image_set.crops(indices, device=device)
        yield indices, images, list(reconstruct(images))


@torch.inference_mode()
def evaluate_batches(
    batches: Iterable[Reconstructed],
    ids: Sequence[str],
    metrics: Metrics,
    *,
    names: Sequence[str] = (),
    progress: Progress = no_progress,
    keep: int = 0,
    seen: Sequence[Box | None] = (),
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> list[Evaluation]:
    """Measure several reconstructions of each image in one pass over batches.

    Args:
        batches: all images of a set in order, each with the same number of reconstructions (see `reconstruct_batches`).
            The iterator runs without gradients. With several ranks, each passes its part of every batch, which may be
            empty
        ids: the ids of all images of the set
        metrics: the metrics to compute; they are moved to the images' device
        names: the method of each reconstruction, for messages
        progress: called with the name of the task, the number of images measured, and the total
        keep: number of images that are returned with their reconstructions, as uint8
        seen: for each reconstruction, the visible box of its features, within which it is also scored separately; None
            for whole images only
        ranks: the processes that measure together; each gets all evaluations

    Raises:
        AfterimageError: there are no images, shapes differ, or values are not finite or leave [0, 1]; the message names
            the method and, for wrong values, the image
    """
    if len(ids) == 0:
        raise AfterimageError("there are no images to evaluate on")
    batches, measured, done = iter(batches), [], 0
    while True:
        with ranks.raise_on_all_ranks():
            batch = next(batches, None)
            if batch is None:
                break
            indices, images, outputs = batch
            metrics.to(images.device)
            batch_ids = [ids[index] for index in indices.tolist()]
            for index, output in enumerate(outputs):
                _check(output, images, batch_ids, names[index] if names else "")
            kept = sum(index < keep for index in indices.tolist())
            originals, parts = to_uint8(images[:kept]), seen or [None] * len(outputs)
            scores = (
                score_rows(batch_ids, images, outputs, metrics, parts) if batch_ids else [[] for _ in outputs]
            )
            measured.append([])
            for rows, output in zip(scores, outputs, strict=True):
                pairs = zip(batch_ids[:kept], originals, to_uint8(output[:kept]), strict=True)
                measured[-1].append(Evaluation(rows, list(pairs)))
        done += ranks.batch_offset(len(indices))[1]
        progress("evaluating", done, len(ids))
    results = [Evaluation([], []) for _ in measured[0]]
    for batch in ranks.gather_batches(measured):
        for result, part in zip(results, batch, strict=True):
            result.rows.extend(part.rows)
            result.images.extend(part.images)
    return results


def score_rows(
    ids: Sequence[str],
    images: Images,
    outputs: Sequence[Images],
    metrics: Metrics,
    seen: Sequence[Box | None],
) -> list[list[dict[str, Any]]]:
    """Score several reconstructions of the same images; return for each its rows as in `Evaluation.rows`."""
    columns = metrics.compare(outputs, images)
    for box in {box for box in seen if box is not None}:
        numbers = [i for i, other in enumerate(seen) if other == box]
        found = metrics.compare(
            [crop_to_box(outputs[i], box) for i in numbers], crop_to_box(images, box), any_size=True
        )
        for i, scores in zip(numbers, found, strict=True):
            columns[i] |= {f"{name}{VISIBLE_SUFFIX}": values for name, values in scores.items()}
    results = []
    for scores in columns:
        names = [
            name for name in (*METRICS, *(f"{name}{VISIBLE_SUFFIX}" for name in METRICS)) if name in scores
        ]
        values = zip(*(scores[name] or [None] * len(ids) for name in names), strict=True)
        results.append(
            [{"id": i} | dict(zip(names, row, strict=True)) for i, row in zip(ids, values, strict=True)]
        )
    return results


def crop_to_box(images: Images, box: Box | None) -> Float[Tensor, "batch 3 _ _"]:
    """Crop images to a box; None keeps the whole images."""
    if box is None:
        return images
    (top, bottom), (left, right) = box
    return images[..., top:bottom, left:right]


def to_uint8(images: Images) -> np.ndarray:
    """Convert images in [0, 1] to uint8 `(B, H, W, 3)`, rounded to nearest."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode inside the block, and restore the mode of every submodule afterwards."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in before:
            part.training = training


def summarise(rows: Sequence[Mapping[str, Any]], suffix: str = "") -> dict[str, Score | None]:
    """Compute mean and standard deviation over images for each of `METRICS`; None for a metric that no row has.

    Args:
        rows: scores, a row for each image
        suffix: `VISIBLE_SUFFIX` for scores over the visible region

    Raises:
        AfterimageError: there are no rows, or only some of them have a metric
    """
    if not rows:
        raise AfterimageError("there are no scores to summarise")
    summary: dict[str, Score | None] = {}
    for name in METRICS:
        values = [row[f"{name}{suffix}"] for row in rows]
        missing = values.count(None)
        if 0 < missing < len(values):
            raise AfterimageError(f"{name} is missing for {missing} of {len(values)} images")
        summary[name] = None if missing else Score.of(values)
    return summary


def score_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note if images were reconstructed exactly, since these count as `PSNR_CAP` dB."""
    exact = sum(row["psnr"] >= PSNR_CAP for row in rows)
    return [f"{exact} of {len(rows)} images came back exactly and count as {PSNR_CAP:g} dB"] if exact else []


def visibility_notes(
    features: Sequence[FeatureMap],
    box: Box | None,
    size: tuple[int, int],
    rows: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Return notes on pixels that no location of the features sees.

    Args:
        features: the sources' `Encoder.describe` entries
        box: the visible region of all sources together; None if it is the whole image
        size: height and width of the images in pixels
        rows: scores that include those over the visible region, if they were measured
    """
    notes = [f"{layer.source}: {layer.unseen}" for layer in features if layer.unseen]
    if box is not None:
        (top, bottom), (left, right) = box
        share = 1 - (bottom - top) * (right - left) / (size[0] * size[1])
        note = (
            f"{share:.1%} of an image's pixels are seen by no location: they are filled in from those beside them and "
            "count in every score"
        )
        if rows:
            visible = summarise(rows, VISIBLE_SUFFIX)["psnr"].mean
            note += f"; on the other pixels alone the mean PSNR is {visible:.2f} dB"
        notes.append(note)
    return notes


def _check(output: Tensor, images: Tensor, ids: Sequence[str], name: str) -> None:
    who = f"the reconstruction by {name}" if name else "the reconstruction"
    if output.shape != images.shape:
        raise AfterimageError(f"{who} has shape {tuple(output.shape)}, its images {tuple(images.shape)}")
    if found := find_invalid_image(output):
        raise AfterimageError(f"{who} of image {ids[found[0]]} {found[1]}")
