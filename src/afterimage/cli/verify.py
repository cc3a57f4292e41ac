"""`afterimage verify`, also `afterimage study verify`: check that the scores of finished runs still hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import find_runs
from afterimage.config import format_count
from afterimage.runtime.terminal import Display, print_lines

EXIT_NOT_MEASURED = 4
"""Exit code if no run fails but some could not be measured; 1 means a run that does not hold, or an error."""


@dataclass(frozen=True)
class Verify:
    """Measure finished runs again and report, for each, whether its stored scores still hold and what has changed.

    Scores hold if every image's PSNR is within 0.01 dB, its SSIM within 0.0001 and its LPIPS within 0.001 of the
    stored value. A run that is not finished, or whose images or weights are missing, is NOT MEASURED, which says
    nothing about its scores. The exit code is 0 if all hold, 1 if any does not (or after an error), and 4 if none
    fails but some could not be measured.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STUDY|RUN [...]")]
    """Run folders, or folders that hold run folders."""
    weights: shared.WeightsOverride = None
    cache: shared.Cache = None
    device: shared.Device = "auto"

    def run(self) -> None:
        runs = find_runs(self.folders)
        from afterimage.experiments.verify import verify_runs

        with Display() as display:
            verifications = verify_runs(
                runs, weights=self.weights, cache=self.cache, accelerator=self.device, progress=display
            )
        for verification in verifications:
            worst = ", ".join(
                f"{name} by {value:.2g}" for name, value in verification.max_differences.items()
            )
            measured = (
                f": {format_count(verification.images, 'image')}, scores differ at most: {worst}"
                if worst
                else ""
            )
            held = (
                "holds" if verification.holds
                else "DOES NOT HOLD" if verification.problems
                else "NOT MEASURED" if verification.missing
                else "not checked"
            )  # fmt: skip
            lines = [
                f"{held}  {verification.run.name}{measured or (verification.skipped and f': {verification.skipped}')}"
            ]
            lines += [f"    {problem}" for problem in (*verification.problems, *verification.missing)]
            lines += [f"    changed: {change}" for change in verification.changes]
            print_lines(*lines)
        hold, fail = sum(v.holds for v in verifications), sum(bool(v.problems) for v in verifications)
        unmeasured = sum(bool(v.missing and not v.problems) for v in verifications)
        told = f", {unmeasured} could not be measured" if unmeasured else ""
        print_lines(f"{hold} of {len(verifications)} runs hold, {fail} do not{told}")
        if fail or unmeasured:
            raise SystemExit(1 if fail else EXIT_NOT_MEASURED)
