"""A finished run put to use: measured again, on its own pictures or on others, or given a picture of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from afterimage.data import load_data, prepare_picture
from afterimage.evaluate import Evaluation, evaluate, to_uint8
from afterimage.metrics import Metrics
from afterimage.progress import Progress, silent
from afterimage.reconstructor import Reconstructor
from afterimage.runs import Run, write_image


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

    Raises `AfterimageError` where the run has no decoder, or its encoder's weights are not those of the training.
    """
    data = run.config.data
    if test is not None:
        data = replace(data, test=test, limit_test=None)
    reconstructor = Reconstructor.open(run, weights=weights).to(device)
    pictures = load_data(data, cache=cache, progress=progress).test
    return evaluate(reconstructor, pictures, metrics, device=device, progress=progress)


def reconstruct_picture(
    path: Path, run: Run, output: Path, metrics: Metrics, *, weights: str | None = None
) -> dict[str, float | None]:
    """Rebuild one picture file through a finished run and save original and reconstruction side by side as PNG.

    The picture is prepared as test pictures are: shorter side to the run's `resize`, centre crop. Returns its
    scores by name, None where unavailable.
    """
    reconstructor = Reconstructor.open(run, weights=weights)
    original = prepare_picture(path, run.config.data.resize, run.config.data.crop)
    rebuilt = reconstructor.reconstruct(original)
    scores = metrics(rebuilt, original)
    gap = np.full((original.shape[-2], 8, 3), 255, np.uint8)
    write_image(output, np.concatenate((to_uint8(original)[0], gap, to_uint8(rebuilt)[0]), axis=1))
    return {name: None if values is None else values[0] for name, values in scores.items()}
