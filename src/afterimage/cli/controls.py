"""`afterimage controls`: feature ablations, error breakdown and rate-distortion of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import find_runs, print_failures, print_numbers, table
from afterimage.runs.controls import CONTROL_TYPES
from afterimage.runs.run import Run, check_folder, is_done
from afterimage.runtime.terminal import Display, console


@dataclass(frozen=True)
class Controls:
    """Measure controls of finished runs on their own test images, for the next report to show.

    Writes into each run folder, each with a CSV of scores by image: controls.json (the trained decoder on another
    image's features, shuffled, mean and zero features, and the distance between the features of image and
    reconstruction), error_breakdown.json (the error by frequency, luma and chroma, position and kind of region) and
    rate_distortion.json (features at 8 to 1 bits, entropy-coded, compared with JPEG and WebP).
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FOLDER [...]")]
    """Run folders, or folders that hold run folders."""
    only: tuple[str, ...] = ()
    """Parts to measure: controls, error_breakdown, rate_distortion (default: all)."""
    force: bool = False
    """Measure again even if there are results."""
    weights: shared.WeightsOverride = None
    lpips: shared.LpipsOverride = None
    cache: shared.Cache = None
    device: shared.Device = "auto"

    def run(self) -> None:
        from afterimage.analysis.controls.run import run_controls

        runs = find_runs(self.folders)
        for run in runs:
            check_folder(run.path, "the run folder")
        with Display() as display:
            failures = run_controls(
                runs,
                parts=self.only or tuple(CONTROL_TYPES),
                force=self.force,
                weights=self.weights,
                lpips=self.lpips,
                cache=self.cache,
                accelerator=self.device,
                progress=display,
            )
        print_controls(runs)
        print_failures(failures)
        if failures:
            raise SystemExit(1)


def print_controls(runs: list[Run]) -> None:
    """Print the tables of the controls."""
    from afterimage.report.controls import control_findings
    from afterimage.report.reading import read_rows

    done = [run for run in runs if is_done(run)]
    screen = console(180)
    for finding in control_findings(read_rows(done).decoders) if done else ():
        screen.print(finding.title, style="bold")
        for paragraph in finding.paragraphs:
            screen.print(paragraph)
        for numbers in finding.tables:
            print_numbers(numbers, table(numbers.title, numbers.header), 180)
