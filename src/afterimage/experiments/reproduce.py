"""Verification of finished runs: stored decoders are measured again, and changes since the run are named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afterimage.config import (
    RANDOM_WEIGHTS,
    AfterimageError,
    BaselineConfig,
    DataConfig,
    absolute_weights,
    shown,
    split_source,
)
from afterimage.data.dataset import load_data, load_test
from afterimage.data.images import ImageSet
from afterimage.evaluation.baselines import baseline
from afterimage.evaluation.evaluate import evaluate, summarise
from afterimage.evaluation.metrics import Metrics
from afterimage.models.encoders.providers import open_network
from afterimage.runs.files import read_json, sha256
from afterimage.runs.results import METRICS, Result
from afterimage.runs.run import Run, environment
from afterimage.runtime.device import one_device
from afterimage.runtime.terminal import Progress, silent
from afterimage.training.checkpoint import load_reconstructor
from afterimage.training.stored_features import open_features

TOLERANCE = {"psnr": 0.01, "ssim": 1e-4, "lpips": 1e-3}
"""Largest allowed difference between an image's score and the stored one, by metric; PSNR in dB. Another machine or
number of threads sums in another order; 0.01 dB of PSNR is 0.2 % of the squared error."""

SHOWN = 5
"""Number of missing images that a message names."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of measuring one run again.

    Attributes:
        run: the run
        images: number of images that were measured
        worst: largest difference of any image's score from the stored one, by metric
        changes: differences between now and when the run was made
        problems: reasons why the stored scores do not hold
        missing: reasons why the run, or one of its metrics, cannot be measured here
        skipped: reason why rows of this kind are not measured; empty if they are
    """

    run: Run
    images: int = 0
    worst: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def holds(self) -> bool:
        """True if the scores were measured again and agree."""
        return not (self.problems or self.missing or self.skipped)


class _Missing(AfterimageError):
    """Error that a measurement lacks images, weights or files, which says nothing about the scores."""


def verify_runs(
    runs: Iterable[Run],
    *,
    weights: str | None = None,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
) -> list[Verdict]:
    """Measure every run's decoder or baseline again on its own images, and compare the scores with the stored ones.

    Scores hold if every image's scores are within `TOLERANCE`. A run that cannot be measured, because it is not done or
    images or weights are missing, neither holds nor has problems; rows of other kinds are skipped.

    Args:
        runs: the runs
        weights: file or folder of the encoders' weights; None for each run's own setting
        cache: folder of decoded images; None for the default
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        progress: callback for progress and messages, see `Progress`

    Returns:
        one verdict for each run, in order
    """
    loaded: dict[DataConfig, _Loaded] = {}
    verdicts = []
    for run in runs:
        progress(f"verifying {run.name}", 1, 1)
        problems: list[str] = []
        missing: list[str] = []
        changes: list[str] = []
        worst: dict[str, float] = {}
        images = 0
        try:
            if run.state != "done":
                raise _Missing(f"it is not finished (state: {run.state})")
            result = run.result
            if result.kind not in ("decoder", "baseline"):
                verdicts.append(Verdict(run, skipped=f"rows of kind {result.kind} are not measured again"))
                continue
            data, images = result.config.data, len(result.per_image)
            problems += _within(result)
            changes += _folder_changes(run, result)
            if data not in loaded:
                loaded[data] = _load(data, cache, progress)
            changes += _image_changes(result, loaded[data])
            _same_images(result.per_image, loaded[data].test)
            rows = _measured(run, result, loaded[data], weights, accelerator, progress, changes)
            worst = _compare(result.per_image, rows, problems, missing)
        except _Missing as error:
            missing.append(str(error))
        except AfterimageError as error:
            problems.append(str(error))
        if problems:
            changes += _versions(run)
        verdicts.append(
            Verdict(run, images if worst else 0, worst, tuple(changes), tuple(problems), tuple(missing))
        )
    return verdicts


@dataclass(frozen=True)
class _Loaded:
    """Images of a run: the test images; digest and counts of all images only if the training images are here too."""

    test: ImageSet
    digest: str | None
    counts: str
    notes: tuple[str, ...] = ()


def _load(config: DataConfig, cache: Path | None, progress: Progress) -> _Loaded:
    """Load a run's images; training images may be missing if the test images come from another source."""
    try:
        data = load_data(config, cache=cache, progress=progress)
        counts = f"{len(data.train)}/{len(data.validation)}/{len(data.test)}"
        return _Loaded(data.test, data.digest, counts)
    except AfterimageError as error:
        if not config.test:
            raise _Missing(str(error)) from None
    try:
        test, notes = load_test(config, cache=cache, progress=progress)
    except AfterimageError as error:
        raise _Missing(str(error)) from None
    return _Loaded(test, None, "", tuple(notes))


def _folder_changes(run: Run, result: Result) -> list[str]:
    """Return changes of the settings and the decoder in a run's folder since they were written."""
    changes = []
    if not run.name.endswith(result.config.digest[:8]):
        changes.append("the settings: config.toml is not the one that named the folder")
    decoder = run.file("decoder.safetensors")
    if result.training and not decoder.exists():
        raise _Missing(f"{decoder.name} is missing from the run's folder")
    if result.training and result.training.decoder_sha256 != sha256(decoder):
        changes.append("the decoder: decoder.safetensors is not the one that was measured")
    return changes


def _image_changes(result: Result, data: _Loaded) -> list[str]:
    """Return differences between the run's images and those that were loaded now."""
    before = result.data
    if data.digest is None:
        return [f"the images: {note}" for note in data.notes]
    if before.digest == data.digest:
        return []
    counts = f"{before.train}/{before.validation}/{before.test_images}"
    return [
        f"the images: digest {before.digest[:12]} then, {data.digest[:12]} now; training/validation/test "
        f"{counts} then, {data.counts} now"
    ]


def _same_images(stored: Sequence[Mapping[str, Any]], test: ImageSet) -> None:
    """Raise if the stored scores are not of these test images, since they could not be compared."""
    before, now = [row["id"] for row in stored], list(test.ids)
    if before == now:
        return
    here = set(now)
    lost = [identity for identity in before if identity not in here]
    named = (
        f"; missing: {', '.join(lost[:SHOWN])}" + (" and more" if len(lost) > SHOWN else "") if lost else ""
    )
    raise _Missing(
        f"other test images: {len(before)} were measured then, {len(now)} are here, or other ids{named}"
    )


def _within(result: Result) -> list[str]:
    """Return a problem if the stored summary is not the mean of the stored scores per image."""
    for name, score in summarise(result.per_image).items():
        before = result.scores[name]
        if (score is None) != (before is None) or (
            score is not None and not math.isclose(score.mean, before.mean, rel_tol=1e-9)
        ):
            return [f"summary.json and scores.csv do not agree about {name}"]
    return []


def _measured(
    run: Run,
    result: Result,
    data: _Loaded,
    weights: str | None,
    accelerator: str,
    progress: Progress,
    changes: list[str],
) -> list[dict[str, Any]]:
    config = result.config
    metrics = Metrics(result.lpips.net, size=min(config.data.size))
    before, now = (s.weights and s.weights.sha256 for s in (result.lpips, metrics.lpips_status))
    if before != now:
        changes.append(f"LPIPS: weights {before and before[:12]} then, {now and now[:12]} now")
    if isinstance(config, BaselineConfig):
        return evaluate(baseline(config.baseline), data.test, metrics, progress=progress).rows
    recipe = config.recipe
    where = absolute_weights(weights or config.weights)
    try:
        fabric = one_device(accelerator, recipe.precision)
        if config.features is not None and not weights:
            open_features(config.features, progress)
        else:
            for source in config.sources if where not in RANDOM_WEIGHTS else ():
                open_network(split_source(source)[0]).find_weights(where)
    except AfterimageError as error:
        raise _Missing(str(error)) from None
    reconstructor = load_reconstructor(run, weights=weights).to(fabric.device)

    def reconstruct(images):
        with fabric.autocast():
            return reconstructor.reconstruct(images).float()

    return evaluate(
        reconstruct,
        data.test,
        metrics,
        batch_size=recipe.batch_size,
        device=fabric.device,
        progress=progress,
    ).rows


def _compare(
    stored: Sequence[Mapping[str, Any]], rows: list[dict], problems: list[str], missing: list[str]
) -> dict[str, float]:
    """Return the largest difference of each metric; add metrics beyond the tolerance to `problems`, and metrics that
    cannot be measured to `missing`."""
    worst = {}
    for name in METRICS:
        pairs = [(before.get(name), now[name], now["id"]) for before, now in zip(stored, rows, strict=True)]
        if all(before is None for before, _, _ in pairs):
            continue
        if any(now is None for _, now, _ in pairs):
            missing.append(f"{name} cannot be measured here")
            continue
        difference, image = max((abs(now - before), identity) for before, now, identity in pairs)
        worst[name] = difference
        if not difference <= TOLERANCE[name]:
            problems.append(
                f"{name} differs by up to {difference:.3g} (image {image}), over {TOLERANCE[name]:g}"
            )
    return worst


def _versions(run: Run) -> list[str]:
    """Return the versions, the commit and the number of threads that differ from those of the run."""
    path = run.file("environment.json")
    if not path.exists():
        return ["the environment: none was kept"]
    try:
        before = read_json(path)
    except AfterimageError as error:
        return [f"the environment: {error}"]
    versions = before.get("versions") if isinstance(before, dict) else None
    if not isinstance(versions, dict):
        return [f"the environment: {shown(path)} holds no versions"]
    now = environment()
    now["threads"] = torch.get_num_threads()
    pairs = {name: (before.get(name), now[name]) for name in ("python", "commit", "threads")}
    pairs |= {name: (versions.get(name), version) for name, version in now["versions"].items()}
    return [f"{name}: {old} then, {new} now" for name, (old, new) in pairs.items() if old != new]
