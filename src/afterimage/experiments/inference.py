"""A finished run put to use: measured again, on its own images or on others, or given an image of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from afterimage.data.dataset import load_data, load_test, prepare_image
from afterimage.evaluation.evaluate import Evaluation, evaluate, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.runs.files import write_image
from afterimage.runs.run import Run
from afterimage.runtime.progress import Progress, silent
from afterimage.training.checkpoint import load_reconstructor


def evaluate_run(
    run: Run,
    metrics: Metrics,
    *,
    test: str | None = None,
    weights: str | None = None,
    cache: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Evaluation:
    """Measure a finished run's decoder on its own test images, or on the source that `test` names.

    Test images from a source of their own need no training images. Raises `AfterimageError` where the run has no
    decoder, or its encoder's weights are not those of the training.
    """
    data = run.config.data
    if test is not None:
        data = replace(data, test=test, limit_test=None)
    reconstructor = load_reconstructor(run, weights=weights).to(device)
    if data.test:
        images, _ = load_test(data, cache=cache, progress=progress)
    else:
        images = load_data(data, cache=cache, progress=progress).test
    return evaluate(reconstructor, images, metrics, device=device, progress=progress)


class Rebuilt(NamedTuple):
    """An image as the encoder saw it and what came back, uint8 `(H, W, 3)`; scores by name, None where unavailable."""

    original: np.ndarray
    image: np.ndarray
    scores: dict[str, float | None]


def rebuild(
    paths: Sequence[Path], run: Run, metrics: Metrics, *, weights: str | None = None, device: str = "cpu"
) -> list[Rebuilt]:
    """Rebuild image files through a finished run, each prepared as test images are: shorter side to the run's
    `resize`, centre crop.

    Raises `AfterimageError` for a file that is no image, and as `load_reconstructor` does.
    """
    reconstructor, results = load_reconstructor(run, weights=weights).to(device), []
    for path in paths:
        original = prepare_image(path, run.config.data.resize, run.config.data.crop)
        rebuilt = reconstructor.reconstruct(original.to(device)).to(original.device)
        scores = {name: values and values[0] for name, values in metrics(rebuilt, original).items()}
        results.append(Rebuilt(to_uint8(original)[0], to_uint8(rebuilt)[0], scores))
    return results


def side_by_side(rebuilt: Rebuilt, output: Path) -> None:
    """Save original and reconstruction beside each other as PNG, pixel for pixel."""
    gap = np.full((len(rebuilt.original), 8, 3), 255, np.uint8)
    write_image(output, np.concatenate((rebuilt.original, gap, rebuilt.image), axis=1))
