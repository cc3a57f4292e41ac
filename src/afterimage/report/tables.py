"""The table of results in four forms: terminal, Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afterimage.config import PROTOCOLS, check_choice
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.format import (
    MISSING,
    extent,
    interval_ends,
    latex,
    markdown,
    markdown_code,
    markdown_grid,
    single_line,
    spreadsheet,
)
from afterimage.report.rows import Row, Rows, group_by
from afterimage.runs.results import METRICS, Score
from afterimage.runtime.terminal import console

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text


SPREADS = {"std": "± standard deviation ", "interval": f"and its {INTERVAL_NAME} "}
"""Text of the caption on what follows each mean."""


@dataclass(frozen=True)
class Cell:
    """Content of one cell: lines of text and footnote numbers; `bold` marks the best score, and random weights."""

    lines: tuple[str, ...]
    footnote_numbers: tuple[int, ...] = ()
    bold: bool = False


@dataclass(frozen=True)
class Line:
    """One row of the table, with its cells by the headings of their columns."""

    row: Row
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """The whole table, with its footnotes and a remark on all of it."""

    lines: tuple[Line, ...]
    footnotes: tuple[str, ...]
    remark: str

    @property
    def header(self) -> tuple[str, ...]:
        return tuple(self.lines[0].cells)


def build_table(rows: Rows, *, spread: str = "std") -> Table:
    """Lay out the whole table. `spread` selects what follows a mean: `std` (deviation) or `interval`."""
    check_choice("spread", spread, SPREADS)
    protocol = rows.protocol
    missing = PROTOCOLS[protocol].unavailable_metrics if protocol else {}
    best = {column: best_mean(rows.decoders, *column) for column in score_columns(rows.nets or ("",))}
    seeds = len({row.seed for row in rows.decoders}) > 1
    notes: dict[str, int] = {}
    lines = []
    for row in rows.all:
        cells = _description_cells(row, seeds, notes)
        for (metric, net), mean in best.items():
            cells[heading(metric, net, protocol)] = _score(row, metric, net, mean, spread, notes)
        for metric, why in missing.items():
            mark = _number(notes, f"{metric} is not measured: {why}")
            cells[f"{metric}, {protocol} ↓"] = Cell(("not measured",), (mark,))
        lines.append(Line(row, cells))
    return Table(tuple(lines), tuple(notes), _remark(rows, SPREADS[spread]))


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
        return MISSING
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def _description_cells(row: Row, seeds: bool, notes: dict[str, int]) -> dict[str, Cell]:
    """Return the cells before the scores; those of a fusion have a line for itself and one for each source."""

    def for_each(lines: Iterable[str]) -> tuple[str, ...]:
        return ("", *lines) if row.is_fused else tuple(lines) or (MISSING,)

    names = row.sources or (row.label,)
    if row.is_fused:
        names = (f"{row.fusion_letter}: {row.fusion_text}", *names)
    seconds = "elsewhere" if row.is_imported else duration(row.train_seconds)
    texts = {
        "features": names,
        "shape": for_each(row.shapes),
        "reduction": for_each(f"{reduction}×" for reduction in row.reductions),
        "decoder": (row.decoder_label or MISSING,),
        "seed": (MISSING if row.seed is None else str(row.seed),),
        "weights": (MISSING if row.is_baseline else weights_text(row.weights_label),),
        "parameters": (MISSING if row.is_baseline or row.parameters is None else f"{row.parameters:,}",),
        "training": (MISSING if row.is_baseline else seconds,),
    }
    cells = {name: Cell(lines, bold=name == "weights" and row.is_random) for name, lines in texts.items()}
    cells["features"] = Cell(names, tuple(_number(notes, note) for note in row.notes))
    return cells if seeds else {name: cell for name, cell in cells.items() if name != "seed"}


def weights_text(label: str) -> str:
    """Return the label of an encoder's weights, in capitals where they are random."""
    return label.upper() if "random" in label else label


def _score(row: Row, metric: str, net: str, best: str | None, spread: str, notes: dict[str, int]) -> Cell:
    score = row.scores[metric]
    if score is None:
        return Cell(("unavailable",), (_number(notes, f"LPIPS is unavailable: {lpips_reason(row)}"),))
    if metric == "lpips" and row.lpips.net != net:
        return Cell((MISSING,))
    mean = _rounded(score, metric)
    around = ""
    if score.count > 1:
        around = f" ± {score.std:.{METRICS[metric].digits}f}"
        if spread == "interval":
            interval = row.intervals[metric]
            around = f" {interval_ends(interval, metric, signed=False)}" if interval else ""
    return Cell((mean + around,), bold=not row.is_baseline and mean == best)


def _rounded(score: Score, metric: str) -> str:
    return f"{score.mean:.{METRICS[metric].digits}f}"


def best_mean(rows: Sequence[Row], metric: str, net: str = "") -> str | None:
    """Return the best mean as printed, so that all rows that print the same count as best; None without scores.

    Random controls count only if there is nothing else, and rows that another LPIPS network measured do not.
    """
    rows = [r for r in rows if not r.is_random] or rows
    scores = [r.scores[metric] for r in rows if not net or r.lpips.net == net]
    means = [s for s in scores if s is not None]
    return _rounded(max(means, key=lambda s: METRICS[metric].sign * s.mean), metric) if means else None


def _remark(rows: Rows, spread: str) -> str:
    counts = {score.count for row in rows.all for m in METRICS if (score := row.scores[m])}
    best = " Bold: the best decoder row, ties included." if rows.decoders else ""
    return f"Mean {spread}over {extent(counts)} test image{'s' if counts != {1} else ''}.{best}"


_RIGHT = ("reduction", "seed", "parameters", "training")
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def markdown_table(rows: Rows, *, spread: str = "std") -> str:
    """Write a GitHub Markdown table with its footnotes, a row for each run, baselines last."""
    table = build_table(rows, spread=spread)
    cells = ([_markdown_cell(cell, line.row) for cell in line.cells.values()] for line in table.lines)
    right = [markdown(name) for name in table.header if _is_right(name)]
    grid = markdown_grid([*map(markdown, table.header)], cells, right=right)
    lines = [grid, "", markdown(table.remark)]
    lines += [f"\n{superscript([i])} {markdown(note)}" for i, note in enumerate(table.footnotes, 1)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell, row: Row) -> str:
    lines = (markdown_code(line) if line in row.sources else markdown(line) for line in cell.lines)
    text = "<br>".join(lines)
    return (f"**{text}**" if cell.bold else text) + superscript(cell.footnote_numbers)


def superscript(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers)).translate(_SUPERSCRIPT)


def _is_right(name: str) -> bool:
    return name in _RIGHT or "↑" in name or "↓" in name


def latex_table(rows: Rows, *, spread: str = "std") -> str:
    r"""Write the table of `markdown_table` with booktabs. Needs `\usepackage{booktabs,textcomp}`."""
    table = build_table(rows, spread=spread)
    columns = "".join("r" if _is_right(name) else "l" for name in table.header)
    lines = [
        r"% \usepackage{booktabs,textcomp}", rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\toprule",
        " & ".join(map(latex, table.header)) + r" \\", r"\midrule",
    ]  # fmt: skip
    for cells in (line.cells.values() for line in table.lines):
        # Cells with several lines continue in further rows.
        for part in range(max(len(cell.lines) for cell in cells)):
            lines.append(" & ".join(_latex_cell(cell, part) for cell in cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", "", r"{\smallskip\footnotesize", latex(table.remark)]
    lines += [rf"\par\textsuperscript{{{i}}} {latex(note)}" for i, note in enumerate(table.footnotes, 1)]
    lines.append(r"\par}")
    return "\n".join(lines) + "\n"


def _latex_cell(cell: Cell, i: int) -> str:
    if i >= len(cell.lines):
        return ""
    text = latex(cell.lines[i])
    text = rf"\textbf{{{text}}}" if cell.bold else text
    return text + (
        rf"\textsuperscript{{{','.join(map(str, cell.footnote_numbers))}}}"
        if cell.footnote_numbers and i == 0
        else ""
    )


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
    return [_record(row) for row in rows.with_inversions]


def _record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {
        "run": row.run.name, "state": "done", "kind": row.kind, "label": row.label,
        "sources": row.features_text, "shapes": " + ".join(row.shapes),
        "reductions": " + ".join(row.reductions),
        "locations": row.locations, "values_per_pixel": row.values_per_pixel,
        "fusion": row.fusion_text if len(row.sources) > 1 else "",
        "decoder": row.decoder, "variant": row.variant,
        "weights": "" if row.is_baseline else row.weights_label, "seed": row.seed,
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
    record["notes"] = "; ".join(map(single_line, row.notes))
    return {key: spreadsheet(value) if isinstance(value, str) else value for key, value in record.items()}


def fusion_legend(rows: Iterable[Row]) -> list[str]:
    """Explain the fusion letters: `fusion A: attention fusion, … of resnet34:layer1 + vgg16:block1`."""
    fused = [row for row in rows if row.is_fused]
    return list(dict.fromkeys(f"{r.layer}: {r.fusion_text} of {' + '.join(r.sources)}" for r in fused))


# Columns dropped in this order until the table fits; "±" is the spread after each score.
OPTIONAL_COLUMNS = ("reduction", "±", "shape", "parameters", "training", "seed")
HEADING = 24
"""Width from which a group's heading continues on the next line."""


def console_table(rows: Rows, *, width: int | None = None) -> RichTable:
    """Build a rich `Table` of at most `width` columns (default: the terminal's), captioned by footnotes."""
    screen, layout = console(width), build_table(rows)
    for count in range(len(OPTIONAL_COLUMNS) + 1):
        table = _build(rows, layout, OPTIONAL_COLUMNS[:count])
        if table.__rich_measure__(screen, screen.options.update(max_width=10_000)).maximum <= screen.width:
            break
    return table


def _build(rows: Rows, layout: Table, dropped: tuple[str, ...]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    caption = [_remark(rows, "" if "±" in dropped else SPREADS["std"]), *fusion_legend(rows.decoders)]
    caption += [f"{superscript([i])} {single_line(note)}" for i, note in enumerate(layout.footnotes, 1)]
    caption += [f"! {single_line(str(warning))}" for warning in (*rows.warnings, *rows.unfinished)]
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=Text("\n".join(caption)), caption_justify="left"
    )  # fmt: skip
    keep = [name for name in layout.header if name not in ("weights", *dropped)]
    for name in keep:
        header = Text(name.replace(" (", "\n("))
        if name in ("features", "shape", "decoder"):
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    groups = group_by(
        layout.lines, lambda line: (line.row.encoder, line.row.control.upper() or line.row.weights_label)
    )
    for (encoder, weights), lines in groups.items():
        style = "bold red" if lines[0].row.is_random else "bold"
        table.add_row(Text("\n".join(_heading(encoder, weights)), style=style))
        for line in lines:
            name = line.row.label if line.row.is_baseline else line.row.layer
            first = _text(Cell((name,), line.cells["features"].footnote_numbers), True, indent="  ")
            table.add_row(first, *(_text(line.cells[name], "±" not in dropped) for name in keep[1:]))
        table.add_section()
    return table


def _heading(encoder: str, weights: str) -> list[str]:
    """Return the lines of a group's heading. Rich has no cells across columns, so long names are broken."""
    if not encoder:
        return ["baselines"]
    name = single_line(encoder, 60)
    if len(name) + len(weights) + 2 <= HEADING:
        return [f"{name}, {weights}"]
    model, dot, tag = name.partition(".")
    return [name, weights] if len(name) <= HEADING or not dot else [model, dot + tag, weights]


def _text(cell: Cell, has_spread: bool, indent: str = "") -> Text:
    """Style the first line of a cell; the caption contains the further lines of a fusion."""
    from rich.text import Text

    text = single_line(cell.lines[0], 44)
    text = text if has_spread else text.partition(" ± ")[0]
    style = "bold green" if cell.bold else "dim" if text in (MISSING, "unavailable") else ""
    return Text(indent + text, style=style).append(superscript(cell.footnote_numbers), style="dim")
