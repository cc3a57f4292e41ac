"""`afterimage report`: write tables, figures and the page from run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli.shared import find_runs
from afterimage.config import printable_path
from afterimage.runs.run import check_folder
from afterimage.runtime.terminal import Display, print_lines


@dataclass(frozen=True)
class Report:
    """Write a report from run folders alone: report.md, the page index.html, tables and figures."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER [...]")]
    """Run folders, or folders that hold run folders."""
    output_dir: Path | None = None
    """Folder for the report (default: FOLDER/report)."""
    title: str = ""
    """Title of the report (default: the name of FOLDER)."""
    intervals: bool = False
    """Show 95 % intervals of the means in the tables instead of standard deviations over images."""

    def run(self) -> None:
        runs = find_runs(self.folders)  # before the slow imports, so that a wrong folder is reported at once

        from afterimage.report.write import write_report

        output = self.output_dir or self.folders[0] / "report"
        check_folder(output, "--output-dir")
        title, spread = self.title or self.folders[0].resolve().name, "interval" if self.intervals else "std"
        with Display() as display:
            written = write_report(runs, output, title=title, spread=spread, progress=display)
        named = [written[name] for name in ("report.md", "index.html") if name in written]
        print_lines(*map(printable_path, named), f"and {len(written) - len(named)} more files beside them")
        if "index.html" not in written:
            print_lines("afterimage: the page could not be written; report.md says why", error=True)
