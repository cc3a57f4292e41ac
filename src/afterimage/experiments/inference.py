"""Use a finished run: measure it again, on its own images or others, or reconstruct image files."""

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
    """Measure a finished run's decoder on test images. Test images from a source of their own need no training images.

    Args:
        run: the run
        metrics: the metrics
        test: source of the test images; None for the run's own
        weights: file or folder of the encoders' weights; None for the run's own setting
        cache: folder of decoded images; None for the default
        device: device of the computations
        progress: called with what is done, how far it is, and the total

    Raises:
        AfterimageError: images are missing, the run has no decoder, or the encoders' weights are not those it was
            trained on
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
    """An image and its reconstruction.

    Attributes:
        original: the image as the encoder saw it, `(H, W, 3)` uint8
        image: the reconstruction, likewise
        scores: metrics by name; None for one that is not available
    """

    original: np.ndarray
    image: np.ndarray
    scores: dict[str, float | None]


def rebuild(
    paths: Sequence[Path], run: Run, metrics: Metrics, *, weights: str | None = None, device: str = "cpu"
) -> list[Rebuilt]:
    """Reconstruct image files through a finished run, prepared like test images: resized, then the centre crop.

    Args:
        paths: the image files
        run: the run
        metrics: the metrics
        weights: file or folder of the encoders' weights; None for the run's own setting
        device: device of the computations

    Raises:
        AfterimageError: a file is no image, the run has no decoder, or the encoders' weights are not those it was
            trained on
    """
    reconstructor, results = load_reconstructor(run, weights=weights).to(device), []
    for path in paths:
        original = prepare_image(path, run.config.data)
        rebuilt = reconstructor.reconstruct(original.to(device)).to(original.device)
        scores = {name: values and values[0] for name, values in metrics(rebuilt, original).items()}
        results.append(Rebuilt(to_uint8(original)[0], to_uint8(rebuilt)[0], scores))
    return results


def side_by_side(rebuilt: Rebuilt, output: Path) -> None:
    """Write an image and its reconstruction beside each other into a PNG file, pixel for pixel."""
    gap = np.full((len(rebuilt.original), 8, 3), 255, np.uint8)
    write_image(output, np.concatenate((rebuilt.original, gap, rebuilt.image), axis=1))
