"""Use of finished runs, and of runs fitted on demand: measurement on any images, reconstruction of image files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afterimage.config import NATIVE, DataConfig, DecoderConfig, RunConfig
from afterimage.data.dataset import cache_folder, load_data, load_test, prepare_image
from afterimage.evaluation.evaluate import Evaluation, evaluate, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.queue import train_runs
from afterimage.models.encoders.providers import at_native_size, resolve
from afterimage.models.reconstructor import MultiEncoder
from afterimage.runs.files import write_image
from afterimage.runs.run import Run
from afterimage.runtime.terminal import Progress, silent
from afterimage.training.checkpoint import load_reconstructor

FITTED = "linear"
"""Name of the decoder that is fitted on demand, in closed form, within seconds."""
FIT_LIMITS = {"limit_train": 256, "limit_validation": 64, "limit_test": 16}
"""Limits of the images that fit this decoder, choose its ridge and score it, so that the wait stays short."""


def fit_run(
    source: str,
    data: str,
    *,
    weights: str = "pretrained",
    lpips: str = "alex",
    cache: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Run:
    """Fit a decoder to one layer on demand, or return the run of an earlier, identical fit.

    The run folder lies in the cache, in a folder named after a digest of the encoder's weights, the images and the
    package version. Images have the encoder's native size.

    Args:
        source: `model:layer`
        data: source of the images, limited by `FIT_LIMITS`; decoders of procedural images are scored on photographs
        weights: `pretrained`, a file or folder of weights, or a random control
        lpips: LPIPS network of the scores
        cache: folder of decoded images and of these runs; None for the default
        device: device of the computations
        progress: callback for progress and messages, see `Progress`

    Returns:
        the finished run

    Raises:
        AfterimageError: the model, layer or source is unknown, or weights or images are not available
    """
    source = resolve(source)
    drawn = data.partition(":")[0] == "procedural"
    named = DataConfig(data, test="photographs" if drawn else "", **FIT_LIMITS)
    images = at_native_size(named.sized(NATIVE), [source])
    config = RunConfig((source,), weights, decoder=DecoderConfig(FITTED), data=images, lpips=lpips)
    # An unknown layer raises before any image is read.
    encoder = MultiEncoder(config.sources, weights=weights, image_size=images.size, seed=config.seed)
    digest = load_data(images, cache=cache, progress=progress).digest
    made_of = [encoder.weight_digests(config.sources), digest, metadata.version("afterimage")]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    root = cache_folder(cache) / "fitted" / key[:16]
    (run,) = train_runs(config, root, cache=cache, accelerator=device, progress=progress)
    return run


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
    """Measure a finished run's decoder on test images, in the precision of its training, as its own scores were.

    If the test images have a source of their own, no others are read. A run of precision 16-mixed is measured in
    float32 on a CPU, which lacks it; `progress` then says so.

    Args:
        run: the run
        metrics: the metrics
        test: source of the test images; None for the run's own
        weights: file or folder of the encoders' weights; None for the run's own setting
        cache, progress: as for `queue.train_runs`
        device: device of the computations

    Raises:
        AfterimageError: images are missing, the run has no decoder, or the encoders' weights differ from those of the
            training
    """
    data = run.config.data
    if test is not None:
        data = replace(data, test=test, limit_test=None)
    precision = run.config.recipe.precision
    if precision == "16-mixed" and torch.device(device).type == "cpu":
        progress("measured in float32: the run's own precision, 16-mixed, needs a GPU", 1, 1)
        precision = "32-true"
    reconstruct = reconstruct_in(precision, run, weights=weights, device=device)
    if data.test:
        images, _ = load_test(data, cache=cache, progress=progress)
    else:
        images = load_data(data, cache=cache, progress=progress).test
    return evaluate(reconstruct, images, metrics, device=device, progress=progress)


def reconstruct_in(
    precision: str, run: Run, *, weights: str | None = None, device: str | torch.device = "cpu"
) -> Callable[[Tensor], Tensor]:
    """Return a function that reconstructs images with a finished run, in a precision that its device has.

    Args:
        precision: one of `PRECISIONS`; the scores of a run are those of its own
        run: the run
        weights: file or folder of the encoders' weights; None for the run's own setting
        device: device of the computations

    Raises:
        AfterimageError: the run has no decoder, or the encoders' weights differ from those of the training
    """
    reconstructor = load_reconstructor(run, weights=weights).to(device)
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16

    def reconstruct(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=precision != "32-true"):
            return reconstructor.reconstruct(images).float()

    return reconstruct


class Rebuilt(NamedTuple):
    """An image and its reconstruction.

    Attributes:
        original: the image as the encoder saw it, `(H, W, 3)` uint8
        image: the reconstruction, `(H, W, 3)` uint8
        scores: scores by metric name; None for a metric that is not available
    """

    original: np.ndarray
    image: np.ndarray
    scores: dict[str, float | None]


def rebuild(
    paths: Sequence[Path],
    run: Run,
    metrics: Metrics | None = None,
    *,
    weights: str | None = None,
    device: str = "cpu",
) -> list[Rebuilt]:
    """Reconstruct image files with a finished run; they are prepared like test images: resized, then centre-cropped.

    Args:
        paths: the image files
        run: the run
        metrics: the metrics; None for no scores
        weights: file or folder of the encoders' weights; None for the run's own setting
        device: device of the computations

    Raises:
        AfterimageError: a file is not an image, the run has no decoder, or the encoders' weights differ from those of
            the training
    """
    reconstructor, results = load_reconstructor(run, weights=weights).to(device), []
    for path in paths:
        original = prepare_image(path, run.config.data)
        rebuilt = reconstructor.reconstruct(original.to(device)).to(original.device)
        measured = metrics(rebuilt, original) if metrics is not None else {}
        scores = {name: values and values[0] for name, values in measured.items()}
        results.append(Rebuilt(to_uint8(original)[0], to_uint8(rebuilt)[0], scores))
    return results


def side_by_side(rebuilt: Rebuilt, output: Path, decoder: str) -> None:
    """Write an image and its reconstruction side by side into a PNG file, without rescaling.

    Args:
        rebuilt: the image and its reconstruction
        output: the PNG file
        decoder: description of the decoder, stored in the file's metadata as `Decoder`
    """
    gap = np.full((len(rebuilt.original), 8, 3), 255, np.uint8)
    write_image(output, np.concatenate((rebuilt.original, gap, rebuilt.image), axis=1), {"Decoder": decoder})
