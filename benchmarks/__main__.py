"""`python -m benchmarks`: compare this package with a plain reference, in ratios."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from afterimage.cli import command_line
from afterimage.config import check_positive, printable_path
from afterimage.runs.run import check_file
from afterimage.runtime.terminal import print_lines


@dataclass(frozen=True)
class Bench:
    """Measure training, memory, evaluation and start-up beside a plain reference, in turns, and print the ratios.

    Each row is printed as soon as it is measured, and all rows in a table at the end. This takes more than half an hour
    on two cores. With --quick no measurement begins after two minutes, and those left out are listed.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Run only these measurements (see --list)."""
    list: bool = False
    """List the measurements without running any."""
    quick: bool = False
    """Use fewer and smaller images and one repeat; ratios are lower than at full size. Begin no measurement after two
    minutes, unless --only names it."""
    json: Path | None = None
    """Write rows and facts of the machine to this JSON file."""
    data: str = ""
    """Source of photographs for `time-to-quality`, `search` and `decoders`: folder:PATH, or any with a test split."""
    seconds: float = 120.0
    """Training time in seconds of each decoder in the measurement `decoders`, which runs only if --only names it."""
    accelerator: str = "cpu"
    """Device of both sides: cpu, cuda, mps or auto. Peak memory is always the host's."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Precision of our side; auto is bf16-mixed if matrix products are faster in bfloat16. The reference always uses
    float32."""

    def run(self) -> None:
        import tempfile

        from afterimage.runtime.terminal import Display
        from benchmarks import MEASUREMENTS, QUICK_SECONDS, Settings, print_rows, row_line, run_bench

        if self.list:
            for name, measurement in MEASUREMENTS.items():
                print_lines(f"{name:16} {(measurement.__doc__ or '').splitlines()[0]}")
            return
        check_positive(self, "seconds")
        if self.json is not None:
            check_file(self.json, "--json")
        with tempfile.TemporaryDirectory(prefix="afterimage-bench-") as folder, Display() as display:
            settings = Settings(
                Path(folder), self.quick, self.data, self.accelerator, display, self.seconds, self.precision
            )
            rows, facts = run_bench(
                self.only, settings=settings, json_path=self.json, told=lambda row: print_lines(row_line(row))
            )
        print_rows(rows)
        if facts["left_out"]:
            print_lines(
                f"left out, in whole or in part, since the {QUICK_SECONDS} s of --quick were over: "
                f"{', '.join(facts['left_out'])}; `python -m benchmarks --quick --only NAME` measures one"
            )
        print_lines(
            f"{facts['processor'] or 'processor unknown'}, {facts['cores']} cores, "
            f"{facts['memory_bytes'] / 2**30:.0f} GiB, torch {facts['versions'].get('torch')}, "
            f"OMP_NUM_THREADS {facts['OMP_NUM_THREADS'] or 'not set'}; "
            f"ours in {facts['precision']}, attention of narrow heads {facts['narrow_attention']}"
        )
        if self.json is not None:
            print_lines(f"figures: {printable_path(self.json)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an `AfterimageError` is printed as one message, with exit code 1."""
    with command_line():
        tyro.cli(Bench, prog="python -m benchmarks", args=arguments).run()


if __name__ == "__main__":
    main()
