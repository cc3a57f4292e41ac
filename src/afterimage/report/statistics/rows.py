"""Rows that can be compared: seeds merged, names shortened, settings distinguished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from afterimage.config import RANDOM_WEIGHTS, short_names, split_source
from afterimage.report import rows as report
from afterimage.report.rows import group_by
from afterimage.runs.results import METRICS

Scores = dict[str, float]  # image id -> score


class Setting(str):
    """Label of a way of decoding, with the name of its random control if it is one."""

    control: str
    """`RANDOM weights` and the like of untrained encoders, on which no verdict rests; else empty."""

    def __new__(cls, label: str = "", control: str = "") -> Setting:
        setting = super().__new__(cls, label)
        setting.control = control
        return setting


@dataclass(frozen=True)
class PooledRow:
    """One line of a study's table: the runs that differ in nothing but the seed.

    `scores[metric][image]` is the mean over seeds, so statistics on it generalise over images for the seeds
    that were trained; `seed_means[metric]` holds the mean of each seed, for the spread between seeds.
    `setting` labels how the features were decoded (decoder, its size, weights, loss, data where they differ);
    only rows of one setting are compared across layers. `data` is the digest of the test images. `seconds` is the
    mean time of training over seeds; None where that of any seed is unknown. `config` holds what was asked for.
    """

    name: str
    encoder: str
    layer: str
    setting: Setting
    sources: tuple[str, ...]
    baseline: str
    data: str
    order: int
    channels: int
    height: int
    width: int
    values: int
    parameters: int
    seconds: float | None
    runs: tuple[str, ...]
    scores: Mapping[str, Scores] = field(repr=False)
    seed_means: Mapping[str, tuple[float, ...]] = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def locations(self) -> int:
        """Number of feature locations."""
        return self.height * self.width

    @property
    def fused(self) -> bool:
        """True if the row fuses several sources."""
        return len(self.sources) > 1

    def mean(self, metric: str) -> float:
        """Compute the mean score over images."""
        return float(np.mean(list(self.scores[metric].values())))

    def seed_spread(self, metric: str) -> float | None:
        """Compute the standard deviation between the seeds' means; None for a single seed."""
        means = self.seed_means[metric]
        return float(np.std(means, ddof=1)) if len(means) > 1 else None


def matrix(rows: list[PooledRow], metric: str) -> tuple[list[str], np.ndarray]:
    """Return the sorted ids of the images that every row has, and their scores `(images, rows)`."""
    common = set.intersection(*(set(row.scores[metric]) for row in rows))
    ids = sorted(common)
    return ids, np.array([[row.scores[metric][i] for row in rows] for i in ids]).reshape(len(ids), len(rows))


def group_rows(rows: Iterable[report.Row]) -> tuple[list[PooledRow], list[str]]:
    """Merge runs that differ in nothing but the seed.

    Returns:
        the rows, and notes on what was left out and why
    """
    rows = list(rows)
    notes: list[str] = []
    networks = report.lpips_nets(rows)
    if len(networks) > 1:
        notes.append(
            f"LPIPS is not compared: it was measured with different networks ({', '.join(networks)})"
        )
    metrics = [metric for metric in METRICS if metric != "lpips" or len(networks) < 2]
    alike = group_by(
        rows, lambda row: json.dumps(_merge_settings(row) | {"test": row.data.test_digest}, sort_keys=True)
    )
    merged = []
    for row in (_merged(group, metrics) for group in alike.values()):
        if row.scores:
            merged.append(row)
        else:
            notes.append(f"{row.runs[0]} is left out: it has scores for fewer than 2 images")
    return label_settings(merged), notes


def _merge_settings(row: report.Row) -> dict[str, Any]:
    """Return the settings of a run and facts of its data, without the seed and the settings of LPIPS."""
    if row.is_baseline:
        return {"baseline": row.settings["baseline"]}
    settings = {key: value for key, value in row.settings.items() if key not in ("seed", "lpips")}
    return settings | {"digest": row.data.digest, "train": row.data.train}


def _merged(group: Sequence[report.Row], metrics: Sequence[str]) -> PooledRow:
    first = group[0]
    scores, seed_means = {}, {}
    for metric in metrics:
        tables = [row.values(metric) for row in group]
        ids = sorted(set.intersection(*map(set, tables)))
        if len(ids) > 1:
            scores[metric] = {i: float(np.mean([table[i] for table in tables])) for i in ids}
            seed_means[metric] = tuple(float(np.mean([table[i] for i in ids])) for table in tables)
    model, layer = split_source(first.sources[0]) if first.sources else ("", "")
    shape = ("order", "channels", "height", "width")
    seconds = [row.train_seconds for row in group]
    return PooledRow(
        name=first.label,
        encoder=model,
        layer=layer,
        setting=Setting(),
        sources=first.sources,
        baseline=first.settings.get("baseline", ""),
        data=first.data.test_digest,
        **{name: getattr(first.features[0], name) if first.features else 0 for name in shape},
        values=sum(f.values for f in first.features),
        parameters=first.parameters or 0,
        seconds=None if None in seconds else float(np.mean(seconds)),
        runs=tuple(row.run.name for row in group),
        scores=scores,
        seed_means=seed_means,
        config=_merge_settings(first) | {"origin": first.weights_label},
    )


def without_random_controls(results: Iterable[Any]) -> list[Any]:
    """Return the rows or results whose `setting` is no random control."""
    return [result for result in results if not result.setting.control]


def label_settings(rows: list[PooledRow]) -> list[PooledRow]:
    """Give rows short names, and settings labels in which different ones differ."""
    short = short_names(split_source(source)[0] for row in rows for source in row.sources)
    decoded = [row for row in rows if row.sources]
    settings: list[tuple[dict[str, Any], list[PooledRow]]] = []
    for members in group_by(decoded, lambda row: _key(_setting(row.config))).values():
        sources = [row.sources for row in members if not row.fused]
        # Recipes split a setting only where one layer was trained with several.
        detail = _detailed_setting if len(set(sources)) < len(sources) else _setting
        fine = group_by(members, lambda row, detail=detail: _key(detail(row.config)))
        settings += [(json.loads(key), own) for key, own in fine.items()]

    renamed = [row for row in rows if not row.sources]
    for text, (detail, own) in zip(_labels([detail for detail, _ in settings]), settings, strict=True):
        label = Setting(text, _control(detail))
        for row in own:
            names = [f"{short[model]} {layer}" for model, layer in map(split_source, row.sources)]
            name = f"{_fused(row, decoded)} of {' + '.join(names)}" if row.fused else names[0]
            renamed.append(replace(row, name=name, encoder=short[row.encoder], setting=label))
    return sorted(renamed, key=lambda r: (r.setting, r.fused, r.encoder, r.order, r.name))


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _fused(row: PooledRow, rows: Sequence[PooledRow]) -> str:
    """Write `attention fusion at 28x28`, with channels where fusions of this name and size differ in them."""
    fusion = row.config["fusion"]
    name, size = fusion["name"], fusion.get("size")
    others = [other.config["fusion"] for other in rows if other.config.get("fusion")]
    wide = {f.get("channels") for f in others if (f["name"], f.get("size")) == (name, size)}
    where = f" at {size}x{size}" if size else " at the finest size"
    return f"{name} fusion{where}" + (f", {fusion.get('channels')} channels," if len(wide) > 1 else "")


def _setting(config: Mapping[str, Any]) -> dict[str, Any]:
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


def _detailed_setting(config: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {k: v for k, v in config["recipe"].items() if k != "loss"}
    # Without the fusion: a fused row is compared with single rows that are decoded alike.
    images = {f"data.{key}": value for key, value in config["data"].items() if key != "limit_train"}
    return _setting(config) | recipe | {"weights from": config["weights"]} | images


def _control(setting: Mapping[str, Any]) -> str:
    return f"{setting['weights'].upper()} weights" if setting["weights"] in RANDOM_WEIGHTS else ""


def _labels(settings: list[dict[str, Any]]) -> list[str]:
    """Write a label of each setting; equal ones are followed by the details in which they differ."""
    labels = [_label(setting) for setting in settings]
    distinct = []
    for label, setting in zip(labels, settings, strict=True):
        rivals = [s for other, s in zip(labels, settings, strict=True) if other == label]
        keys = [k for k in setting if any(rival.get(k) != setting[k] for rival in rivals)]
        if any(k == "training images" or k.startswith("data.") for k in keys):
            keys = [k for k in keys if k != "data"]  # a digest, which is less readable
        told = [f"{k.removeprefix('data.')} {setting[k][:8] if k == 'data' else setting[k]}" for k in keys]
        distinct.append(f"{label} ({', '.join(told)})" if told else label)
    return distinct


def _label(setting: Mapping[str, Any]) -> str:
    label = setting["decoder"]
    if setting["parameters"]:
        label += f" at {setting['parameters'] / 1e6:.3g} M parameters"
    if setting["loss"] != "mse":
        label += f", loss {setting['loss']}"
    control = _control(setting)
    return f"{label}, {control}" if control else label
