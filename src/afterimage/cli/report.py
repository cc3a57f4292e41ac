"""`afterimage report`: write tables, figures and the page from run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.config import AfterimageError, shown
from afterimage.runs.repository import PREFIX
from afterimage.runs.run import Run, check_folder, scan
from afterimage.runtime.terminal import Display, say


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
        # Look before the slow imports, so that a wrong folder is reported at once.
        runs = find_runs(self.folders)

        from afterimage.report.write import write_report

        output = self.output_dir or self.folders[0] / "report"
        check_folder(output, "--output-dir")
        title, spread = self.title or self.folders[0].resolve().name, "interval" if self.intervals else "std"
        with Display() as display:
            written = write_report(runs, output, title=title, spread=spread, progress=display)
        named = [written[name] for name in ("report.md", "index.html") if name in written]
        say(*map(shown, named), f"and {len(written) - len(named)} more files beside them")
        if "index.html" not in written:
            say("afterimage: the page could not be written; report.md says why", error=True)


def find_runs(folders: tuple[Path, ...]) -> list[Run]:
    """Find the runs in folders, each of which is a run folder or holds run folders.

    Raises:
        AfterimageError: no folder is given, one does not exist, or there is no run in any
    """
    if not folders:
        raise AfterimageError("name at least one run folder, or a folder that holds some")
    runs = [
        run
        for folder in folders
        for run in ([Run(folder)] if (folder / "config.toml").exists() else scan(folder))
    ]
    if not runs:
        raise AfterimageError(f"there is no run in {', '.join(map(shown, folders))}")
    return runs


def find_named(names: tuple[str, ...]) -> list[Run]:
    """Find the runs in folders, as `find_runs` does, and all decoders at addresses of the hub (`hub:USER/NAME`)."""
    addresses = [name for name in names if name.startswith(PREFIX)]
    folders = tuple(Path(name) for name in names if name not in addresses)
    runs = find_runs(folders) if folders or not addresses else []
    if addresses:
        from afterimage.models.hub import pull_all

        runs += [run for address in addresses for run in pull_all(address)]
    return runs


def sort_arguments(given: tuple[str, ...]) -> tuple[list[Path], list[Path], list[str]]:
    """Sort arguments into run folders, image files and `model:layer` by what exists on disk.

    Raises:
        AfterimageError: an argument is none of the three; the message names it
    """
    folders, files, layers = [], [], []
    for name in given:
        path = Path(name)
        if path.exists():
            (folders if path.is_dir() else files).append(path)
        elif ":" in name:
            layers.append(name)
        else:
            raise AfterimageError(f"{shown(name)} is no image file, no run folder and no MODEL:LAYER")
    return folders, files, layers
