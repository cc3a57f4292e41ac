"""Output of results on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afterimage.config import AfterimageError, counted, shown
from afterimage.runs.results import METRICS, LpipsStatus, Score
from afterimage.runs.run import check_file
from afterimage.runtime.terminal import complain, console, printable

if TYPE_CHECKING:
    from rich.table import Table

    from afterimage.report.format import Numbers


def check_png(path: Path) -> None:
    """Raise unless the file of --output is a PNG file that can be written."""
    if path.suffix.lower() != ".png":
        raise AfterimageError(f"--output {shown(path)}: the figure is a PNG file, name it .png")
    check_file(path, "--output")


def print_failures(failures: Iterable[AfterimageError]) -> None:
    """Print each failure on standard error."""
    for error in failures:
        complain("failed", error)


def table(title: str, left: Sequence[str], right: Sequence[str] = (), last: Sequence[str] = ()) -> Table:
    """Create a table with columns of text on the left, of numbers beside them, and of text again at the end."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for names, side in ((left, "left"), (right, "right"), (last, "left")):
        for name in names:
            table.add_column(name, overflow="fold", justify=side)
    return table


def print_numbers(numbers: Numbers, columns: Table, width: int) -> None:
    """Print the rows of a table of numbers under the given columns."""
    for row in numbers.rows:
        columns.add_row(*map(printable, row))
    console(width).print(columns)


def score_line(name: str, score: Score | None, lpips: LpipsStatus) -> str:
    """Return a score as text, such as `PSNR 24.31 ± 2.80 dB over 100 images`; None for an unavailable metric."""
    metric = METRICS[name]
    if score is None:
        return f"{metric.title} unavailable: {lpips.reason}"
    label = f"LPIPS ({lpips.net})" if name == "lpips" else metric.title
    unit, digits = metric.unit, 2 if name == "psnr" else 4
    if score.std is None:
        return f"{label} {score.mean:.{digits}f}{unit}"
    return (
        f"{label} {score.mean:.{digits}f} ± {score.std:.{digits}f}{unit} over {counted(score.count, 'image')}"
    )


def image_lines(scores: Mapping[str, float | None], lpips: LpipsStatus) -> list[str]:
    """Return a `score_line` for each score of one image."""
    return [
        score_line(name, None if value is None else Score(value, None, 1), lpips)
        for name, value in scores.items()
    ]


def print_table(runs: list) -> None:
    """Print the table of results, and below it the table of measured bounds if there are any."""
    from afterimage.report.rows import read_rows
    from afterimage.report.tables import console_table

    rows = read_rows(runs)
    console(160).print(console_table(rows))
    if rows.inversions:
        from afterimage.report.inversion import print_bounds

        print_bounds(rows.inversions)
