"""Ranks of encoders among rows of an atlas that were measured alike and have about as many feature values.

An atlas is a table in the format of a report's `table.csv`, published by anyone. The user's own run folders
are converted to the same rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, join_names, printable_path
from afterimage.report.format import MISSING, TextTable, format_score, ratio, single_line
from afterimage.report.rows import group_by
from afterimage.report.tables import heading, score_columns, weights_text
from afterimage.runs.files import read_csv
from afterimage.runs.results import METRICS

COLUMNS = (
    "sources", "decoder", "weights", "values_per_pixel", "data_digest", "crop", "passes", "lpips_net",
    *(f"{metric}_mean" for metric in METRICS),
)  # fmt: skip
"""Columns of an atlas that are read."""


@dataclass(frozen=True)
class Entry:
    """One row of an atlas.

    `features` are its layers as `model:layer`, joined by ` + `; `values` is the number of feature values for
    each value of the image; `answer` is a decoder's name, or `linear + refined` and the like for a bound; `scores` are
    means over the test images, without LPIPS where that is unavailable. Scores of two rows compare where `measured` is
    equal: `answer`, the largest number of passes of a bound's search, the digest of the images, and their crop.
    """

    features: str
    weights: str
    values: float
    answer: str
    measured: str
    scores: Mapping[str, float]
    net: str

    @property
    def encoder(self) -> str:
        """Name of the encoder; for several sources all layers."""
        return self.features if " + " in self.features else self.features.rpartition(":")[0]

    @property
    def is_random(self) -> bool:
        return "random" in self.weights

    @property
    def name(self) -> str:
        return f"{self.features} ({weights_text(self.weights)})" if self.is_random else self.features

    def has(self, metric: str, net: str) -> bool:
        """Return True if the row was measured by this metric, LPIPS by this network."""
        return metric in self.scores and (metric != "lpips" or self.net == net)


@dataclass(frozen=True)
class EntryRanking:
    """One of the user's rows, `ranked_entry`, and the rows of the atlas that it may be ranked with."""

    ranked_entry: Entry
    others: tuple[Entry, ...]

    def comparable_entries(self, metric: str) -> list[Entry]:
        """Return the others that were measured by this metric too, LPIPS by the same network."""
        has = metric in self.ranked_entry.scores
        return [other for other in self.others if has and other.has(metric, self.ranked_entry.net)]

    def rank(self, metric: str) -> tuple[int, int] | None:
        """Return the rank (from 1, shared by equals) and the number of ranked rows; None without others."""
        sign, others = METRICS[metric].sign, self.comparable_entries(metric)
        ahead = [e for e in others if sign * (e.scores[metric] - self.ranked_entry.scores[metric]) > 0]
        return (1 + len(ahead), 1 + len(others)) if others else None

    def first(self, metric: str) -> Entry:
        """Return the best of the row and its `comparable_entries`, the row itself among equals."""
        return max(
            [self.ranked_entry, *self.comparable_entries(metric)],
            key=lambda e: METRICS[metric].sign * e.scores[metric],
        )


@dataclass(frozen=True)
class Comparison:
    """The user's rows ranked among those of an atlas.

    Attributes:
        standings: each of the user's rows for which the atlas has rows measured alike
        atlas: rows of the atlas that were measured like one of the user's, of any number of values
        within: largest ratio of the numbers of values of ranked rows
        remarks: sentences on what was left out, and why
    """

    standings: tuple[EntryRanking, ...]
    atlas: tuple[Entry, ...]
    within: float
    remarks: tuple[str, ...]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Metrics and LPIPS networks of the user's rows, see `score_columns`."""
        mine = [standing.ranked_entry for standing in self.standings]
        return score_columns(sorted({entry.net for entry in mine if "lpips" in entry.scores}))


def read_atlas(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an atlas: a report's table as CSV, or Parquet with the same columns.

    Raises:
        AfterimageError: the file cannot be read
    """
    if path.suffix.lower() != ".parquet":
        return read_csv(path)
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise AfterimageError("Parquet needs pyarrow: pip install 'afterimage[datasets]'") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error}") from None


def entries(records: Iterable[Mapping[str, Any]], where: str) -> tuple[Entry, ...]:
    """Return the decoders and measured bounds of a table; baselines and unfinished runs are left out.

    Args:
        records: its rows
        where: name of the table, for errors

    Raises:
        AfterimageError: a column is missing, a value is not a finite number, or no row is left
    """
    found = []
    for count, record in enumerate(records, 1):
        if missing := [column for column in COLUMNS if column not in record]:
            raise AfterimageError(
                f"{where} has no column {', '.join(missing)}: it is not the table.csv of `afterimage report`"
            )
        if record["values_per_pixel"] is None or not record["decoder"]:
            continue
        scores = {m: record[f"{m}_mean"] for m in METRICS if record[f"{m}_mean"] is not None}
        for column in ("values_per_pixel", *(f"{metric}_mean" for metric in scores)):
            value = record[column]
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise AfterimageError(f"{where}, row {count}: {column} is {value!r:.80}, not a finite number")
        answer, images, crop = (str(record[column]) for column in ("decoder", "data_digest", "crop"))
        passes = f" in {int(record['passes'])} passes" if record["passes"] else ""
        measured = f"{answer}{passes} on images {images[:16]}, crop {crop}"
        scores = {metric: float(value) for metric, value in scores.items()}
        features, weights, net = (
            str(record["sources"]),
            str(record["weights"]),
            str(record["lpips_net"] or ""),
        )
        found.append(
            Entry(features, weights, float(record["values_per_pixel"]), answer, measured, scores, net)
        )
    if not found:
        raise AfterimageError(f"{where} has no row of a decoder or a measured bound")
    return tuple(found)


def compare(mine: Sequence[Entry], atlas: Sequence[Entry], *, within: float = 1.5) -> Comparison:
    """Rank the user's rows among atlas rows that were measured alike and have about as many feature values.

    Rows of the atlas with random weights are not ranked, nor its copies of the user's rows.

    Args:
        mine: the user's rows
        atlas: rows of the atlas
        within: largest ratio of the numbers of feature values

    Raises:
        AfterimageError: nothing in the atlas was measured like the user's rows, or `within` is below 1
    """
    if not 1 <= within < math.inf:
        raise AfterimageError(f"within must be a factor of 1 or more, got {within:g}")
    own = {(e.features, e.weights, e.measured) for e in mine}
    others = [e for e in atlas if (e.features, e.weights, e.measured) not in own and not e.is_random]
    ways = {e.measured for e in mine}
    alike = group_by((e for e in others if e.measured in ways), lambda e: e.measured)
    if not alike:
        raise AfterimageError(
            f"no row of the atlas was measured under the same conditions as your rows ({_ways(mine)}); "
            f"the atlas has {_ways(others) or 'no other rows'}"
        )
    standings = []
    for e in (e for e in mine if e.measured in alike):
        near = (o for o in alike[e.measured] if 1 / within <= o.values / e.values <= within)
        standings.append(EntryRanking(e, tuple(near)))
    shown = tuple(e for e in others if e.measured in alike)
    return Comparison(tuple(standings), shown, within, tuple(_remarks(mine, atlas, shown)))


def standings_table(comparison: Comparison) -> TextTable:
    """Return the ranks as a table: a line for each of the user's rows; the last column has the best row."""
    columns, lines = comparison.columns, []
    for standing in comparison.standings:
        mine, cells = standing.ranked_entry, []
        for metric, net in columns:
            cell = format_score(mine.scores[metric], metric) if mine.has(metric, net) else MISSING
            if cell != MISSING and (rank := standing.rank(metric)):
                cell += f", {rank[0]} of {rank[1]}"
            cells.append(cell)
        first = standing.first("psnr")
        best = f"{first.name}, {format_score(first.scores['psnr'], 'psnr')}"
        best = best if standing.comparable_entries("psnr") else "alone at this size"
        lines.append((mine.name, mine.answer, ratio(mine.values), *cells, best))
    heads = (heading(*column) for column in columns)
    header = ("features", "answer", "values per pixel value", *heads, "first in PSNR")
    least, most = ratio(1 / comparison.within), ratio(comparison.within)
    title = f"Ranks among rows of the atlas with {least} to {most} times as many feature values"
    return TextTable(title, header, tuple(lines))


def _ways(rows: Iterable[Entry]) -> str:
    return join_names(list(dict.fromkeys(e.measured for e in rows)), 4, "; ")


def _remarks(mine: Sequence[Entry], atlas: Sequence[Entry], alike: Sequence[Entry]) -> Iterator[str]:
    ways, found = group_by(mine, lambda e: e.measured), {e.measured for e in alike}
    if count := sum(e.is_random for e in atlas):
        yield f"Rows of the atlas that have random weights and are not ranked: {count}."
    answers = {e.answer for e in mine}
    others = (e.measured for e in atlas if not e.is_random and e.answer in answers and e.measured not in ways)
    for way, count in Counter(others).items():
        yield f"Rows of the atlas that are kept apart, since none of yours was measured as {way}: {count}."
    for way in (way for way in ways if way not in found):
        names = join_names(list(dict.fromkeys(e.features for e in ways[way])), 3)
        yield f"No row of the atlas was measured as {names}: {way}."
    other = (e.net for e in alike if e.net and e.net not in {m.net for m in ways[e.measured]})
    for net, count in Counter(other).items():
        yield f"Rows of the atlas whose LPIPS is by {single_line(net)}, a network that measured none of yours: {count}."
