"""Analysis of a study's rows: answers to its hypotheses, rankings, and quality in relation to its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np

from afterimage.evaluation.intervals import INTERVAL_NAME, Interval, interval, mean_interval
from afterimage.report import rows as report
from afterimage.report.rows import group_by
from afterimage.report.statistics.hypotheses import (
    Architectures,
    Depth,
    Resolution,
    architectures_differ,
    falls_with_depth,
    resolution_dominates,
)
from afterimage.report.statistics.paired_tests import Comparison, compare, holm_correct
from afterimage.report.statistics.rows import PooledRow, Setting, group_rows, matrix, without_random_controls
from afterimage.runs.results import METRICS


@dataclass(frozen=True)
class Score:
    """Mean score of a row over images; `seed_spread` is the deviation between seeds, None for one seed."""

    name: str
    setting: Setting
    metric: str
    mean: Interval
    seeds: int
    seed_spread: float | None
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Degradation:
    """One encoder's best and worst layers under one setting.

    `drop` compares the worst layer with the best, chosen on the same images, which slightly overstates it; `percent` is
    the change of the mean in per cent of the best. `runner_up` compares the best layer with the second best, corrected
    over the setting's encoders.
    """

    metric: str
    setting: Setting
    encoder: str
    best: str
    worst: str
    drop: Comparison
    percent: Interval
    runner_up: Comparison


@dataclass(frozen=True)
class DecoderRanking:
    """Settings that decode the same features, best first, with their means and a comparison of every pair."""

    metric: str
    name: str
    settings: tuple[Setting, ...]
    means: tuple[float, ...]
    pairs: tuple[Comparison, ...]


@dataclass(frozen=True)
class Efficiency:
    """Quality of a row against its cost.

    `gain` is the mean score beyond `baseline`, that of the mean colour on the row's test images: 0 where the
    study has no such baseline (None for LPIPS, whose 0 is the best); None where only other test images have
    one. The gains per minute of training, million decoder parameters and thousand feature values are None
    without a gain or a known cost above 0.
    """

    metric: str
    name: str
    setting: Setting
    gain: float | None
    baseline: float | None
    per_minute: float | None
    per_million_parameters: float | None
    per_thousand_values: float | None


@dataclass(frozen=True)
class Analysis:
    """All results of a study; each list has one entry or more for each metric, some for each setting.

    `rows` have their seeds merged; `depth`, `resolution` and `architectures` answer H1, H2 and H3; `decoders`
    ranks settings that decode the same features; `fusions` compares each fusion with its best member; `notes`
    say what was left out.
    """

    rows: tuple[PooledRow, ...]
    scores: tuple[Score, ...]
    depth: tuple[Depth, ...]
    resolution: tuple[Resolution, ...]
    architectures: tuple[Architectures, ...]
    degradation: tuple[Degradation, ...]
    efficiency: tuple[Efficiency, ...]
    decoders: tuple[DecoderRanking, ...]
    fusions: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields but the rows as JSON values with their properties, and the intervals' name."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "rows")
        return {"intervals": INTERVAL_NAME} | {name: as_json(getattr(self, name)) for name in fields}


def as_json(value: Any) -> Any:
    """Convert a result to JSON values: its fields and its properties."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        names += [n for n, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def analyse(finished: Iterable[report.Row]) -> Analysis:
    """Answer H1, H2 and H3 from finished runs, for every metric and every setting that they hold.

    A setting is a way of decoding (decoder, its size, weights, loss); only rows of one setting, on the same
    images, are compared across layers. Each verdict has its own family of tests, in which Holm's correction
    limits the chance of any false positive to 5 %. Seeds are averaged per image before anything else.

    Raises:
        AfterimageError: two rows that are to be compared share fewer than 2 images
    """
    rows, notes = group_rows(finished)
    results: dict[str, list[Any]] = {f.name: [] for f in dataclasses.fields(Analysis)}
    for metric in METRICS:
        scored = [row for row in rows if metric in row.scores]
        measured = [row for row in scored if row.sources]
        results["scores"] += [_score(row, metric) for row in scored]
        results["efficiency"] += _efficiency(measured, [row for row in scored if not row.sources], metric)
        results["decoders"] += _decoders(measured, metric)
        results["fusions"] += _fusions(measured, metric)
        single = group_by((row for row in measured if not row.fused), lambda row: row.setting)
        for _, own in sorted(single.items()):
            results["depth"].append(falls_with_depth(own, metric))
            results["resolution"].append(resolution_dominates(own, metric))
            results["architectures"].append(architectures_differ(own, metric))
            results["degradation"] += _degradation(own, metric)
    results |= {"rows": rows, "notes": notes}
    return Analysis(**{name: tuple(found) for name, found in results.items()})


def _score(row: PooledRow, metric: str) -> Score:
    _, values = matrix([row], metric)
    label, spread = row.setting or Setting("baseline"), row.seed_spread(metric)
    mean = mean_interval(values[:, 0], METRICS[metric].limits)
    return Score(row.name, label, metric, mean, len(row.runs), spread, row.runs)


def _best_first(rows: list[PooledRow], metric: str) -> list[PooledRow]:
    """Sort rows by their mean over the images that all of them have."""
    _, values = matrix(rows, metric)
    order = np.argsort(-METRICS[metric].sign * values.mean(axis=0), kind="stable")
    return [rows[i] for i in order]


def _degradation(rows: list[PooledRow], metric: str) -> list[Degradation]:
    """Compare best and worst layer of every encoder with two or more; rows have one setting and source."""
    encoders = group_by(rows, lambda row: row.encoder).values()
    ranked = [_best_first(layers, metric) for layers in encoders if len(layers) > 1]
    runners = holm_correct([compare(layers[0], layers[1], metric) for layers in ranked])
    results = []
    for (best, *_, worst), runner_up in zip(ranked, runners, strict=True):
        _, values = matrix([best, worst], metric)
        percent = interval(lambda means: 100 * (means[..., 1] / means[..., 0] - 1), values)
        drop = compare(worst, best, metric)
        results.append(
            Degradation(metric, best.setting, best.encoder, best.layer, worst.layer, drop, percent, runner_up)
        )
    return results


def _efficiency(rows: list[PooledRow], baselines: list[PooledRow], metric: str) -> list[Efficiency]:
    """Compute quality per minute of training, per million decoder parameters and per thousand feature values."""
    floors = {r.data: r.mean(metric) for r in baselines if r.baseline == "mean"}
    nothing = 0.0 if METRICS[metric].higher_is_better and not floors else None
    results = []
    for row in rows:
        baseline = floors.get(row.data, nothing)
        gain = None if baseline is None else METRICS[metric].sign * (row.mean(metric) - baseline)
        costs = ((row.seconds or 0) / 60, row.parameters / 1e6, row.values / 1e3)
        ratios = [gain / cost if gain is not None and cost > 0 else None for cost in costs]
        results.append(Efficiency(metric, row.name, row.setting, gain, baseline, *ratios))
    return results


def _decoders(rows: list[PooledRow], metric: str) -> list[DecoderRanking]:
    """Rank the settings that decode the same features; all pairs of all rankings are one family of tests.

    Random controls are left out unless there is nothing else.
    """
    groups = group_by(without_random_controls(rows) or rows, lambda row: (row.name, row.data)).values()
    ranked = [_best_first(group, metric) for group in groups if len(group) > 1]
    pairs = [pair for group in ranked for pair in combinations(group, 2)]
    family = iter(holm_correct([compare(a, b, metric, names=(a.setting, b.setting)) for a, b in pairs]))
    results = []
    for group in ranked:
        own = tuple(islice(family, len(group) * (len(group) - 1) // 2))
        settings, means = (row.setting for row in group), (row.mean(metric) for row in group)
        results.append(DecoderRanking(metric, group[0].name, tuple(settings), tuple(means), own))
    return results


def _fusions(rows: list[PooledRow], metric: str) -> list[Comparison]:
    """Compare each fusion with its best single member, among those decoded alike where there are any."""
    family = []
    for fused in (row for row in rows if row.fused):
        same = [r for r in rows if (r.data, r.setting.control) == (fused.data, fused.setting.control)]
        members = [r for r in same if not r.fused and r.sources[0] in fused.sources]
        alike = [r for r in members if r.setting == fused.setting]
        if members:
            best = _best_first(alike or members, metric)[0]
            names = (f"{fused.name} with {fused.setting}", f"{best.name} with {best.setting}")
            family.append(compare(fused, best, metric, names=names))
    return holm_correct(family)
