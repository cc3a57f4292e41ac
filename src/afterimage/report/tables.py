"""The table of results in four forms: terminal, Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afterimage.config import PROTOCOLS, unknown
from afterimage.evaluation.intervals import NAME
from afterimage.report.format import latex, markdown, markdown_code, markdown_grid, plain, span, spreadsheet
from afterimage.report.rows import Row, Rows, fusion_legend
from afterimage.runs.results import METRICS, Score
from afterimage.runtime.terminal import console

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text


SPREADS = {"std": "± standard deviation", "interval": f"and its {NAME}"}
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """Content of one cell: lines of text and footnote numbers; `bold` marks the best, `loud` a warning."""

    lines: tuple[str, ...]
    marks: tuple[int, ...] = ()
    bold: bool = False
    loud: bool = False


@dataclass(frozen=True)
class Line:
    """One row of the table: sources (or a baseline's label) as `names`, and cells of the other columns."""

    row: Row
    names: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """The whole table; `groups` holds lines by encoder and label of its weights, both empty for baselines."""

    header: tuple[str, ...]
    groups: Mapping[tuple[str, str], Sequence[Line]]
    footnotes: tuple[str, ...]
    remark: str


def lay_out(rows: Rows, *, spread: str = "std") -> Table:
    """Lay out the whole table. `spread` selects what follows a mean: `std` (deviation) or `interval`."""
    if spread not in SPREADS:
        raise unknown("spread", spread, SPREADS)
    protocol = rows.protocol
    missing = PROTOCOLS[protocol].missing if protocol else {}
    columns = score_columns(rows.nets or ("",))
    best = {column: _best(rows.decoders, *column) for column in columns}
    seeds = len({row.seed for row in rows.decoders}) > 1
    notes: dict[str, int] = {}
    groups: dict[tuple[str, str], list[Line]] = {}
    for row in rows.all:
        marks = tuple(_number(notes, note) for note in row.notes)
        cells = [*_what(row, seeds)]
        cells += [_score(row, m, net, best[m, net], spread, notes) for m, net in columns]
        cells += [
            Cell(("not measured",), (_number(notes, f"{m} is not measured: {missing[m]}"),)) for m in missing
        ]
        line = Line(row, Cell(_names(row), marks), tuple(cells))
        groups.setdefault((row.encoder, "" if row.is_baseline else row.origin), []).append(line)
    header = ["features", "shape", "reduction", "decoder", *(["seed"] if seeds else [])]
    header += ["weights", "parameters", "training", *(heading(*column, protocol) for column in columns)]
    header += [f"{metric}, {protocol} ↓" for metric in missing]
    return Table(tuple(header), groups, tuple(notes), _remark(rows, spread))


def _number(notes: dict[str, int], text: str) -> int:
    """Return the number of a footnote; footnotes are numbered in the order of their first use."""
    return notes.setdefault(text, len(notes) + 1)


def score_columns(nets: Iterable[str]) -> list[tuple[str, str]]:
    """Return metrics with their LPIPS networks: one pair for each column of a table or panel of a figure."""
    return [("psnr", ""), ("ssim", ""), *(("lpips", net) for net in nets)]


def heading(metric: str, net: str = "", protocol: str = "") -> str:
    """Return a column heading: `PSNR (dB) ↑`, `LPIPS (alex) ↓`; under a protocol `PSNR (dB), rae ↑`."""
    known = METRICS[metric]
    aside, by = net or known.unit.strip(), f", {protocol}" if protocol else ""
    return f"{known.title}{f' ({aside})' if aside else ''}{by} {'↑' if known.higher_is_better else '↓'}"


def lpips_reason(row: Row) -> str:
    return row.lpips.reason or "not measured"


def duration(seconds: float | int | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def _names(row: Row) -> tuple[str, ...]:
    if row.is_baseline:
        return (row.label,)
    if len(row.sources) == 1:
        return row.sources
    return (f"{row.fusion_letter}: {row.fusion_text}", *row.sources)


def _what(row: Row, seeds: bool) -> Iterable[Cell]:
    def text(value: str, loud: bool = False) -> Cell:
        return Cell((value,), loud=loud)

    def aligned(lines: Sequence[str]) -> Cell:
        return Cell(("", *lines) if len(row.sources) > 1 else tuple(lines) or (NONE,))

    yield aligned(row.shapes)
    yield aligned([f"{reduction}×" if reduction else NONE for reduction in row.reductions])
    yield text(row.decoder_label or NONE)
    if seeds:
        yield text(NONE if row.seed is None else str(row.seed))
    yield text(NONE if row.is_baseline else weights_text(row.origin), row.is_random)
    yield text(NONE if row.is_baseline or row.parameters is None else f"{row.parameters:,}")
    seconds = "elsewhere" if row.trained_elsewhere else duration(row.train_seconds)
    yield text(NONE if row.is_baseline else seconds)


def weights_text(label: str) -> str:
    """Return the label of an encoder's weights, in capitals where they are random."""
    return label.upper() if "random" in label else label


def _score(row: Row, metric: str, net: str, best: str | None, spread: str, notes: dict[str, int]) -> Cell:
    score = row.scores[metric]
    if score is None:
        return Cell(("unavailable",), (_number(notes, f"LPIPS is unavailable: {lpips_reason(row)}"),))
    if metric == "lpips" and row.lpips.net != net:
        return Cell((NONE,))
    mean = _rounded(score, metric)
    around = ""
    if score.count > 1:
        around = f" ± {score.std:.{METRICS[metric].digits}f}"
        if spread == "interval":
            interval = row.intervals[metric]
            around = f" {span(interval, metric, signed=False)}" if interval else ""
    return Cell((mean + around,), bold=not row.is_baseline and mean == best)


def _rounded(score: Score, metric: str) -> str:
    return f"{score.mean:.{METRICS[metric].digits}f}"


def _best(rows: Sequence[Row], metric: str, net: str) -> str | None:
    """Return the best mean as printed, so that all rows that print the same count as best."""
    rows = [r for r in rows if not r.is_random] or rows
    scores = [r.scores[metric] for r in rows if not net or r.lpips.net == net]
    means = [s for s in scores if s is not None]
    return _rounded(max(means, key=lambda s: METRICS[metric].sign * s.mean), metric) if means else None


def _remark(rows: Rows, spread: str) -> str:
    counts = sorted({score.count for row in rows.all for m in METRICS if (score := row.scores[m])})
    over = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    best = " Bold: the best decoder row, ties included." if rows.decoders else ""
    return f"Mean {SPREADS[spread]} over {over} test image{'s' if counts != [1] else ''}.{best}"


_RIGHT = ("reduction", "seed", "parameters", "training")
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def markdown_table(rows: Rows, *, spread: str = "std") -> str:
    """Write a GitHub Markdown table with its footnotes, a row for each run, baselines last."""
    table = lay_out(rows, spread=spread)
    every = itertools.chain(*table.groups.values())
    cells = ([_markdown_names(line), *map(_markdown_cell, line.cells)] for line in every)
    right = [markdown(name) for name in table.header if _is_right(name)]
    grid = markdown_grid([*map(markdown, table.header)], cells, right=right)
    lines = [grid, "", markdown(table.remark)]
    lines += [f"\n{superscript([i])} {markdown(note)}" for i, note in enumerate(table.footnotes, 1)]
    return "\n".join(lines) + "\n"


def latex_table(rows: Rows, *, spread: str = "std") -> str:
    r"""Write a booktabs table, a group of rows for each encoder. Needs `\usepackage{booktabs,textcomp}`."""
    table = lay_out(rows, spread=spread)
    drop = table.header.index("weights")
    header = [name for i, name in enumerate(table.header) if i != drop]
    columns = "".join("r" if _is_right(name) else "l" for name in header)
    lines = [
        r"% \usepackage{booktabs,textcomp}", rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\toprule",
        _latex_line(map(latex, header)), r"\midrule",
    ]  # fmt: skip
    for i, (group, members) in enumerate(table.groups.items()):
        lines += [r"\addlinespace"] if i else []
        lines.append(rf"\multicolumn{{{len(header)}}}{{@{{}}l}}{{{_latex_heading(*group)}}} \\")
        for line in members:
            cells = [c for i, c in enumerate(line.cells, 1) if i != drop]
            lines += _latex_row(Cell(_short(line.row, line.names.lines), line.names.marks), cells)
    lines += [r"\bottomrule", r"\end{tabular}", "", r"{\smallskip\footnotesize", latex(table.remark)]
    lines += [rf"\par\textsuperscript{{{i}}} {latex(note)}" for i, note in enumerate(table.footnotes, 1)]
    lines.append(r"\par}")
    return "\n".join(lines) + "\n"


def csv_table(rows: Rows) -> str:
    """Write every number unrounded, a line for each run; inversions and unfinished runs are included."""
    lines = records(rows)
    lines += [
        {"run": spreadsheet(u.run.name), "state": u.state, "error": spreadsheet(u.error)}
        for u in rows.unfinished
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*lines[0], "error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def records(rows: Rows) -> list[dict[str, Any]]:
    """Return the CSV lines of the finished runs; several sources are joined by ` + `."""
    return [_record(row) for row in rows.every]


def superscript(marks: Iterable[int]) -> str:
    return ",".join(map(str, marks)).translate(_SUPERSCRIPT)


def _is_right(name: str) -> bool:
    return name in _RIGHT or "↑" in name or "↓" in name


def _markdown_names(line: Line) -> str:
    sources = line.row.sources
    names = [markdown_code(name) if name in sources else markdown(name) for name in line.names.lines]
    return "<br>".join(names) + superscript(line.names.marks)


def _markdown_cell(cell: Cell) -> str:
    text = "<br>".join(map(markdown, cell.lines))
    return (f"**{text}**" if cell.bold or cell.loud else text) + superscript(cell.marks)


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_heading(encoder: str, weights: str) -> str:
    if not encoder:
        return r"\emph{baselines}"
    name = "fusion of several sources" if encoder == "fusion" else rf"\texttt{{{latex(encoder)}}}"
    loud = rf"\textbf{{{latex(weights.upper())} WEIGHTS}}"
    return f"{name}, {loud if 'random' in weights else latex(weights) + ' weights'}"


def _latex_row(names: Cell, cells: list[Cell]) -> Iterable[str]:
    """Yield a row in LaTeX; cells with several lines continue in further rows."""
    every = [names, *cells]
    for i in range(max(len(cell.lines) for cell in every)):
        yield _latex_line(_latex_cell(cell, i) for cell in every)


def _latex_cell(cell: Cell, i: int) -> str:
    if i >= len(cell.lines):
        return ""
    text = latex(cell.lines[i])
    text = rf"\textbf{{{text}}}" if cell.bold or cell.loud else text
    return text + (rf"\textsuperscript{{{','.join(map(str, cell.marks))}}}" if cell.marks and i == 0 else "")


def _short(row: Row, names: tuple[str, ...]) -> tuple[str, ...]:
    return (row.layer,) if len(row.sources) == 1 else names


def _record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "run": row.run.name, "state": "done", "kind": row.kind, "label": row.label,
        "sources": " + ".join(row.sources), "shapes": " + ".join(row.shapes),
        "reductions": " + ".join(row.reductions),
        "locations": row.locations, "values_per_pixel": row.values_per_pixel,
        "fusion": row.fusion_text if len(row.sources) > 1 else "",
        "decoder": row.decoder, "variant": row.variant,
        "weights": "" if row.is_baseline else row.origin, "seed": row.seed,
        "parameters": row.parameters, "train_seconds": row.train_seconds,
    }  # fmt: skip
    for metric in METRICS:
        score = row.scores[metric]
        record[f"{metric}_mean"] = score and score.mean
        record[f"{metric}_std"] = score and score.std
        interval = row.intervals[metric] if score and score.count > 1 else None
        record[f"{metric}_low95"] = interval and interval.low
        record[f"{metric}_high95"] = interval and interval.high
        record[f"{metric}_count"] = score and score.count
    # Conditions that must agree before scores compare.
    record |= {"data_digest": row.data.digest, "crop": str(row.data.crop)}
    record["passes"] = row.config.inversion.steps if row.inversion else None
    record["lpips_net"] = row.lpips.net if row.scores["lpips"] else ""
    record["lpips_reason"] = "" if row.scores["lpips"] else lpips_reason(row)
    record["notes"] = "; ".join(map(plain, row.notes))
    return {key: spreadsheet(value) if isinstance(value, str) else value for key, value in record.items()}


# Columns dropped in this order until the table fits; "±" is the spread after each score.
EXPENDABLE = ("reduction", "±", "shape", "parameters", "training", "seed")
HEADING = 24


def console_table(rows: Rows, *, width: int | None = None) -> RichTable:
    """Build a rich `Table` of at most `width` columns (default: the terminal's), captioned by footnotes."""
    screen = console(width)
    for count in range(len(EXPENDABLE) + 1):
        table = _build(rows, EXPENDABLE[:count])
        if table.__rich_measure__(screen, screen.options.update(max_width=10_000)).maximum <= screen.width:
            break
    return table


def _build(rows: Rows, dropped: tuple[str, ...]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    layout = lay_out(rows)
    keep = [i for i, name in enumerate(layout.header) if name != "weights" and name not in dropped]
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption=Text("\n".join(_caption(rows, layout.remark, layout.footnotes))), caption_justify="left",
    )  # fmt: skip
    for i in keep:
        name = layout.header[i]
        header = Text(name.replace(" (", "\n("))
        if name in ("features", "shape", "decoder"):
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for (encoder, weights), lines in layout.groups.items():
        style = "bold red" if "random" in weights else "bold"
        table.add_row(Text("\n".join(_heading(encoder, weights)), style=style))
        for line in lines:
            cells = [_console_names(line), *(_text(cell, "±" not in dropped) for cell in line.cells)]
            table.add_row(*(cells[i] for i in keep))
        table.add_section()
    return table


def _heading(encoder: str, weights: str) -> list[str]:
    """Return the lines of a group's heading. Rich has no cells across columns, so long names are broken."""
    if not encoder:
        return ["baselines"]
    weights = f"{weights.upper()} WEIGHTS" if "random" in weights else weights
    name = plain(encoder, 60)
    if len(name) + len(weights) + 2 <= HEADING:
        return [f"{name}, {weights}"]
    model, dot, tag = name.partition(".")
    return [name, weights] if len(name) <= HEADING or not dot else [model, dot + tag, weights]


def _console_names(line: Line) -> Text:
    name = line.row.label if line.row.is_baseline else line.row.layer
    return _text(Cell((plain(name, 44),), line.names.marks), True, indent="  ")


def _text(cell: Cell, has_spread: bool, indent: str = "") -> Text:
    """Style the first line of a cell; the caption contains the further lines of a fusion."""
    from rich.text import Text

    text = plain(cell.lines[0], 44)
    text = text if has_spread else text.partition(" ± ")[0]
    style = "bold green" if cell.bold else "dim" if text in (NONE, "unavailable") else ""
    return Text(indent + text, style=style).append(superscript(cell.marks), style="dim")


def _caption(rows: Rows, remark: str, footnotes: tuple[str, ...]) -> list[str]:
    lines = [remark, *fusion_legend(rows.decoders)]
    lines += [f"{superscript([i])} {plain(note)}" for i, note in enumerate(footnotes, 1)]
    lines += [f"! {plain(warning)}" for warning in rows.warnings]
    lines += [f"! {plain(str(u))}" for u in rows.unfinished]
    return lines
