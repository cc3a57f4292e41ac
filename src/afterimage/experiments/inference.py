"""Use of finished runs: what has changed since, measurement on any images, reconstruction of image files."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afterimage.config import AfterimageError, DataConfig, RunConfig, dump_toml, join_names
from afterimage.data.dataset import current_digests, load_data, load_test_images, prepare_image
from afterimage.evaluation.evaluate import VISIBLE_SUFFIX, Box, Evaluation, evaluate, summarise, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.models.decoders import decoder_digest
from afterimage.models.decoders.canvas import visible_box
from afterimage.models.encoders.providers import open_network
from afterimage.models.weight_files import load_decoder
from afterimage.runs.files import write_atomic, write_image
from afterimage.runs.lock import hold_lock
from afterimage.runs.results import CONFIG, Result, write_result
from afterimage.runs.run import Run
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.checkpoint import load_reconstructor

logger = logging.getLogger("afterimage")


def review_finished(
    runs: Mapping[Run, RunConfig],
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> None:
    """Warn of finished runs that would come out differently now, and measure the LPIPS that others lack.

    Images, weights and LPIPS networks that runs share are looked up once.

    Args:
        runs: the runs, each with the configuration that was asked for now
        cache, accelerator, progress: as for `queue.train_runs`
    """
    get_digest = functools.cache(lambda data: current_digests(data, cache=cache)[0])
    get_weights = functools.cache(lambda model, weights: open_network(model).find_weights(weights).sha256)
    get_metrics = functools.cache(lambda net, side: Metrics(net, size=side))
    unknown: dict[str, list[str]] = {}
    for run, config in runs.items():
        try:
            result = run.result
            if changes := _changes(run, result, get_digest, get_weights):
                logger.warning(
                    "%s was made from other %s: its scores are those of then. To train it again, remove its folder or "
                    "choose another --output-dir",
                    run.name,
                    " and ".join(changes),
                )
            elif not result.lpips.is_by(config.lpips):
                metrics = get_metrics(config.lpips, min(config.data.size))
                if metrics.lpips_status.available:
                    measure_lpips(run, metrics, cache=cache, accelerator=accelerator, progress=progress)
        except AfterimageError as error:
            unknown.setdefault(str(error), []).append(run.name)
    for error, names in unknown.items():
        logger.warning("whether %s would come out the same now is not known: %s", join_names(names), error)


def _changes(
    run: Run,
    result: Result,
    get_digest: Callable[[DataConfig], str],
    get_weights: Callable[[str, str], str],
) -> list[str]:
    """Return what a finished decoder was made from that is different now: images, weights or code of its encoders.

    Args:
        run: the run
        result: its result
        get_digest: returns the digest of the images of a data configuration
        get_weights: returns the digest of a model's weights, by its name and the setting `weights`

    Raises:
        AfterimageError: images or weights are not available, or a decoder from outside this package has other code
    """
    config = result.config
    if code := decoder_digest(config.decoder.name):
        load_decoder(run.file("decoder.safetensors"), {"code": code})
    digests = {"images": (result.data.digest, get_digest(config.data))}
    for before in result.weights if config.features is None else ():
        digests[f"code of {before.model}"] = before.code, open_network(before.model).code
        if not before.is_random:
            digests[f"weights of {before.model}"] = before.sha256, get_weights(before.model, config.weights)
    return [
        f"{what} (digest {then[:12]} then, {now[:12]} now)"
        for what, (then, now) in digests.items()
        if then != now
    ]


def measure_lpips(
    run: Run,
    metrics: Metrics,
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> None:
    """Measure a finished run's LPIPS with another network, and store it in the run's folder; other scores stay.

    Args:
        run: the run
        metrics: metrics with that network, which is available
        cache, accelerator, progress: as for `queue.train_runs`

    Raises:
        AfterimageError: the run's images or weights are not available, or its folder cannot be written
    """
    status = metrics.lpips_status
    progress(f"{run.name}: LPIPS ({status.net}) is measured", 1, 1)
    with hold_lock(run.path, lambda text: progress(text, 1, 1)):
        result = run.result
        box = visible_box([layer.spec for layer in result.features], result.config.data.size)
        device = create_single_device_fabric(accelerator).device
        found = evaluate_run(run, metrics, seen=box, cache=cache, device=device, progress=progress)
        rows = [
            row | {name: value for name, value in new.items() if name.startswith("lpips")}
            for row, new in zip(result.per_image, found.rows, strict=True)
        ]
        changes: dict[str, Any] = {"scores": {**result.scores, "lpips": summarise(rows)["lpips"]}}
        if result.scores_seen:
            visible = summarise(rows, VISIBLE_SUFFIX)["lpips"]
            changes["scores_seen"] = {**result.scores_seen, "lpips": visible}
        write_atomic(run.file(CONFIG), dump_toml(replace(result.config, lpips=status.net)))
        write_result(run.path, replace(result, lpips=status, per_image=tuple(rows), **changes))


def evaluate_run(
    run: Run,
    metrics: Metrics,
    *,
    test: str | None = None,
    weights: str | None = None,
    cache: Path | None = None,
    seen: Box | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = no_progress,
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
        seen: visible box of the features, within which images are also scored separately; None for whole images only
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
    reconstruct = make_reconstruct_function(precision, run, weights=weights, device=device)
    if data.test:
        images, _ = load_test_images(data, cache=cache, progress=progress)
    else:
        images = load_data(data, cache=cache, progress=progress).test
    return evaluate(reconstruct, images, metrics, seen=seen, device=device, progress=progress)


def make_reconstruct_function(
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


class ReconstructedImage(NamedTuple):
    """An image and its reconstruction.

    Attributes:
        original: the image as the encoder saw it, `(H, W, 3)` uint8
        image: the reconstruction, `(H, W, 3)` uint8
        scores: scores by metric name; None for a metric that is not available
    """

    original: np.ndarray
    image: np.ndarray
    scores: dict[str, float | None]


def reconstruct_files(
    paths: Sequence[Path],
    run: Run,
    metrics: Metrics | None = None,
    *,
    weights: str | None = None,
    device: str = "cpu",
) -> list[ReconstructedImage]:
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
        results.append(ReconstructedImage(to_uint8(original)[0], to_uint8(rebuilt)[0], scores))
    return results


def write_side_by_side(rebuilt: ReconstructedImage, output: Path, decoder: str) -> None:
    """Write an image and its reconstruction side by side into a PNG file, without rescaling.

    Args:
        rebuilt: the image and its reconstruction
        output: the PNG file
        decoder: description of the decoder, stored in the file's metadata as `Decoder`
    """
    gap = np.full((len(rebuilt.original), 8, 3), 255, np.uint8)
    write_image(output, np.concatenate((rebuilt.original, gap, rebuilt.image), axis=1), {"Decoder": decoder})
