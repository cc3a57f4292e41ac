"""The table of a study as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from afterimage.report.escape import latex, markdown, markdown_code, plain, spreadsheet
from afterimage.report.layout import Cell, Line, lay_out
from afterimage.report.rows import METRICS, Row, Rows
from afterimage.report.variants import fusion_text

_RIGHT = ("reduction", "seed", "parameters", "training")
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def markdown_table(rows: Rows, *, spread: str = "std") -> str:
    """A GitHub table with its footnotes. One row a run; reference lines last."""
    table = lay_out(rows, spread=spread)
    lines = [_markdown_line(map(markdown, table.header))]
    lines.append(_markdown_line("---:" if _is_right(name) else "---" for name in table.header))
    for group in table.groups:
        for line in group.lines:
            lines.append(_markdown_line([_markdown_names(line), *map(_markdown_cell, line.cells)]))
    lines += ["", markdown(table.remark)]
    lines += [f"\n{superscript([i])} {markdown(note)}" for i, note in enumerate(table.footnotes, 1)]
    return "\n".join(lines) + "\n"


def latex_table(rows: Rows, *, spread: str = "std") -> str:
    r"""A booktabs table: needs `\usepackage{booktabs,textcomp}`. One group of rows an encoder."""
    table = lay_out(rows, spread=spread)
    drop = table.header.index("weights")
    header = [name for i, name in enumerate(table.header) if i != drop]
    columns = "".join("r" if _is_right(name) else "l" for name in header)
    lines = [
        r"% \usepackage{booktabs,textcomp}", rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\toprule",
        _latex_line(map(latex, header)), r"\midrule",
    ]  # fmt: skip
    for i, group in enumerate(table.groups):
        lines += [r"\addlinespace"] if i else []
        head = _latex_heading(group.encoder, group.weights)
        lines.append(rf"\multicolumn{{{len(header)}}}{{@{{}}l}}{{{head}}} \\")
        for line in group.lines:
            cells = [c for i, c in enumerate(line.cells, 1) if i != drop]
            lines += _latex_row(Cell(_short(line.row, line.names.lines), line.names.marks), cells)
    lines += [r"\bottomrule", r"\end{tabular}", "", r"{\smallskip\footnotesize", latex(table.remark)]
    lines += [rf"\par\textsuperscript{{{i}}} {latex(note)}" for i, note in enumerate(table.footnotes, 1)]
    lines.append(r"\par}")
    return "\n".join(lines) + "\n"


def csv_table(rows: Rows) -> str:
    """Every number unrounded, one line a run, unfinished runs with their state and error."""
    lines = [_record(row) for row in rows.all]
    lines += [
        {"run": spreadsheet(u.run.name), "state": u.state, "error": spreadsheet(u.error)}
        for u in rows.unfinished
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*lines[0], "error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def superscript(marks: Iterable[int]) -> str:
    return ",".join(map(str, marks)).translate(_SUPERSCRIPT)


def _is_right(name: str) -> bool:
    return name in _RIGHT or "↑" in name or "↓" in name


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


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
        return r"\emph{reference lines}"
    name = "fusion of several sources" if encoder == "fusion" else rf"\texttt{{{latex(encoder)}}}"
    loud = rf"\textbf{{{latex(weights.upper())} WEIGHTS}}"
    return f"{name}, {loud if 'random' in weights else latex(weights) + ' weights'}"


def _latex_row(names: Cell, cells: list[Cell]) -> Iterable[str]:
    """Cells of several lines continue in rows of their own."""
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
    """One line of the CSV; several sources are joined by ` + `."""
    record: dict[str, Any] = {
        "run": row.run.name, "state": "done", "kind": row.kind, "label": row.label,
        "sources": " + ".join(row.sources), "shapes": " + ".join(row.shapes),
        "reductions": " + ".join(row.reductions),
        "locations": row.locations, "fusion": fusion_text(row) if len(row.sources) > 1 else "",
        "decoder": row.decoder, "variant": row.variant,
        "weights": row.weights_label if row.kind != "reference" else "", "seed": row.seed,
        "parameters": row.parameters, "train_seconds": row.train_seconds,
    }  # fmt: skip
    for metric in METRICS:
        score = row.scores[metric]
        record[f"{metric}_mean"] = score and score.mean
        record[f"{metric}_std"] = score and score.std
        record[f"{metric}_margin95"] = score and score.margin
        record[f"{metric}_count"] = score and score.count
    record["lpips_net"] = row.lpips_net if row.scores["lpips"] else ""
    record["lpips_reason"] = "" if row.scores["lpips"] else row.lpips_reason
    record["notes"] = "; ".join(map(plain, row.notes))
    return {key: spreadsheet(value) if isinstance(value, str) else value for key, value in record.items()}
