"""Run folders as rows to compare: seeds merged, names shortened, settings told apart."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, split_source, to_dict
from afterimage.runs.run import Run, origin, scored_on

METRICS = ("psnr", "ssim", "lpips")
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}
# The published study calls differences below 0.1 dB negligible; it names no such margin for SSIM and LPIPS.
NEGLIGIBLE = {"psnr": 0.1, "ssim": 0.0, "lpips": 0.0}

Scores = dict[str, float]  # image id -> score

_SHAPE = {"order", "channels", "height", "width"}
_NEEDED = (
    *("kind", "label", "sources", "decoder", "reference", "weights", "features"),
    *("parameters", "train_seconds", "scores", "lpips", "data"),
)


@dataclass(frozen=True)
class Row:
    """One line of a study's table: the runs that differ in nothing but the seed.

    `scores[metric][image]` is the mean over seeds. Everything computed from it speaks of images, given
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
    """Scores of the images that every row has: their ids, sorted, and `(images, rows)`."""
    common = set.intersection(*(set(row.scores[metric]) for row in rows))
    ids = sorted(common)
    return ids, np.array([[row.scores[metric][i] for row in rows] for i in ids]).reshape(len(ids), len(rows))


def load_rows(runs: Iterable[Run]) -> tuple[list[Row], list[str]]:
    """Read finished runs as rows; the second answer says what was left out and why.

    Raises:
        AfterimageError: a summary without a key that is needed, a score that is not finite, or an image
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
            notes.append(f"{row.runs[0]} is left out: it has scores for fewer than 2 images")
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
            raise AfterimageError(f"{run.file('scores.csv')} scores image {line['id']!r} twice")
        seen.add(line["id"])
        for metric in metrics:
            value = line.get(metric)
            if value is None:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                where = f"{run.file('scores.csv')}: {metric} of image {line['id']!r}"
                raise AfterimageError(f"{where} is {value!r}, not a finite number")
            table[metric][line["id"]] = float(value)
    return table


CONTROLS = tuple(f"{kind.upper()} weights" for kind in RANDOM_WEIGHTS)
"""In the name of a setting: a random control, which no verdict on the study rests on."""


def control(setting: str) -> str:
    """Which of `CONTROLS` a setting is; empty for trained weights."""
    return next((mark for mark in CONTROLS if mark in setting), "")


def without_random_controls(results: Iterable[Any]) -> list[Any]:
    """Of rows or results that have a `setting`, all but the controls on untrained encoders."""
    return [result for result in results if not control(result.setting)]


def named(rows: list[Row], configs: list[dict[str, Any]]) -> list[Row]:
    """Give rows short names, and settings that differ a label that says in what."""
    tags = defaultdict(set)
    for row in rows:
        for source in row.sources:
            model = split_source(source)[0]
            tags[model.partition(".")[0]].add(model)

    def short(model: str) -> str:
        architecture = model.partition(".")[0]
        return architecture if len(tags[architecture]) == 1 else model

    coarse: dict[str, list[int]] = defaultdict(list)
    for i, (row, config) in enumerate(zip(rows, configs, strict=True)):
        if row.sources:
            coarse[json.dumps(_setting(config), sort_keys=True)].append(i)
    settings: list[tuple[dict[str, Any], list[int]]] = []
    for members in coarse.values():
        sources = [rows[i].sources for i in members if not rows[i].fused]
        fine: dict[str, list[int]] = defaultdict(list)
        for i in members:
            # A recipe splits a setting only where one layer was trained with several.
            detail = _flat(configs[i]) if len(set(sources)) < len(sources) else _setting(configs[i])
            fine[json.dumps(detail, sort_keys=True)].append(i)
        settings += [(json.loads(detail), indices) for detail, indices in fine.items()]

    labels = _distinct([_label(detail) for detail, _ in settings], [detail for detail, _ in settings])
    renamed = list(rows)
    for label, (_, indices) in zip(labels, settings, strict=True):
        for i in indices:
            row = rows[i]
            names = [f"{short(split_source(s)[0])} {split_source(s)[1]}" for s in row.sources]
            name = names[0]
            if row.fused:
                name = f"{_fused(configs[i]['fusion'], configs)} of {' + '.join(names)}"
            renamed[i] = replace(row, name=name, encoder=short(row.encoder), setting=label)
    return sorted(renamed, key=lambda r: (r.setting, r.fused, r.encoder, r.order, r.name))


def _fused(fusion: dict[str, Any], configs: list[dict[str, Any]]) -> str:
    """`attention fusion at 28x28`; with its channels where another one of this name and size has others."""
    alike = [f for config in configs if (f := config.get("fusion")) and f["name"] == fusion["name"]]
    alike = [f.get("channels") for f in alike if f.get("size") == fusion.get("size")]
    side = fusion.get("size")
    size = f" at {side}x{side}" if side else " at the finest size"
    wide = f", {fusion.get('channels')} channels," if len(set(alike)) > 1 else ""
    return f"{fusion['name']} fusion{size}{wide}"


def _setting(config: dict[str, Any]) -> dict[str, Any]:
    decoder = config["decoder"]
    return {
        "decoder": decoder["name"],
        "parameters": decoder.get("parameters"),
        "weights": config["origin"],
        "loss": config["recipe"]["loss"],
        "options": decoder.get("options") or None,
        "training images": config["train"],
        "data": config["digest"],
    }


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    recipe = {k: v for k, v in config["recipe"].items() if k != "loss"}
    # Not the fusion: a fused row is compared with single ones that are decoded alike.
    images = {f"data.{key}": value for key, value in config["data"].items() if key != "limit_train"}
    return _setting(config) | recipe | {"weights from": config["weights"]} | images


def _label(setting: dict[str, Any]) -> str:
    label = setting["decoder"]
    if setting["parameters"]:
        label += f" at {setting['parameters'] / 1e6:.3g} M parameters"
    if setting["loss"] != "mse":
        label += f", loss {setting['loss']}"
    random = setting["weights"] in RANDOM_WEIGHTS
    return label + (f", {setting['weights'].upper()} weights" if random else "")


def _distinct(labels: list[str], details: list[dict[str, Any]]) -> list[str]:
    """Add to labels that coincide what tells them apart."""
    distinct = []
    for label, detail in zip(labels, details, strict=True):
        rivals = [d for other, d in zip(labels, details, strict=True) if other == label]
        keys = [k for k in detail if any(d.get(k) != detail[k] for d in rivals)]
        if any(k == "training images" or k.startswith("data.") for k in keys):
            keys = [k for k in keys if k != "data"]  # a digest, which says less
        told = [f"{k.removeprefix('data.')} {detail[k][:8] if k == 'data' else detail[k]}" for k in keys]
        distinct.append(f"{label} ({', '.join(told)})" if told else label)
    return distinct
