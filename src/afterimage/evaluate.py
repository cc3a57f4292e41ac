"""Per-picture scores of reconstructions, and their summary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError
from afterimage.data import Pictures
from afterimage.metrics import PSNR_CAP, Metrics, problem
from afterimage.progress import Progress, silent
from afterimage.ranks import ALONE, Ranks

SCORES = ("psnr", "ssim", "lpips")

Images = Float[Tensor, "batch 3 height width"]


class Evaluation(NamedTuple):
    """What `evaluate` returns.

    `rows` holds one row a picture, in the pictures' order: `id`, `psnr` in dB, `ssim`, `lpips` (None where
    unavailable). `pictures` holds the first ones, as many as asked for: `(id, original, reconstruction)`,
    uint8 `(H, W, 3)`.
    """

    rows: list[dict[str, Any]]
    pictures: list[tuple[str, np.ndarray, np.ndarray]]


def evaluate(
    reconstruct: Callable[[Images], Images],
    pictures: Pictures,
    metrics: Metrics,
    *,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    keep: int = 0,
) -> Evaluation:
    """Measure `reconstruct`, which takes pictures `(B, 3, H, W)` in [0, 1] to pictures like them.

    A module is put into evaluation mode and back. `device` is by default where a module is, else the CPU. See
    `evaluate_together` for `keep`, `progress` and errors.
    """
    modules = [reconstruct] if isinstance(reconstruct, nn.Module) else []
    if device is None:
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with evaluating(*modules):
        (result,) = evaluate_together(
            lambda images: [reconstruct(images)],
            pictures,
            metrics,
            batch_size=batch_size,
            device=device,
            progress=progress,
            keep=keep,
        )
    return result


@torch.inference_mode()
def evaluate_together(
    reconstruct: Callable[[Images], Sequence[Images]],
    pictures: Pictures,
    metrics: Metrics,
    *,
    names: Sequence[str] = (),
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    keep: int = 0,
    ranks: Ranks = ALONE,
) -> list[Evaluation]:
    """Measure several reconstructions of each picture; what they share, such as an encoder, runs once.

    `reconstruct` takes pictures `(B, 3, H, W)` in [0, 1] to a list of such pictures, always of one length;
    modules behind it belong in evaluation mode (see `evaluating`). The first `keep` pictures are returned
    as uint8. Of several `ranks` each measures its part of every batch, which may be none; all of them return
    all rows and pictures, in the order of one process. Raises `AfterimageError` that names the picture, and the
    reconstruction by `names`, where shapes differ or values are not finite or leave [0, 1].
    """
    if len(pictures) == 0:
        raise AfterimageError("there are no pictures to evaluate on")
    metrics.to(device)
    ids, done = list(pictures.ids), 0
    batches: list[list[Evaluation]] = []
    for indices in torch.arange(len(ids)).split(batch_size):
        with ranks.agreed():
            own = indices[ranks.part(len(indices))]
            images = pictures.crops(own, device=device)
            outputs = list(reconstruct(images))
            batch = [ids[index] for index in own.tolist()]
            for index, output in enumerate(outputs):
                _check(output, images, batch, names[index] if names else "")
            kept = sum(index < keep for index in own.tolist())
            batches.append(_measured(batch, images, outputs, kept, metrics))
        done += len(indices)
        progress("evaluating", done, len(ids))
    results = [Evaluation([], []) for _ in batches[0]]
    for batch in ranks.in_order(batches):
        for result, part in zip(results, batch, strict=True):
            result.rows.extend(part.rows)
            result.pictures.extend(part.pictures)
    return results


def _measured(
    ids: Sequence[str], images: Tensor, outputs: Sequence[Tensor], keep: int, metrics: Metrics
) -> list[Evaluation]:
    """One batch's evaluation for each of several outputs; of an empty batch, nothing."""
    if not ids:
        return [Evaluation([], []) for _ in outputs]
    results = []
    for output, scores in zip(outputs, metrics.compare(outputs, images), strict=True):
        columns = [scores[name] or [None] * len(ids) for name in SCORES]
        rows = [dict(zip(("id", *SCORES), row, strict=True)) for row in zip(ids, *columns, strict=True)]
        pairs = zip(ids[:keep], to_uint8(images[:keep]), to_uint8(output[:keep]), strict=True)
        results.append(Evaluation(rows, list(pairs)))
    return results


def to_uint8(images: Images) -> np.ndarray:
    """Pictures in [0, 1] as uint8 `(B, H, W, 3)`, rounded to nearest."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode inside the block; afterwards every submodule is back in the mode it had."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in before:
            part.training = training


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """`{"psnr": {"mean", "std", "count"}, "ssim": {...}, "lpips": {...}}` over pictures.

    `std` is the sample standard deviation (n - 1); None for a single picture, which has none. A score that
    no row has is None; one that only some rows have is an `AfterimageError`.
    """
    if not rows:
        raise AfterimageError("there are no scores to summarise")
    return {name: _summary(name, [row[name] for row in rows]) for name in SCORES}


def score_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the scores has to know: pictures that came back exactly count as `PSNR_CAP` dB."""
    exact = sum(row["psnr"] >= PSNR_CAP for row in rows)
    return (
        [f"{exact} of {len(rows)} pictures came back exactly and count as {PSNR_CAP:g} dB"] if exact else []
    )


def _summary(name: str, values: list[float | None]) -> dict[str, Any] | None:
    if all(value is None for value in values):
        return None
    if None in values:
        raise AfterimageError(f"{name} is missing for {values.count(None)} of {len(values)} pictures")
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "count": len(values)}


def _check(output: Tensor, images: Tensor, ids: Sequence[str], name: str) -> None:
    who = f"the reconstruction by {name}" if name else "the reconstruction"
    if output.shape != images.shape:
        raise AfterimageError(f"{who} has shape {tuple(output.shape)}, its pictures {tuple(images.shape)}")
    if found := problem(output):
        raise AfterimageError(f"{who} of picture {ids[found[0]]} {found[1]}")
