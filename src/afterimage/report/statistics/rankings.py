"""Rankings of layers, decoders and fusions by quality, and quality in relation to its cost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from afterimage.evaluation.intervals import Interval, interval, mean_interval
from afterimage.report.statistics.rows import Row, Setting, matrix, without_random_controls
from afterimage.report.statistics.tests import Comparison, compare, corrected
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

    Best and worst are chosen on the same images, which slightly overstates `drop`.

    Attributes:
        metric: name of the metric
        setting: way of decoding
        encoder: name of the encoder
        best: name of the best layer
        worst: name of the worst layer
        drop: comparison of the worst layer with the best
        percent: change of the mean from best to worst, in per cent of the best
        runner_up: comparison of the best layer with the second best, corrected over the setting's encoders
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

    Attributes:
        metric: name of the metric
        name: name of the row
        setting: way of decoding
        gain: mean score beyond `baseline`; None without one
        baseline: score of the mean-colour baseline on the row's test images; 0 where the study has no such
            baseline (None for LPIPS, whose 0 is the best); None where only other test images have one
        per_minute: gain for each minute of training; like the next two None without gain or a known cost above 0
        per_million_parameters: gain for each million decoder parameters
        per_thousand_values: gain for each thousand feature values
    """

    metric: str
    name: str
    setting: Setting
    gain: float | None
    baseline: float | None
    per_minute: float | None
    per_million_parameters: float | None
    per_thousand_values: float | None


def scores(rows: list[Row], metric: str) -> list[Score]:
    """Compute the mean of every row with its interval, in the order given."""
    results = []
    for row in rows:
        _, values = matrix([row], metric)
        label = row.setting or Setting("baseline")
        spread = row.seed_spread(metric)
        mean = mean_interval(values[:, 0])
        results.append(Score(row.name, label, metric, mean, len(row.runs), spread, row.runs))
    return results


def _best_first(rows: list[Row], metric: str) -> list[Row]:
    """Sort rows by their mean over the images that all of them have."""
    _, values = matrix(rows, metric)
    order = np.argsort(-METRICS[metric].sign * values.mean(axis=0), kind="stable")
    return [rows[i] for i in order]


def degradation(rows: list[Row], metric: str) -> list[Degradation]:
    """Compare best and worst layer of every encoder with two or more; rows have one setting and source."""
    encoders: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        encoders[row.encoder].append(row)
    ranked = {name: _best_first(layers, metric) for name, layers in encoders.items() if len(layers) > 1}
    runners = corrected([compare(r[0], r[1], metric) for r in ranked.values()])
    results = []
    for (name, layers), runner_up in zip(ranked.items(), runners, strict=True):
        best, worst = layers[0], layers[-1]
        _, values = matrix([best, worst], metric)
        percent = interval(lambda means: 100 * (means[..., 1] / means[..., 0] - 1), values)
        drop = compare(worst, best, metric)
        results.append(
            Degradation(metric, rows[0].setting, name, best.layer, worst.layer, drop, percent, runner_up)
        )
    return results


def efficiency(rows: list[Row], baselines: list[Row], metric: str) -> list[Efficiency]:
    """Compute quality per minute of training, per million decoder parameters and per thousand feature values."""
    floors = {r.data: r.mean(metric) for r in baselines if r.baseline == "mean" and metric in r.scores}
    nothing = 0.0 if METRICS[metric].higher_is_better and not floors else None
    results = []
    for row in rows:
        baseline = floors.get(row.data, nothing)
        gain = None if baseline is None else METRICS[metric].sign * (row.mean(metric) - baseline)
        costs = ((row.seconds or 0) / 60, row.parameters / 1e6, row.values / 1e3)
        ratios = [gain / cost if gain is not None and cost > 0 else None for cost in costs]
        results.append(Efficiency(metric, row.name, row.setting, gain, baseline, *ratios))
    return results


def decoders(rows: list[Row], metric: str) -> list[DecoderRanking]:
    """Rank the settings that decode the same features; all pairs of all rankings are one family of tests.

    Random controls are left out unless there is nothing else.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in without_random_controls(rows) or rows:
        groups[row.name, row.data].append(row)
    ranked = [_best_first(group, metric) for group in groups.values() if len(group) > 1]
    family = corrected(
        [
            compare(a, b, metric, names=(a.setting, b.setting))
            for group in ranked
            for a, b in combinations(group, 2)
        ]
    )
    results = []
    for group in ranked:
        pairs = len(group) * (len(group) - 1) // 2
        own, family = family[:pairs], family[pairs:]
        means = tuple(row.mean(metric) for row in group)
        results.append(
            DecoderRanking(metric, group[0].name, tuple(r.setting for r in group), means, tuple(own))
        )
    return results


def fusions(rows: list[Row], metric: str) -> list[Comparison]:
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
    return corrected(family)
