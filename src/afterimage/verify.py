"""Whether finished runs still hold: their stored decoders are measured again, and what changed is named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afterimage.config import AfterimageError, DataConfig, ReferenceConfig, RunConfig, load_toml
from afterimage.controls import reference
from afterimage.data import Data, load_data
from afterimage.evaluate import SCORES, evaluate, summarise
from afterimage.metrics import Metrics
from afterimage.progress import Progress, silent
from afterimage.ranks import one_device
from afterimage.reconstructor import Reconstructor
from afterimage.runs import DAMAGE, Run, environment, read_json, sha256

TOLERANCE = {"psnr": 0.01, "ssim": 1e-4, "lpips": 1e-3}
"""How far a picture's score may be from the stored one: dB for PSNR. Another machine or another number of threads
adds in another order; 0.01 dB of PSNR is 0.2 % of an error."""

CONFIGS = {"decoder": RunConfig, "reference": ReferenceConfig}


@dataclass(frozen=True)
class Verdict:
    """What became of one run when it was measured again.

    `worst` is the largest difference of any picture's score, by name, where it could be measured; `changes` names
    what is not as it was when the run was made, `problems` why its scores do not hold (none: they do). `skipped`
    says why they were not measured.
    """

    run: Run
    pictures: int = 0
    worst: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def holds(self) -> bool:
        return not self.problems and not self.skipped


def verify_runs(
    runs: Iterable[Run],
    *,
    weights: str | None = None,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
) -> list[Verdict]:
    """Measure every run's decoder (or reference line) again, on its own pictures, and compare with its scores.

    Scores hold where every picture's are within `TOLERANCE`. Runs that are not done do not hold; rows of other
    kinds are skipped.
    """
    loaded: dict[DataConfig, Data] = {}
    verdicts = []
    for run in runs:
        progress(f"verifying {run.name}", 1, 1)
        problems: list[str] = []
        changes: list[str] = []
        worst: dict[str, float] = {}
        try:
            if run.state != "done":
                raise AfterimageError(f"it is not finished (state: {run.state})")
            if run.summary["kind"] not in CONFIGS:
                verdicts.append(
                    Verdict(run, skipped=f"rows of kind {run.summary['kind']} are not measured again")
                )
                continue
            config = _config(run)
            data = config.data
            if data not in loaded:
                loaded[data] = load_data(data, cache=cache, progress=progress)
            changes += _changes(run, config, loaded[data])
            problems += _within(run)
            rows = _measured(run, loaded[data], weights, accelerator, progress, changes)
            worst = _compare(run.scores, rows, problems)
        except AfterimageError as error:
            problems.append(str(error))
        except DAMAGE as damage:
            what = f"{type(damage).__name__}: {damage}"
            problems.append(f"{run.path}: its files do not hold what a finished run's do ({what:.300})")
        if problems:
            changes += _versions(run)
        verdicts.append(Verdict(run, len(run.scores) if worst else 0, worst, tuple(changes), tuple(problems)))
    return verdicts


def _config(run: Run) -> RunConfig | ReferenceConfig:
    return load_toml(CONFIGS[run.summary["kind"]], run.file("config.toml"))


def _changes(run: Run, config: RunConfig | ReferenceConfig, data: Data) -> list[str]:
    """What differs between the run's folder as it was written and as it is, or between its pictures and these."""
    summary, changes = run.summary, []
    if not run.name.endswith(config.digest[:8]):
        changes.append("the settings: config.toml is not the one that named the folder")
    digest = summary.get("decoder_sha256")
    if summary["kind"] == "decoder" and digest != sha256(run.file("decoder.safetensors")):
        changes.append(
            "the decoder: decoder.safetensors is not the one that was measured"
            if digest
            else "the decoder: no digest of it was kept"
        )
    if summary["data"]["digest"] != data.digest:
        before = summary["data"]
        counts = f"{before['train']}/{before['validation']}/{before['test_pictures']}"
        now = f"{len(data.train)}/{len(data.validation)}/{len(data.test)}"
        changes.append(
            f"the pictures: digest {before['digest'][:12]} then, {data.digest[:12]} now; training/validation/test "
            f"{counts} then, {now} now"
        )
    return changes


def _within(run: Run) -> list[str]:
    """Whether the summary is that of the scores."""
    stored = run.summary["scores"]
    again = summarise([{"lpips": None} | row for row in run.scores])
    for name, score in again.items():
        before = stored.get(name)
        if (score is None) != (before is None) or (
            score is not None and not math.isclose(score["mean"], before["mean"], rel_tol=1e-9)
        ):
            return [f"summary.json and scores.csv do not agree about {name}"]
    return []


def _measured(
    run: Run, data: Data, weights: str | None, accelerator: str, progress: Progress, changes: list[str]
) -> list[dict[str, Any]]:
    status = run.summary["lpips"]
    metrics = Metrics(status["net"], size=data.config.crop)
    before, now = ((s["weights"] or {}).get("sha256") for s in (status, metrics.lpips_status))
    if before != now:
        changes.append(f"LPIPS: weights {before and before[:12]} then, {now and now[:12]} now")
    if run.summary["kind"] == "reference":
        return evaluate(reference(run.summary["reference"]), data.test, metrics, progress=progress).rows
    recipe = run.config.recipe
    fabric = one_device(accelerator, recipe.precision)
    reconstructor = Reconstructor.open(run, weights=weights).to(fabric.device)

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


def _compare(stored: list[dict], rows: list[dict], problems: list[str]) -> dict[str, float]:
    """The largest difference of each score; what goes beyond the tolerance is added to `problems`."""
    if [row["id"] for row in stored] != [row["id"] for row in rows]:
        problems.append(
            f"other test pictures: {len(stored)} were measured then, {len(rows)} now, or other ids"
        )
        return {}
    worst = {}
    for name in SCORES:
        pairs = [(before.get(name), now[name], now["id"]) for before, now in zip(stored, rows, strict=True)]
        if all(before is None for before, _, _ in pairs):
            continue
        if any(now is None for _, now, _ in pairs):
            problems.append(f"{name} cannot be measured here")
            continue
        difference, picture = max((abs(now - before), identity) for before, now, identity in pairs)
        worst[name] = difference
        if not difference <= TOLERANCE[name]:
            problems.append(
                f"{name} differs by up to {difference:.3g} (picture {picture}), over {TOLERANCE[name]:g}"
            )
    return worst


def _versions(run: Run) -> list[str]:
    """Which versions, and which number of threads, are not those the run was made with."""
    path = run.file("environment.json")
    if not path.exists():
        return ["the environment: none was kept"]
    try:
        before = read_json(path)
        versions = dict(before.get("versions", {}))
    except DAMAGE as damage:
        return [f"the environment: {path} cannot be read ({type(damage).__name__}: {damage})"]
    now = environment()
    now["threads"] = torch.get_num_threads()
    pairs = {name: (before.get(name), now[name]) for name in ("python", "commit", "threads")}
    pairs |= {name: (versions.get(name), version) for name, version in now["versions"].items()}
    return [f"{name}: {old} then, {new} now" for name, (old, new) in pairs.items() if old != new]
