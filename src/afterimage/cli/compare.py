"""`afterimage compare`: rank your own encoders among those of an atlas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli.shared import check_png, find_local_or_hub_runs, print_numbers, table
from afterimage.config import printable_path
from afterimage.runs.files import write_atomic
from afterimage.runs.repository import PREFIX
from afterimage.runtime.terminal import print_lines


@dataclass(frozen=True)
class Compare:
    """Rank finished runs among the rows of an atlas that were measured alike and have about as many feature values.

    An atlas is a study of many encoders, such as `afterimage study atlas`.
    """

    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|hub:USER/NAME [...]")
    ]
    """Runs of your encoders: run folders, folders that hold run folders, or decoders of the Hugging Face hub."""
    atlas: Annotated[Path, tyro.conf.arg(name="with", metavar="ATLAS")]
    """Atlas: a study's folder, the table.csv of its report, that table as .parquet, or a study's scores on the hub,
    hub:USER/NAME[@REVISION]."""
    within: float = 1.5
    """Largest factor between the numbers of feature values of rows that are ranked together."""
    output: Path = Path("compare.png")
    """PNG file for the figure."""

    def run(self) -> None:
        from afterimage.report.compare import compare, entries, read_atlas, standings_table
        from afterimage.report.reading import read_rows
        from afterimage.report.tables import records

        check_png(self.output)

        def of(*names: str) -> list:
            return records(read_rows(find_local_or_hub_runs(names)))

        file, name = self.atlas, printable_path(self.atlas)
        if str(file).startswith(PREFIX):
            from afterimage.models.hub import pull_table

            file, name = pull_table(str(file))
            print_lines(f"atlas: {name}")
        atlas = of(str(file)) if file.is_dir() else read_atlas(file)
        mine = entries(of(*self.runs), ", ".join(map(printable_path, self.runs)))
        comparison = compare(mine, entries(atlas, name), within=self.within)
        standings = standings_table(comparison)
        first, second, *between, last = standings.header
        print_numbers(standings, table(standings.title, (first, second), between, (last,)), 160)
        print_lines(*comparison.remarks)

        from afterimage.report.figures import render, style
        from afterimage.report.figures.scatter import ranking_figure

        with style():
            drawing = ranking_figure(comparison)
        write_atomic(self.output, render(drawing.figure)[0])
        print_lines(f"saved: {printable_path(self.output)} ({drawing.caption})")
