"""Measure the controls of finished runs: the decoder's prior, the breakdown of its error, and the rate.

Each part is a JSON file and a CSV by image in the run folder, see `runs.controls.CONTROL_TYPES`.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afterimage.analysis.controls.error_breakdown import ErrorBreakdown
from afterimage.analysis.controls.feature_ablations import (
    BATCH,
    SAMPLE_IMAGES,
    distance,
    fill_channels,
    sample_features,
    shuffle,
)
from afterimage.analysis.controls.rate_distortion import (
    BITS,
    CLIPPED_SHARE,
    CODER,
    Quantiser,
    coded_bytes,
    entropy,
    histograms,
    measure_codecs,
)
from afterimage.config import AfterimageError, unknown_choice_error
from afterimage.data.dataset import load_data
from afterimage.data.images import Data
from afterimage.evaluation.baselines import mean_colour
from afterimage.evaluation.evaluate import summarise
from afterimage.evaluation.metrics import Metrics, psnr
from afterimage.models.reconstructor import Reconstructor
from afterimage.runs.controls import ABLATIONS, CONTROL_TYPES, read_part, write_part
from afterimage.runs.files import sha256
from afterimage.runs.results import METRICS
from afterimage.runs.run import TRACEBACK, Run, remove_traceback, write_traceback
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.failures import (
    clear_error_frames,
    error_scope,
    is_expected,
    protect_callback,
    to_afterimage_error,
)
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.checkpoint import load_reconstructor


def run_controls(
    runs: Iterable[Run],
    *,
    parts: Sequence[str] = tuple(CONTROL_TYPES),
    force: bool = False,
    weights: str | None = None,
    lpips: str | None = None,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> list[AfterimageError]:
    """Measure the controls of finished decoder runs on their own test images, and write them into the run folders.

    Baselines and inversions are skipped, and so are parts that were already measured with the same decoder and, if
    `lpips` names one, the same LPIPS network.

    Args:
        parts: names from `CONTROL_TYPES` to measure
        force: whether to repeat parts that were already measured
        weights: weights of the encoders; None takes the run's own
        lpips: LPIPS network; None takes the run's own
        progress: called with the progress; an exception that it raises ends everything

    Returns:
        an error for each run or part of a run that could not be measured; the traceback is in the run folder

    Raises:
        AfterimageError: a part is not one of `CONTROL_TYPES`
    """
    progress = protect_callback(progress)
    for part in parts:
        if part not in CONTROL_TYPES:
            raise unknown_choice_error("part of the controls", part, CONTROL_TYPES)
    device = create_single_device_fabric(accelerator).device
    # Runs of the same images follow each other.
    load = lru_cache(maxsize=1)(lambda config: load_data(config, cache=cache, progress=progress))
    curves = lru_cache(maxsize=1)(_codecs)
    failures: list[AfterimageError] = []
    for run in runs:
        with _recorded(failures, run):
            if run.state != "done":
                raise AfterimageError(
                    f"run {run.name} is not finished (state: {run.state}): it has no controls"
                )
            if run.result.kind != "decoder":
                continue
            missing = [part for part in parts if force or not _is_fresh(run, part, lpips)]
            for part in {"controls", *missing}:
                remove_traceback(run, f"{part}.{TRACEBACK}")
            if missing:
                options = (weights, lpips or run.lpips_net, device, progress, failures)
                _measure(run, missing, load(run.config.data), curves, *options)
    return failures


@contextlib.contextmanager
def _recorded(failures: list[AfterimageError], run: Run, part: str = "controls") -> Iterator[None]:
    """Record an error of this block as the failure of one part, unless it affects more."""
    try:
        yield
    except Exception as error:
        if error_scope(error):
            raise
        file = f"{part}.{TRACEBACK}"
        name = run.name if is_expected(error) else f"{part} of {run.name}"
        failures.append(to_afterimage_error(error, name, run.file(file)))
        write_traceback(run, error, file)
        clear_error_frames(error)


def _codecs(data: Data) -> list[dict[str, Any]]:
    """Return the JPEG and WebP curves of the test images."""
    return measure_codecs(data.test.batches(torch.arange(len(data.test)).split(BATCH)))


def _is_fresh(run: Run, part: str, lpips: str | None) -> bool:
    try:
        facts, _ = read_part(run, part)
    except AfterimageError:  # missing, damaged or of another version
        return False
    scored = getattr(facts, "lpips", None)  # parts without LPIPS hold no network
    return facts.decoder == _digest(run) and (lpips is None or scored is None or scored.net == lpips)


def _digest(run: Run) -> str:
    path = run.file("decoder.safetensors")
    if not path.exists():
        raise AfterimageError(f"run {run.name} holds no decoder.safetensors to measure")
    return sha256(path)


@torch.no_grad()
def _measure(
    run: Run,
    parts: Sequence[str],
    data: Data,
    curves: Callable[[Data], list[dict[str, Any]]],
    weights: str | None,
    lpips: str,
    device: torch.device,
    progress: Progress,
    failures: list[AfterimageError],
) -> None:
    """Measure parts of the controls in one pass over the test images; a part that raises is left out from then on."""
    image_set = data.test
    if len(image_set) < 2:
        raise AfterimageError(
            f"run {run.name}: controls need two test images or more, it has {len(image_set)}"
        )
    reconstructor = load_reconstructor(run, weights=weights).to(device)
    encoders, head = reconstructor.encoders, reconstructor.feature_decoder
    values = sample_features(encoders, data.train, device=device)
    makers: dict[str, Callable[[], Any]] = {
        "controls": lambda: _AblationMeasure(
            reconstructor, values, Metrics(lpips, size=min(data.config.size))
        ),
        "error_breakdown": ErrorBreakdown,
        "rate_distortion": lambda: _RateDistortionMeasure(reconstructor, values, data, curves),
    }
    measures: dict[str, Any] = {}

    for part in parts:
        with _recorded(failures, run, part):
            measures[part] = makers[part]()
    for indices in torch.arange(len(image_set)).split(BATCH) if measures else ():
        # The first image of the set follows the last.
        following = (indices[-1:] + 1) % len(image_set)
        images = image_set.crops(torch.cat([indices, following]), device=device)
        features, images = encoders(images), images[:-1]
        own, others = [maps[:-1] for maps in features], [maps[1:] for maps in features]
        ids = [image_set.ids[i] for i in indices.tolist()]
        rebuilt = head(own)
        for part in list(measures):
            measure = measures.pop(part)
            with _recorded(failures, run, part):
                measure.add(ids, images, rebuilt, own, others)
                measures[part] = measure
        progress(f"controls of {run.name}", int(indices[-1]) + 1, len(image_set))
    digest = _digest(run)
    for part, measure in measures.items():
        with _recorded(failures, run, part):
            write_part(run, part, {"decoder": digest, **measure.result()}, measure.rows)


class _AblationMeasure:
    """Scores of the decoder's images from features other than the original's own."""

    def __init__(self, reconstructor: Reconstructor, values: Sequence[Tensor], metrics: Metrics) -> None:
        self.encoders, self.feature_decoder = reconstructor.encoders, reconstructor.feature_decoder
        self.metrics = metrics.to(next(reconstructor.parameters()).device)
        self.means = [table.mean(1) for table in values]
        self.generator = torch.Generator().manual_seed(0)
        self.rows: list[dict[str, Any]] = []

    def add(
        self, ids: list[str], images: Tensor, rebuilt: Tensor, own: list[Tensor], others: list[Tensor]
    ) -> None:
        inputs = {
            "another": others,
            "shuffled": shuffle(own, self.generator),
            "mean": fill_channels(own, self.means),
            "zero": [torch.zeros_like(maps) for maps in own],
        }
        outputs = {"own": rebuilt, **{name: self.feature_decoder(maps) for name, maps in inputs.items()}}
        outputs["colour"] = mean_colour(images)
        distances = {
            "reencoded": distance(own, self.encoders(rebuilt)).tolist(),
            "random_pair": distance(own, others).tolist(),
        }
        scores = dict(zip(outputs, self.metrics.compare(list(outputs.values()), images), strict=True))
        for i, identity in enumerate(ids):
            row: dict[str, Any] = {"id": identity, **{name: d[i] for name, d in distances.items()}}
            for name, score in scores.items():
                row |= {f"{name}_{metric}": score[metric] and score[metric][i] for metric in METRICS}
            self.rows.append(row)

    def _columns(self, name: str) -> list[dict[str, Any]]:
        return [{metric: row[f"{name}_{metric}"] for metric in METRICS} for row in self.rows]

    def result(self) -> dict[str, Any]:
        names = ("own", *ABLATIONS)
        return {
            "images": len(self.rows),
            "lpips": asdict(self.metrics.lpips_status),
            "controls": {
                name: {m: score and asdict(score) for m, score in summarise(self._columns(name)).items()}
                for name in names
            },
            "distances": {
                name: statistics.fmean(row[name] for row in self.rows)
                for name in ("reencoded", "random_pair")
            },
        }


class _RateDistortionMeasure:
    """Rate and PSNR of reconstructions from quantised features, which the decoder was not trained on."""

    def __init__(
        self,
        reconstructor: Reconstructor,
        values: Sequence[Tensor],
        data: Data,
        curves: Callable[[Data], list[dict[str, Any]]],
    ) -> None:
        self.feature_decoder, self.data, self.curves = reconstructor.feature_decoder, data, curves
        self.pixels, self.specs = math.prod(data.config.size), reconstructor.encoders.specs
        self.quantisers = {bits: [Quantiser.fit(table, bits) for table in values] for bits in BITS}
        self.counts: dict[int, list[Tensor | float]] = {bits: [0.0] * len(values) for bits in BITS}
        self.rows: list[dict[str, Any]] = []

    def add(
        self, ids: list[str], images: Tensor, rebuilt: Tensor, own: list[Tensor], others: list[Tensor]
    ) -> None:
        raw = [4 * sum(spec.values for spec in self.specs)] * len(ids)
        self._add(ids, 32, raw, psnr(rebuilt, images))
        for bits, quantisers in self.quantisers.items():
            symbols = [q.encode(maps) for q, maps in zip(quantisers, own, strict=True)]
            counts = [histograms(s, bits) for s in symbols]
            self.counts[bits] = [a + b for a, b in zip(self.counts[bits], counts, strict=True)]
            sizes = [sum(parts) for parts in zip(*map(coded_bytes, symbols), strict=True)]
            decoded = [q.decode(s) for q, s in zip(quantisers, symbols, strict=True)]
            self._add(ids, bits, sizes, psnr(self.feature_decoder(decoded), images))

    def _add(self, ids: list[str], bits: int, sizes: list[int], scores: Tensor) -> None:
        for identity, size, score in zip(ids, sizes, scores.tolist(), strict=True):
            rate = 8 * size / self.pixels
            self.rows.append(
                {"id": identity, "bits": bits, "bytes": size, "bits_per_pixel": rate, "psnr": score}
            )

    def result(self) -> dict[str, Any]:
        return {
            "images": len({row["id"] for row in self.rows}),
            "coder": CODER,
            "range": [CLIPPED_SHARE, 1 - CLIPPED_SHARE],
            "training_images": min(len(self.data.train), SAMPLE_IMAGES),
            "points": [self._point(bits) for bits in (32, *BITS)],
            "codecs": self.curves(self.data),
        }

    def _point(self, bits: int) -> dict[str, Any]:
        rows = [row for row in self.rows if row["bits"] == bits]
        point: dict[str, Any] = {"bits": bits} | {
            name: statistics.fmean(row[name] for row in rows) for name in ("bits_per_pixel", "psnr")
        }
        if bits in self.counts:
            total = sum(
                float(entropy(counts).sum()) * spec.locations
                for counts, spec in zip(self.counts[bits], self.specs, strict=True)
            )
            point["entropy_bits_per_pixel"] = total / self.pixels
        return point
