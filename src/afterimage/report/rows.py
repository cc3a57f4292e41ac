"""The rows of a report: finished runs with the names under which tables and figures show them.

A run that cannot be read is listed with its error. A bug in this reader shows as a traceback.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from afterimage.config import PROTOCOLS, RANDOM_WEIGHTS, AfterimageError, short_names, split_source
from afterimage.evaluation.intervals import mean_interval
from afterimage.report.format import single_line
from afterimage.runs.results import METRICS, Interval, Result
from afterimage.runs.run import Run

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

DECODERS = ("linear", "transposed", "attention", "wavelet", "frequency", "residual")
"""Order of decoders in tables; other decoders follow, by name."""
LISTED_SETTINGS = ("sources", "seed", "lpips", "decoder.name", "fusion.")
"""Prefixes of settings that have a column or an axis of their own, or do not change the result."""


@dataclass(frozen=True, kw_only=True)
class Row(Result):
    """One finished run as tables and figures show it.

    Attributes:
        run: the run
        variant: settings in which the row differs from others of the same encoder and decoder, as text
        fusion_letter: letter that stands for the way of fusing several sources; empty for one source
    """

    run: Run
    variant: str = ""
    fusion_letter: str = ""

    @classmethod
    def of(cls, run: Run) -> Row:
        """Read a finished run. Raises `AfterimageError` as `Run.result` does."""
        result = run.result
        return cls(run=run, **{f.name: getattr(result, f.name) for f in dataclasses.fields(Result)})

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split_source(source)[0] for source in self.sources))

    @property
    def encoder(self) -> str:
        """Name to group rows by: the encoder's, `fusion` for several sources, empty for a baseline."""
        return "fusion" if self.is_fused else self.models[0] if self.models else ""

    @property
    def layer(self) -> str:
        return f"fusion {self.fusion_letter}" if self.is_fused else split_source(self.sources[0])[1]

    @property
    def is_fused(self) -> bool:
        return len(self.sources) > 1

    @property
    def control(self) -> str:
        """Name of the random control in capitals, such as `RANDOM weights`; empty for trained weights."""
        return f"{self.origin.upper()} weights" if self.is_random else ""

    @property
    def decoder_label(self) -> str:
        return f"{self.decoder} ({self.variant})" if self.variant else self.decoder

    @property
    def features_text(self) -> str:
        """Sources in one text, joined by ` + `."""
        return " + ".join(self.sources)

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(f"{f.channels}×{f.height}×{f.width}" for f in self.features)

    @property
    def reductions(self) -> tuple[str, ...]:
        """Image height over feature height of each source, as text."""
        return tuple(f"{f.reduction:g}" for f in self.features)

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of the finest feature map; those of the fused features if they have a size of their own."""
        if self.is_fused and self.fusion and self.fusion.size:
            return self.fusion.size, self.fusion.size
        finest = max(self.features, key=lambda f: f.locations, default=None)
        return (finest.height, finest.width) if finest else ()

    @property
    def grid(self) -> str:
        return "×".join(map(str, self.sides))

    @property
    def locations(self) -> int | None:
        """Number of feature locations that the decoder sees; None without features."""
        return math.prod(self.sides) if self.sides else None

    @property
    def values_per_pixel(self) -> float | None:
        """Number of feature values for each value of the image (three a pixel); None without features."""
        if not self.features or self.config is None:
            return None
        height, width = self.config.data.size
        return sum(math.prod(f.shape) for f in self.features) / (3 * height * width)

    @property
    def order(self) -> tuple[Any, ...]:
        return (
            self.is_fused, natural_sort_key(self.encoder), self.control, self.fusion_letter,
            tuple(f.order for f in self.features), [natural_sort_key(s) for s in self.sources], self.decoder_order,
            self.seed or 0, natural_sort_key(self.run.name),
        )  # fmt: skip

    @property
    def decoder_order(self) -> tuple[Any, ...]:
        place = DECODERS.index(self.decoder) if self.decoder in DECODERS else len(DECODERS)
        return place, natural_sort_key(self.decoder), natural_sort_key(self.variant)

    @property
    def fusion_text(self) -> str:
        """Description of the fusion, for example `attention fusion, 256 channels at 28×28`."""
        if (fusion := self.fusion) is None:
            return "unknown fusion"
        wide = "" if fusion.name in ("aligned", "stacked", "sum") else f", {fusion.channels} channels"
        size = f"{fusion.size}×{fusion.size}" if fusion.size else "the finest resolution"
        return f"{fusion.name} fusion{wide} at {size}"

    @cached_property
    def intervals(self) -> dict[str, Interval | None]:
        """Mean of each metric with its interval; None where it was not measured."""
        columns = {metric: [value for _, value in sorted(self.values(metric).items())] for metric in METRICS}
        return {
            metric: mean_over_images(values, metric) if values else None for metric, values in columns.items()
        }

    @cached_property
    def distinguishing(self) -> dict[str, Any]:
        """Settings that nothing else in a table shows, by their dotted names."""
        return {
            key: value for key, value in flatten(self.settings).items() if not key.startswith(LISTED_SETTINGS)
        }


@dataclass(frozen=True)
class Unfinished:
    """A run without a result; its `state` is new, running, stopped, failed or damaged."""

    run: Run
    state: str
    error: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.run.name, self.state, self.error)))


@dataclass(frozen=True)
class Rows:
    """All runs of a report.

    Attributes:
        decoders: decoder rows by encoder, depth of the layer and decoder; the inversions where there are
            neither decoders nor baselines
        baselines: baselines by their mean PSNR
        unfinished: runs without a result
        warnings: sentences on rows whose scores do not compare or need care
        inversions: inversions; a few test images were inverted, so they do not stand beside decoders
    """

    decoders: tuple[Row, ...]
    baselines: tuple[Row, ...]
    unfinished: tuple[Unfinished, ...]
    warnings: tuple[str, ...] = ()
    inversions: tuple[Row, ...] = ()

    @property
    def all(self) -> tuple[Row, ...]:
        return self.decoders + self.baselines

    @property
    def every(self) -> tuple[Row, ...]:
        """All rows and the inversions, each once."""
        return self.all if self.decoders is self.inversions else self.all + self.inversions

    @property
    def nets(self) -> tuple[str, ...]:
        """LPIPS networks of all rows; distances of different networks do not compare."""
        return lpips_nets(self.all)

    @property
    def protocol(self) -> str:
        """Protocol that all rows follow; empty for the study's own.

        Raises:
            AfterimageError: the rows follow several protocols, whose figures must not share a column
        """
        found = group_by(self.every, _protocol)
        if len(found) > 1:
            told = (
                f"{name or 'study'} ({', '.join(row.run.name for row in rows[:3])})"
                for name, rows in sorted(found.items())
            )
            raise AfterimageError(
                f"these runs were measured by different protocols: {'; '.join(told)}; report on those of one at a time"
            )
        return next(iter(found), "")


def short_encoders(rows: Iterable[Row]) -> dict[str, str]:
    """Return encoder names for figures: without the weights' tag where they stay distinct."""
    names = short_names(row.encoder for row in rows if row.sources)
    return {name: single_line(short, 40) for name, short in names.items()}


def lpips_nets(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the LPIPS networks that measured at least one row, sorted by name."""
    return tuple(sorted({row.lpips.net for row in rows if row.scores["lpips"] is not None}))


def _protocol(row: Row) -> str:
    return str(row.settings.get("data", {}).get("protocol") or "")


def read_rows(runs: Iterable[Run]) -> Rows:
    """Read every run once. Raises `AfterimageError`, with the state of each run, where none is finished."""
    finished: list[Row] = []
    unfinished = []
    for run in runs:
        try:
            state = run.state
            if state == "done" or (state == "new" and run.has_result):
                finished.append(Row.of(run))
                continue
            error = str(run.status.get("error") or "")
        except AfterimageError as damage:
            state, error = "damaged", str(damage)
        unfinished.append(Unfinished(run, state, error))
    if not finished:
        lines = list(map(str, unfinished[:20]))
        lines += [f"… {len(unfinished) - 20} more"] if len(unfinished) > 20 else []
        reason = "no finished run to report" if unfinished else "there is no run to report"
        raise AfterimageError("\n  ".join([reason, *lines]))
    decoded = _with_variants(_with_letters([row for row in finished if not row.is_baseline]))
    kinds = group_by(sorted(decoded, key=lambda row: row.order), lambda row: row.kind == "inversion")
    decoders, inversions = (tuple(kinds.get(is_inversion, ())) for is_inversion in (False, True))
    baselines = [row for row in finished if row.is_baseline]
    baselines.sort(key=lambda row: (row.scores["psnr"].mean, natural_sort_key(row.label)))
    shown = decoders if decoders or baselines else inversions
    warnings = _warnings([*shown, *baselines])
    return Rows(shown, tuple(baselines), tuple(unfinished), tuple(warnings), inversions)


def _with_letters(rows: Sequence[Row]) -> list[Row]:
    """Assign letters A, B, … to the distinct fusions, so that figures need not spell out their sources."""
    distinct = sorted({(row.sources, row.fusion_text) for row in rows if row.is_fused})
    letters = {key: _letter(i) for i, key in enumerate(distinct)}
    named = ((row, letters.get((row.sources, row.fusion_text), "")) for row in rows)
    return [dataclasses.replace(row, fusion_letter=letter) for row, letter in named]


def _letter(index: int) -> str:
    quotient, remainder = divmod(index, 26)
    return (_letter(quotient - 1) if quotient else "") + chr(ord("A") + remainder)


def _with_variants(rows: Sequence[Row]) -> list[Row]:
    """Name the settings in which rows of one encoder, weights and decoder differ, such as `parameters=4M`."""

    def alike(row: Row) -> tuple[str, ...]:
        return row.encoder, row.fusion_letter, row.origin, row.decoder, getattr(row.config, "answer", "")

    named = []
    for members in group_by(rows, alike).values():
        keys = sorted({key for row in members for key in row.distinguishing})
        differing = [k for k in keys if len({str(row.distinguishing.get(k)) for row in members}) > 1]
        # Refinements start from a decoder of their layer; `start` is named only where a layer has several.
        starts = {(row.sources, row.distinguishing.get("start")) for row in members}
        if len(starts) == len({sources for sources, _ in starts}):
            differing = [k for k in differing if k != "start"]
        for row in members:
            found = {key: row.distinguishing[key] for key in differing if key in row.distinguishing}
            parts = (
                f"{key.rpartition('.')[2]}={_short(value if key != 'start' else value[-8:])}"
                for key, value in found.items()
            )
            named.append(dataclasses.replace(row, variant=", ".join(parts)))
    return named


def _warnings(rows: Sequence[Row]) -> Iterable[str]:
    tests = {row.data.test_digest for row in rows}
    counts = sorted({row.scores["psnr"].count for row in rows})
    named = group_by(rows, lambda row: json.dumps(row.settings.get("data"), sort_keys=True, default=str))
    changed = max(len({row.data.digest for row in alike}) for alike in named.values())
    if len(tests) > 1:
        yield f"The rows were measured on {len(tests)} sets of images: their scores do not compare."
    elif len(counts) > 1:
        yield f"The rows were measured on different numbers of images ({counts[0]} to {counts[-1]})."
    elif changed > 1:
        yield f"Rows that name the same data had {changed} sets of images: files changed between them."
    for name in sorted({_protocol(row) for row in rows} & PROTOCOLS.keys()):
        protocol = PROTOCOLS[name]
        yield (
            f"Figures by the protocol {name}, beside no others: images resized to {protocol.resize} pixels, centre "
            f"crop of {protocol.crop}, layers {' or '.join(protocol.layers)}."
        )
        yield from (f"{metric} ({name}) is not measured: {why}." for metric, why in protocol.missing.items())
    yield from _uninformed(rows)
    if mixed := _mixed_settings(rows):
        yield f"The rows were not all made with the same settings: {'; '.join(mixed)}."
    for label in dict.fromkeys(w.label for row in rows for w in row.weights if w.is_random):
        yield f"Rows marked {label.upper()} used {RANDOM_WEIGHTS[label]}: a control, not a pretrained network."


def _uninformed(rows: Sequence[Row]) -> Iterable[str]:
    """Yield a warning of decoders whose mean PSNR does not exceed that of the mean-colour baseline."""
    lines = {
        row.data.test_digest: row.scores["psnr"].mean
        for row in rows
        if row.settings.get("baseline") == "mean"
    }
    decoders = (row for row in rows if row.kind == "decoder" and not row.is_random)
    low = [
        row.label for row in decoders if row.scores["psnr"].mean <= lines.get(row.data.test_digest, -math.inf)
    ]
    if low:
        told = ", ".join(low[:3]) + (", …" if len(low) > 3 else "")
        yield (
            f"{len(low)} decoder row{'s are' if len(low) > 1 else ' is'} not above the mean colour in PSNR ({told}): "
            "they learned too little from these images to say what the features hold."
        )


def _mixed_settings(rows: Sequence[Row]) -> list[str]:
    """Return settings of data and recipe in which decoders differ: `recipe.epochs (10, 30)`."""
    every = [row.distinguishing for row in rows if row.kind == "decoder"]
    keys = sorted({key for settings in every for key in settings if key.startswith(("data.", "recipe."))})
    found = ((key, sorted({_short(settings.get(key, "unset")) for settings in every})) for key in keys)
    return [f"{key} ({', '.join(values)})" for key, values in found if len(values) > 1]


def fusion_legend(rows: Iterable[Row]) -> list[str]:
    """Explain the fusion letters: `fusion A: attention fusion, … of resnet34:layer1 + vgg16:block1`."""
    fused = [row for row in rows if row.is_fused]
    return list(dict.fromkeys(f"{r.layer}: {r.fusion_text} of {' + '.join(r.sources)}" for r in fused))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    flat = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value / 1e6:g}M" if value >= 1_000_000 else f"{value / 1e3:g}K"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Group items by a key, keys and items in the order of their first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def mean_over_images(values: Sequence[float], metric: str = "") -> Interval:
    """Compute the mean of scores by a metric, or of other values, with its interval; of a single image a point."""
    if len(values) == 1:
        return Interval(values[0], values[0], values[0], 1)
    return mean_interval(np.array(values), *([METRICS[metric].limits] if metric else []))


def mean_over_seeds(rows: Sequence[Row], metric: str) -> Interval | None:
    """Average runs that differ only in their seed, then compute the mean over images with its interval.

    Only images that all runs scored count; None where there are none."""
    if len(rows) == 1:
        return rows[0].intervals[metric]
    values = [row.values(metric) for row in rows]
    common = sorted(key for key in values[0] if all(key in v for v in values))
    means = [math.fsum(v[key] for v in values) / len(values) for key in common]
    return mean_over_images(means, metric) if common else None


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts `blocks.2` before `blocks.11`."""
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]
