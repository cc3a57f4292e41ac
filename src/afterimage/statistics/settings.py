"""Settings: which rows were decoded alike, and the shortest names that tell rows and settings apart."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from afterimage.config import RANDOM_WEIGHTS, split_source

if TYPE_CHECKING:
    from afterimage.statistics.rows import Row


CONTROLS = tuple(f"{kind.upper()} weights" for kind in RANDOM_WEIGHTS)
"""In the name of a setting: a random control, which no verdict on the study rests on."""


def control(setting: str) -> str:
    """Which of `CONTROLS` a setting is; empty for trained weights."""
    return next((mark for mark in CONTROLS if mark in setting), "")


def honest(results: Iterable[Any]) -> list[Any]:
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
        "training pictures": config["train"],
        "data": config["digest"],
    }


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    recipe = {k: v for k, v in config["recipe"].items() if k != "loss"}
    # Not the fusion: a fused row is compared with single ones that are decoded alike.
    pictures = {f"data.{key}": value for key, value in config["data"].items() if key != "limit_train"}
    return _setting(config) | recipe | {"weights from": config["weights"]} | pictures


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
        if any(k == "training pictures" or k.startswith("data.") for k in keys):
            keys = [k for k in keys if k != "data"]  # a digest, which says less
        told = [f"{k.removeprefix('data.')} {detail[k][:8] if k == 'data' else detail[k]}" for k in keys]
        distinct.append(f"{label} ({', '.join(told)})" if told else label)
    return distinct
