"""`afterimage evaluate`: measure a finished run on its own images or on others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import score_line
from afterimage.config import format_count, printable_path
from afterimage.runs.files import write_csv
from afterimage.runs.run import Run, check_file
from afterimage.runtime.terminal import Display, print_lines


@dataclass(frozen=True)
class Evaluate:
    """Measure a finished run's decoder again, on its own test images or on others."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """Run folder."""
    data: str | None = None
    """Source of the images to measure on, such as folder:PATH (default: the run's own test images)."""
    weights: shared.WeightsOverride = None
    lpips: shared.LpipsOverride = None
    output: Path | None = None
    """CSV file for the scores of each image."""
    cache: shared.Cache = None
    device: shared.Device = "auto"

    def run(self) -> None:
        from afterimage.evaluation.evaluate import summarise
        from afterimage.evaluation.metrics import Metrics
        from afterimage.experiments.inference import evaluate_run
        from afterimage.runtime.device import device_name

        run = Run.open(self.run_folder)
        if self.output is not None:
            check_file(self.output, "--output")
        metrics = Metrics(self.lpips or run.lpips_net, size=min(run.config.data.size))
        with Display() as display:
            rows, _ = evaluate_run(
                run, metrics, test=self.data, weights=self.weights, cache=self.cache,
                device=device_name(self.device), progress=display,
            )  # fmt: skip
        if self.output is not None:
            write_csv(self.output, rows)
            print_lines(f"scores of {format_count(len(rows), 'image')}: {printable_path(self.output)}")
        for name, score in summarise(rows).items():
            print_lines(score_line(name, score, metrics.lpips_status))
