"""What sets apart rows that would otherwise carry the same name: a differing setting, a fusion's letter."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afterimage.report.rows import Row


# Settings that have a column or a figure's axis of their own, or do not change the result.
SHOWN = ("sources", "seed", "lpips", "decoder.name", "fusion.")


def variants(rows: Sequence[Row]) -> list[Row]:
    """Name the settings in which rows of one encoder, weights and decoder differ, such as `parameters=4M`."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.encoder, row.fusion_letter, row.weights_label, row.decoder].append((row, _settings(row)))
    named = []
    for members in groups.values():
        keys = sorted({key for _, settings in members for key in settings})
        differing = [k for k in keys if len({str(settings.get(k)) for _, settings in members}) > 1]
        # Every layer's refinements start from that layer's decoder; only several starts of one layer are told apart.
        starts = {(row.sources, settings.get("start")) for row, settings in members}
        if len(starts) == len({sources for sources, _ in starts}):
            differing = [k for k in differing if k != "start"]
        for row, settings in members:
            parts = (
                f"{key.rpartition('.')[2]}={_short(settings[key] if key != 'start' else settings[key][-8:])}"
                for key in differing
                if key in settings
            )
            named.append(dataclasses.replace(row, variant=", ".join(parts)))
    return named


def mixed_settings(rows: Sequence[Row]) -> list[str]:
    """Settings of data and recipe in which the rows differ, with their values: `recipe.epochs (10, 30)`."""
    every = [s for row in rows if row.kind == "decoder" and (s := _settings(row))]
    keys = sorted({key for settings in every for key in settings if key.startswith(("data.", "recipe."))})
    found = ((key, sorted({_short(settings.get(key, "unset")) for settings in every})) for key in keys)
    return [f"{key} ({', '.join(values)})" for key, values in found if len(values) > 1]


def fusion_letters(rows: Sequence[Row]) -> list[Row]:
    """Letter the distinct fusions A, B, … so that figures need not spell out their sources."""
    distinct = sorted({_fusion_key(r) for r in rows if len(r.sources) > 1})
    letters = {key: _letter(i) for i, key in enumerate(distinct)}
    return [dataclasses.replace(r, fusion_letter=letters.get(_fusion_key(r), "")) for r in rows]


def fusion_text(row: Row) -> str:
    """How the row's sources were fused, for example `attention, 256 channels at 28×28`."""
    fusion = row.fusion or {}
    size, name = fusion.get("size"), fusion.get("name", "unknown")
    wide = "" if name in ("aligned", "stacked") else f", {fusion.get('channels', '?')} channels"
    return f"{name} fusion{wide} at " + (f"{size}×{size}" if size else "the finest resolution")


def fusion_legend(rows: Iterable[Row]) -> list[str]:
    """What each letter stands for: `fusion A: attention fusion, … of resnet34:layer1 + vgg16:block1`."""
    fused = [row for row in rows if len(row.sources) > 1]
    return list(dict.fromkeys(f"{r.layer}: {fusion_text(r)} of {' + '.join(r.sources)}" for r in fused))


def _fusion_key(row: Row) -> tuple[Any, ...]:
    return row.sources, fusion_text(row)


def _letter(index: int) -> str:
    quotient, remainder = divmod(index, 26)
    return (_letter(quotient - 1) if quotient else "") + chr(ord("A") + remainder)


def _settings(row: Row) -> dict[str, Any]:
    return {key: value for key, value in flatten(row.settings).items() if not key.startswith(SHOWN)}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value / 1e6:g}M" if value >= 1_000_000 else f"{value / 1e3:g}K"
    return value if isinstance(value, str) else json.dumps(value, default=str)
