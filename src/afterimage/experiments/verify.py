"""Verification of finished runs: stored decoders are measured again, and changes since the run are named."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afterimage.config import (
    AfterimageError,
    BaselineConfig,
    DataConfig,
    absolute_weights,
    join_names,
    printable_path,
)
from afterimage.data.dataset import load_data, load_test_images
from afterimage.data.images import Data, ImageSet
from afterimage.evaluation.baselines import baseline
from afterimage.evaluation.evaluate import evaluate
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.inference import make_reconstruct_function
from afterimage.experiments.queue import check_weights
from afterimage.runs.files import read_json, sha256
from afterimage.runs.results import METRICS
from afterimage.runs.run import Run, environment
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.stored_features import open_features

TOLERANCE = {"psnr": 0.01, "ssim": 1e-4, "lpips": 1e-3}
"""Largest allowed difference between an image's score and the stored one, by metric; PSNR in dB. Another machine or
number of threads sums in another order; 0.01 dB of PSNR is 0.2 % of the squared error."""

SHOWN = 5
"""Number of missing images that a message names."""


@dataclass
class Verification:
    """The outcome of measuring one run again.

    Attributes:
        run: the run
        images: number of images that were measured
        max_differences: largest difference of any image's score from the stored one, by metric
        changes: differences between now and when the run was made
        problems: reasons why the stored scores do not hold
        missing: reasons why the run, or one of its metrics, cannot be measured here
        skipped: reason why rows of this kind are not measured; empty if they are
    """

    run: Run
    images: int = 0
    max_differences: dict[str, float] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def holds(self) -> bool:
        """True if the scores were measured again and agree."""
        return not (self.problems or self.missing or self.skipped)


class _CannotMeasure(AfterimageError):
    """Error that a measurement lacks images, weights or files, which says nothing about the scores."""


def verify_runs(
    runs: Iterable[Run],
    *,
    weights: str | None = None,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> list[Verification]:
    """Measure every run's decoder or baseline again on its own images, and compare the scores with the stored ones.

    Scores hold if every image's scores are within `TOLERANCE`. A run that cannot be measured, because it is not done or
    images or weights are missing, neither holds nor has problems; rows of other kinds are skipped.

    Args:
        runs: the runs
        weights: file or folder of the encoders' weights; None for each run's own setting
        cache, accelerator, progress: as for `queue.train_runs`

    Returns:
        one verification for each run, in order
    """
    load = functools.cache(functools.partial(_load, cache=cache, progress=progress))
    verifications = [Verification(run) for run in runs]
    for verification in verifications:
        progress(f"verifying {verification.run.name}", 1, 1)
        try:
            _verify(verification, load, weights, accelerator, progress)
        except _CannotMeasure as error:
            verification.missing.append(str(error))
        except AfterimageError as error:
            verification.problems.append(str(error))
        if verification.problems:
            verification.changes += _versions(verification.run)
    return verifications


def _verify(
    verification: Verification,
    load: Callable[[DataConfig], tuple[ImageSet, Data | None, Sequence[str]]],
    weights: str | None,
    accelerator: str,
    progress: Progress,
) -> None:
    run, changes = verification.run, verification.changes
    if run.state != "done":
        raise _CannotMeasure(f"it is not finished (state: {run.state})")
    result = run.result
    if result.kind not in ("decoder", "baseline"):
        verification.skipped = f"rows of kind {result.kind} are not measured again"
        return
    # The files of the run
    config, decoder = result.config, run.file("decoder.safetensors")
    if not run.name.endswith(config.digest[:8]):
        changes.append("the settings: config.toml is not the one that named the folder")
    if result.training and not decoder.exists():
        raise _CannotMeasure(f"{decoder.name} is missing from the run's folder")
    if result.training and result.training.decoder_sha256 != sha256(decoder):
        changes.append("the decoder: decoder.safetensors is not the one that was measured")

    # Its images
    test, data, notes = load(config.data)
    then = result.data
    changes += [f"the images: {note}" for note in notes]
    if data is not None and then.digest != data.digest:
        changes.append(
            f"the images: digest {then.digest[:12]} then, {data.digest[:12]} now; training/validation/test "
            f"{then.train}/{then.validation}/{then.test_images} then, "
            f"{len(data.train)}/{len(data.validation)}/{len(data.test)} now"
        )
    stored, here = [row["id"] for row in result.per_image], list(test.ids)
    if stored != here:
        known = set(here)
        lost = [one for one in stored if one not in known]
        named = f"; missing: {join_names(lost, SHOWN)}" if lost else ""
        raise _CannotMeasure(
            f"other test images: {len(stored)} were measured then, {len(here)} are here, or other ids{named}"
        )

    # Its scores
    metrics = Metrics(result.lpips.net, size=min(config.data.size))
    before, now = (s.weights and s.weights.sha256 for s in (result.lpips, metrics.lpips_status))
    if before != now:
        changes.append(f"LPIPS: weights {before and before[:12]} then, {now and now[:12]} now")
    if isinstance(config, BaselineConfig):
        found = evaluate(baseline(config.baseline), test, metrics, progress=progress)
    else:
        try:
            device = create_single_device_fabric(accelerator, config.recipe.precision).device
            if config.features is not None and not weights:
                open_features(config.features, progress)
            else:
                check_weights(config.models, absolute_weights(weights or config.weights))
        except AfterimageError as error:
            raise _CannotMeasure(str(error)) from None
        reconstruct = make_reconstruct_function(config.recipe.precision, run, weights=weights, device=device)
        options = {"batch_size": config.recipe.batch_size, "device": device, "progress": progress}
        found = evaluate(reconstruct, test, metrics, **options)
    _compare(verification, result.per_image, found.rows)


def _load(
    config: DataConfig, cache: Path | None, progress: Progress
) -> tuple[ImageSet, Data | None, Sequence[str]]:
    """Load a run's test images, and all of them if the training images are here too; or else notes."""
    try:
        try:
            data = load_data(config, cache=cache, progress=progress)
            return data.test, data, ()
        except AfterimageError:
            if not config.test:
                raise
        test, notes = load_test_images(config, cache=cache, progress=progress)
    except AfterimageError as error:
        raise _CannotMeasure(str(error)) from None
    return test, None, notes


def _compare(
    verification: Verification, stored: Sequence[Mapping[str, Any]], rows: list[dict[str, Any]]
) -> None:
    """Add to a verification each metric's largest difference, and metrics that do not agree or are not available."""
    verification.images = len(rows)
    for name in METRICS:
        pairs = [(before.get(name), now[name], now["id"]) for before, now in zip(stored, rows, strict=True)]
        if all(before is None for before, _, _ in pairs):
            continue
        if any(now is None for _, now, _ in pairs):
            verification.missing.append(f"{name} cannot be measured here")
            continue
        difference, image = max((abs(now - before), identity) for before, now, identity in pairs)
        verification.max_differences[name] = difference
        if not difference <= TOLERANCE[name]:
            limit = f"{TOLERANCE[name]:g}"
            verification.problems.append(
                f"{name} differs by up to {difference:.3g} (image {image}), over {limit}"
            )


def _versions(run: Run) -> list[str]:
    """Return the versions, the commit and the number of threads that differ from those of the run."""
    before: Any = None
    with contextlib.suppress(AfterimageError):  # the file may be missing or damaged
        before = read_json(run.file("environment.json"))
    versions = before.get("versions") if isinstance(before, dict) else None
    if not isinstance(versions, dict):
        return [f"the environment: {printable_path(run.file('environment.json'))} holds no versions"]
    now = environment() | {"threads": torch.get_num_threads()}
    pairs = {name: (before.get(name), now[name]) for name in ("python", "commit", "threads")}
    pairs |= {name: (versions.get(name), version) for name, version in now["versions"].items()}
    return [f"{name}: {old} then, {new} now" for name, (old, new) in pairs.items() if old != new]
