"""The table for the terminal: as much of it as the width holds, the scores always."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afterimage.report.escape import plain
from afterimage.report.layout import NONE, Cell, Group, Line, lay_out
from afterimage.report.rows import Rows
from afterimage.report.tables import superscript
from afterimage.report.variants import fusion_legend
from afterimage.terminal import console

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

# Left out one after the other until the table fits; "±" is the spread behind each score.
EXPENDABLE = ("reduction", "±", "shape", "parameters", "training", "seed")
HEADING = 24


def console_table(rows: Rows, *, width: int | None = None, title: str | None = None) -> RichTable:
    """A rich `Table` of at most `width` columns (default: the terminal's), its footnotes as caption."""
    screen = console(width)
    for count in range(len(EXPENDABLE) + 1):
        table = _build(rows, EXPENDABLE[:count], title)
        if table.__rich_measure__(screen, screen.options.update(max_width=10_000)).maximum <= screen.width:
            break
    return table


def _build(rows: Rows, dropped: tuple[str, ...], title: str | None) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    layout = lay_out(rows)
    keep = [i for i, name in enumerate(layout.header) if name != "weights" and name not in dropped]
    table = RichTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title and Text(plain(title)), title_justify="left",
        caption=Text("\n".join(_caption(rows, layout.remark, layout.footnotes))), caption_justify="left",
    )  # fmt: skip
    for i in keep:
        name = layout.header[i]
        header = Text(name.replace(" (", "\n("))
        if name in ("features", "shape", "decoder"):
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for group in layout.groups:
        style = "bold red" if group.loud else "bold"
        table.add_row(Text("\n".join(_heading(group)), style=style))
        for line in group.lines:
            cells = [_names(line), *(_text(cell, "±" not in dropped) for cell in line.cells)]
            table.add_row(*(cells[i] for i in keep))
        table.add_section()
    return table


def _heading(group: Group) -> list[str]:
    """Rich has no cells across columns, so a long name goes on in a second line."""
    if not group.encoder:
        return ["reference lines"]
    weights = f"{group.weights.upper()} WEIGHTS" if group.loud else group.weights
    name = plain(group.encoder, 60)
    if len(name) + len(weights) + 2 <= HEADING:
        return [f"{name}, {weights}"]
    model, dot, tag = name.partition(".")
    return [name, weights] if len(name) <= HEADING or not dot else [model, dot + tag, weights]


def _names(line: Line) -> Text:
    name = line.row.layer if line.row.kind != "reference" else line.row.label
    return _text(Cell((plain(name, 44),), line.names.marks), True, indent="  ")


def _text(cell: Cell, has_spread: bool, indent: str = "") -> Text:
    """The cell's first line: what a fusion's further lines say stands in the caption."""
    from rich.text import Text

    text = plain(cell.lines[0], 44)
    text = text if has_spread else text.partition(" ± ")[0]
    style = "bold green" if cell.bold else "dim" if text in (NONE, "unavailable") else ""
    return Text(indent + text, style=style).append(superscript(cell.marks), style="dim")


def _caption(rows: Rows, remark: str, footnotes: tuple[str, ...]) -> list[str]:
    lines = [remark, *fusion_legend(rows.decoders)]
    lines += [f"{superscript([i])} {plain(note)}" for i, note in enumerate(footnotes, 1)]
    lines += [f"! {plain(warning)}" for warning in rows.warnings]
    lines += [f"! {plain(': '.join(filter(None, (u.run.name, u.state, u.error))))}" for u in rows.unfinished]
    return lines
