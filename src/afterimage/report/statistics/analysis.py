"""Analysis of a study's rows: answers to its hypotheses, rankings and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from afterimage.evaluation.intervals import NAME
from afterimage.report import rows as report
from afterimage.report.statistics.architectures import Architectures, architectures_differ
from afterimage.report.statistics.depth import Depth, falls_with_depth
from afterimage.report.statistics.rankings import (
    DecoderRanking,
    Degradation,
    Efficiency,
    Score,
    decoders,
    degradation,
    efficiency,
    fusions,
    scores,
)
from afterimage.report.statistics.resolution import Resolution, resolution_dominates
from afterimage.report.statistics.rows import Row, group_rows
from afterimage.report.statistics.tests import Comparison
from afterimage.runs.results import METRICS


@dataclass(frozen=True)
class Analysis:
    """All results of a study; each list has one entry or more for each metric, some for each setting.

    Attributes:
        rows: the rows, seeds merged
        scores: every row's mean
        depth: answers to H1
        resolution: answers to H2
        architectures: answers to H3
        degradation: best and worst layer of each encoder
        efficiency: quality against its cost
        decoders: rankings of settings that decode the same features
        fusions: each fusion against its best member
        notes: what was left out, and why
    """

    rows: tuple[Row, ...]
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
        return {"intervals": NAME} | {name: as_json(getattr(self, name)) for name in fields}


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

    Args:
        finished: finished runs

    Raises:
        AfterimageError: two rows that are to be compared share fewer than 2 images
    """
    rows, notes = group_rows(finished)
    decoded = [row for row in rows if row.sources]
    baselines = [row for row in rows if not row.sources]
    settings = sorted({row.setting for row in decoded if not row.fused})
    results: dict[str, list[Any]] = {f.name: [] for f in dataclasses.fields(Analysis)}
    for metric in METRICS:
        scored = [row for row in rows if metric in row.scores]
        if not scored:
            continue
        measured = [row for row in decoded if metric in row.scores]
        results["scores"] += scores(scored, metric)
        results["efficiency"] += efficiency(measured, baselines, metric)
        results["decoders"] += decoders(measured, metric)
        results["fusions"] += fusions(measured, metric)
        for setting in settings:
            single = [row for row in measured if row.setting == setting and not row.fused]
            if not single:
                continue
            results["depth"].append(falls_with_depth(single, metric))
            results["resolution"].append(resolution_dominates(single, metric))
            results["architectures"].append(architectures_differ(single, metric))
            results["degradation"] += degradation(single, metric)
    results |= {"rows": rows, "notes": notes}
    return Analysis(**{name: tuple(found) for name, found in results.items()})
