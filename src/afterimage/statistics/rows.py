"""Run folders as rows to compare: seeds merged, names shortened, settings told apart."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from afterimage.config import AfterimageError, split_source, to_dict
from afterimage.runs import Run, origin, scored_on
from afterimage.statistics.settings import control, named

METRICS = ("psnr", "ssim", "lpips")
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}
# The published study calls differences below 0.1 dB negligible; it names no such margin for SSIM and LPIPS.
NEGLIGIBLE = {"psnr": 0.1, "ssim": 0.0, "lpips": 0.0}

Scores = dict[str, float]  # picture id -> score

_SHAPE = {"order", "channels", "height", "width"}
_NEEDED = (
    *("kind", "label", "sources", "decoder", "reference", "weights", "features"),
    *("parameters", "train_seconds", "scores", "lpips", "data"),
)


@dataclass(frozen=True)
class Row:
    """One line of a study's table: the runs that differ in nothing but the seed.

    `scores[metric][picture]` is the mean over seeds. Everything computed from it speaks of pictures, given
    the seeds that were trained; `seed_means[metric]` holds each seed's mean, for the spread between seeds.
    `setting` says how the features were decoded (decoder, its size, weights, loss, data where they differ);
    only rows of one setting are compared across layers. `data` tells test sets apart.
    """

    name: str
    encoder: str
    layer: str
    setting: str
    sources: tuple[str, ...]
    decoder: str
    reference: str
    data: str
    order: int
    channels: int
    height: int
    width: int
    values: int
    parameters: int
    seconds: float
    runs: tuple[str, ...]
    scores: Mapping[str, Scores] = field(repr=False)
    seed_means: Mapping[str, tuple[float, ...]] = field(repr=False)

    @property
    def locations(self) -> int:
        return self.height * self.width

    @property
    def fused(self) -> bool:
        return len(self.sources) > 1

    @property
    def control(self) -> str:
        """Which control on an untrained encoder it is; empty for trained weights."""
        return control(self.setting)

    def mean(self, metric: str) -> float:
        return float(np.mean(list(self.scores[metric].values())))

    def seed_spread(self, metric: str) -> float | None:
        """Standard deviation between the seeds' means; None for a single seed."""
        means = self.seed_means[metric]
        return float(np.std(means, ddof=1)) if len(means) > 1 else None


def matrix(rows: list[Row], metric: str) -> tuple[list[str], np.ndarray]:
    """Scores of the pictures that every row has: their ids, sorted, and `(pictures, rows)`."""
    common = set.intersection(*(set(row.scores[metric]) for row in rows))
    ids = sorted(common)
    return ids, np.array([[row.scores[metric][i] for row in rows] for i in ids]).reshape(len(ids), len(rows))


def load_rows(runs: Iterable[Run]) -> tuple[list[Row], list[str]]:
    """Read finished runs as rows; the second answer says what was left out and why.

    Raises:
        AfterimageError: a summary without a key that is needed, a score that is not finite, or a picture
            scored twice; each names the file.
    """
    found, notes = [], []
    for run in runs:
        finished = run.file("summary.json").exists() and run.file("scores.csv").exists()
        if not finished or run.state in ("running", "failed"):
            notes.append(f"{run.name} is left out: it is not finished")
            continue
        summary = run.summary
        for key in _NEEDED:
            if key not in summary:
                raise AfterimageError(f"{run.file('summary.json')} has no {key!r}")
        if "digest" not in summary["data"]:
            raise AfterimageError(f"{run.file('summary.json')} has no data.digest")
        for feature in summary["features"]:
            if not feature.keys() >= _SHAPE:
                missing = ", ".join(sorted(_SHAPE - feature.keys()))
                raise AfterimageError(f"{run.file('summary.json')}: a feature map lacks {missing}")
        config: dict[str, Any] = {"reference": summary["reference"]}
        if summary["kind"] == "decoder":
            config = to_dict(run.config)
            del config["seed"], config["lpips"]
            config |= {"digest": summary["data"]["digest"], "train": summary["data"].get("train")}
        found.append((run, summary, config))
    tests = scored_on([summary["data"] for _, summary, _ in found])
    groups: dict[str, list[tuple[Run, dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for (run, summary, config), test in zip(found, tests, strict=True):
        config["test"] = test
        groups[json.dumps(config, sort_keys=True)].append((run, summary, config))

    networks = {
        s["lpips"]["net"] for group in groups.values() for _, s, _ in group if s["scores"].get("lpips")
    }
    metrics = METRICS if len(networks) < 2 else METRICS[:2]
    if len(networks) > 1:
        notes.append(
            f"LPIPS is not compared: it was measured with different networks ({', '.join(sorted(networks))})"
        )

    rows, configs = [], []
    for group in groups.values():
        row = _row(group, metrics)
        if all(len(scores) < 2 for scores in row.scores.values()):
            notes.append(f"{row.runs[0]} is left out: it has scores for fewer than 2 pictures")
            continue
        rows.append(row)
        configs.append(group[0][2] | {"origin": origin(group[0][1])})
    return named(rows, configs), notes


def _row(group: list[tuple[Run, dict[str, Any], dict[str, Any]]], metrics: tuple[str, ...]) -> Row:
    summary, features = group[0][1], group[0][1]["features"]
    tables = [_scores(run, metrics) for run, _, _ in group]
    scores, seed_means = {}, {}
    for metric in metrics:
        ids = set.intersection(*(set(table[metric]) for table in tables))
        if len(ids) > 1:
            scores[metric] = {i: float(np.mean([table[metric][i] for table in tables])) for i in sorted(ids)}
            seed_means[metric] = tuple(float(np.mean([t[metric][i] for i in sorted(ids)])) for t in tables)
    first = features[0] if features else {"order": 0, "channels": 0, "height": 0, "width": 0}
    model, layer = split_source(summary["sources"][0]) if summary["sources"] else ("", "")
    return Row(
        name=summary["label"],
        encoder=model,
        layer=layer,
        setting="",
        sources=tuple(summary["sources"]),
        decoder=summary["decoder"] or "",
        reference=summary["reference"] or "",
        data=group[0][2]["test"],
        order=first["order"],
        channels=first["channels"],
        height=first["height"],
        width=first["width"],
        values=sum(f["channels"] * f["height"] * f["width"] for f in features),
        parameters=summary["parameters"],
        seconds=float(np.mean([s["train_seconds"] or 0 for _, s, _ in group])),
        runs=tuple(run.name for run, _, _ in group),
        scores=scores,
        seed_means=seed_means,
    )


def _scores(run: Run, metrics: tuple[str, ...]) -> dict[str, Scores]:
    table: dict[str, Scores] = {metric: {} for metric in metrics}
    seen = set()
    for line in run.scores:
        if line["id"] in seen:
            raise AfterimageError(f"{run.file('scores.csv')} scores picture {line['id']!r} twice")
        seen.add(line["id"])
        for metric in metrics:
            value = line.get(metric)
            if value is None:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                where = f"{run.file('scores.csv')}: {metric} of picture {line['id']!r}"
                raise AfterimageError(f"{where} is {value!r}, not a finite number")
            table[metric][line["id"]] = float(value)
    return table
