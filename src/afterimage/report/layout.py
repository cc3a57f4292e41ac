"""The table before it is set in Markdown, LaTeX or a terminal: cells of unescaped text, groups, footnotes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from afterimage.config import unknown
from afterimage.report.rows import METRICS, Row, Rows, Score
from afterimage.report.variants import fusion_text

SPREADS = {"std": "standard deviation", "interval": "half a 95 % t interval of the mean"}
DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """What one cell shows: lines of text, footnote numbers, bold for the best, loud for a warning."""

    lines: tuple[str, ...]
    marks: tuple[int, ...] = ()
    bold: bool = False
    loud: bool = False


@dataclass(frozen=True)
class Line:
    """One row of the table: its sources (or a reference line's label) as `names`, then one cell a column."""

    row: Row
    names: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Rows that share an encoder and its weights; reference lines share an empty encoder."""

    encoder: str
    weights: str
    lines: tuple[Line, ...]

    @property
    def loud(self) -> bool:
        return "random" in self.weights


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    groups: tuple[Group, ...]
    footnotes: tuple[str, ...]
    remark: str


@dataclass
class Footnotes:
    """Numbers each distinct text in the order of its first use."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def lay_out(rows: Rows, *, spread: str = "std") -> Table:
    """The whole table. `spread` chooses what follows ±: the standard deviation or the mean's interval."""
    if spread not in SPREADS:
        raise unknown("spread", spread, SPREADS)
    columns = [("psnr", ""), ("ssim", ""), *(("lpips", net) for net in rows.nets or ("",))]
    best = {column: _best(rows.decoders, *column) for column in columns}
    seeds = len({row.seed for row in rows.decoders}) > 1
    notes = Footnotes()
    groups: dict[tuple[str, str], list[Line]] = {}
    for row in rows.all:
        marks = tuple(notes.number(note) for note in row.notes)
        cells = [*_what(row, seeds)]
        cells += [_score(row, m, net, best[m, net], spread, notes) for m, net in columns]
        line = Line(row, Cell(_names(row), marks), tuple(cells))
        groups.setdefault((row.encoder, row.weights_label if row.kind != "reference" else ""), []).append(
            line
        )
    header = ["features", "shape", "reduction", "decoder", *(["seed"] if seeds else [])]
    header += ["weights", "parameters", "training", *(heading(metric, net) for metric, net in columns)]
    made = tuple(Group(encoder, weights, tuple(lines)) for (encoder, weights), lines in groups.items())
    return Table(tuple(header), made, tuple(notes.texts), _remark(rows, spread))


def heading(metric: str, net: str = "") -> str:
    """`PSNR (dB) ↑`, `SSIM ↑` or `LPIPS (alex) ↓`."""
    name = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": f"LPIPS ({net})" if net else "LPIPS"}[metric]
    return f"{name} {'↑' if HIGHER_IS_BETTER[metric] else '↓'}"


def duration(seconds: float | int | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def _names(row: Row) -> tuple[str, ...]:
    if row.kind == "reference":
        return (row.label,)
    if len(row.sources) == 1:
        return row.sources
    return (f"{row.fusion_letter}: {fusion_text(row)}", *row.sources)


def _what(row: Row, seeds: bool) -> Iterable[Cell]:
    def text(value: str, loud: bool = False) -> Cell:
        return Cell((value,), loud=loud)

    def aligned(lines: Sequence[str]) -> Cell:
        return Cell(("", *lines) if len(row.sources) > 1 else tuple(lines) or (NONE,))

    reference = row.kind == "reference"
    yield aligned(row.shapes)
    yield aligned([f"{reduction}×" if reduction else NONE for reduction in row.reductions])
    yield text(row.decoder_label or NONE)
    if seeds:
        yield text(NONE if row.seed is None else str(row.seed))
    yield text(NONE if reference else weights_text(row.weights_label), row.is_random)
    yield text(NONE if reference or row.parameters is None else f"{row.parameters:,}")
    yield text(NONE if reference else duration(row.train_seconds))


def weights_text(label: str) -> str:
    """The label of an encoder's weights, loud where they are random."""
    return label.upper() if "random" in label else label


def _score(row: Row, metric: str, net: str, best: str | None, spread: str, notes: Footnotes) -> Cell:
    score = row.scores[metric]
    if score is None:
        return Cell(("unavailable",), (notes.number(f"LPIPS is unavailable: {row.lpips_reason}"),))
    if metric == "lpips" and row.lpips_net != net:
        return Cell((NONE,))
    mean = _rounded(score, metric)
    around = score.std if spread == "std" else score.margin
    text = mean if around is None else f"{mean} ± {around:.{DIGITS[metric]}f}"
    return Cell((text,), bold=row.kind != "reference" and mean == best)


def _rounded(score: Score, metric: str) -> str:
    return f"{score.mean:.{DIGITS[metric]}f}"


def _best(rows: Sequence[Row], metric: str, net: str) -> str | None:
    """The best mean as printed, so that rows which print the same are all the best."""
    rows = [r for r in rows if not r.is_random] or rows
    scores = [r.scores[metric] for r in rows if not net or r.lpips_net == net]
    means = [s for s in scores if s is not None]
    pick = max if HIGHER_IS_BETTER[metric] else min
    return _rounded(pick(means, key=lambda s: s.mean), metric) if means else None


def _remark(rows: Rows, spread: str) -> str:
    counts = sorted({score.count for row in rows.all for m in METRICS if (score := row.scores[m])})
    over = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    best = " Bold: the best decoder row, ties included." if rows.decoders else ""
    return f"Mean ± {SPREADS[spread]} over {over} test picture{'s' if counts != [1] else ''}.{best}"
