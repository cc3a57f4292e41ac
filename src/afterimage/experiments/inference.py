"""A finished run put to use: measured again, on its own pictures or on others, or given a picture of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from afterimage.data.dataset import load_data, load_test, prepare_picture
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
    """Measure a finished run's decoder on its own test pictures, or on the source that `test` names.

    Test pictures from a source of their own need no training pictures. Raises `AfterimageError` where the run has no
    decoder, or its encoder's weights are not those of the training.
    """
    data = run.config.data
    if test is not None:
        data = replace(data, test=test, limit_test=None)
    reconstructor = load_reconstructor(run, weights=weights).to(device)
    if data.test:
        pictures, _ = load_test(data, cache=cache, progress=progress)
    else:
        pictures = load_data(data, cache=cache, progress=progress).test
    return evaluate(reconstructor, pictures, metrics, device=device, progress=progress)


class Rebuilt(NamedTuple):
    """A picture as the encoder saw it and what came back, uint8 `(H, W, 3)`; scores by name, None where unavailable."""

    original: np.ndarray
    picture: np.ndarray
    scores: dict[str, float | None]


def rebuild(
    paths: Sequence[Path], run: Run, metrics: Metrics, *, weights: str | None = None
) -> list[Rebuilt]:
    """Rebuild picture files through a finished run, each prepared as test pictures are: shorter side to the run's
    `resize`, centre crop.

    Raises `AfterimageError` for a file that is no picture, and as `load_reconstructor` does.
    """
    reconstructor, results = load_reconstructor(run, weights=weights), []
    for path in paths:
        original = prepare_picture(path, run.config.data.resize, run.config.data.crop)
        rebuilt = reconstructor.reconstruct(original)
        scores = {name: values and values[0] for name, values in metrics(rebuilt, original).items()}
        results.append(Rebuilt(to_uint8(original)[0], to_uint8(rebuilt)[0], scores))
    return results


def side_by_side(rebuilt: Rebuilt, output: Path) -> None:
    """Save original and reconstruction beside each other as PNG, pixel for pixel."""
    gap = np.full((len(rebuilt.original), 8, 3), 255, np.uint8)
    write_image(output, np.concatenate((rebuilt.original, gap, rebuilt.picture), axis=1))
