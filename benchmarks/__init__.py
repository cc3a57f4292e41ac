"""`python -m benchmarks`: measure the cost of training, scoring, inversion and start-up beside a plain reference."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, unknown_choice_error
from afterimage.runs.files import write_json
from afterimage.runs.run import environment
from afterimage.runtime.process import available_cpus
from benchmarks import equal_time, gpu, growth, memory, quality, scoring, search, startup, stream, training
from benchmarks.child import in_child
from benchmarks.rows import Row, print_rows, row_line
from benchmarks.settings import Settings

__all__ = ["MEASUREMENTS", "QUICK_SECONDS", "Row", "Settings", "print_rows", "row_line", "run_bench"]

MEASUREMENTS: dict[str, Callable[[Settings], Iterable[Row]]] = {
    "startup": startup.startup,
    "evaluate": scoring.evaluation,
    "epoch-2k": training.epoch_2k,
    "epoch-256": training.epoch_256,
    "memory": memory.memory,
    "together": training.together,
    "growth": growth.growth,
    "stream": stream.stream,
    "time-to-quality": quality.time_to_quality,
    "search": search.search,
    "gpu": gpu.gpu,
    "decoders": equal_time.decoders,
}
ON_REQUEST = ("decoders",)
"""Long measurements, which run only if they are named."""
ONE_ROW = ("epoch-2k", "epoch-256", "memory")
QUICK_ORDER = (
    *("epoch-256", "evaluate", "memory", "together", "startup"),
    *("gpu", "time-to-quality", "search", "epoch-2k", "growth", "stream"),
)
"""Order of measurements with `quick`: the most informative ones for their time come first."""
QUICK_SECONDS = 120
"""Seconds after which `quick` begins no further row, unless measurements are named."""


def run_bench(
    names: Sequence[str] = (),
    *,
    settings: Settings,
    json_path: Path | None = None,
    told: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], dict[str, Any]]:
    """Run measurements.

    A measurement that fails gives a row with the reason, and the others continue. With `settings.quick` and no `names`
    no row is begun after `QUICK_SECONDS`.

    Args:
        names: names of the measurements; empty for all but `ON_REQUEST`
        settings: sizes, data and device
        json_path: file for rows and facts, written after each row
        told: called with each row as soon as it is measured

    Returns:
        the rows, and facts of the machine with `left_out`: the measurements that `quick` left out, fully or partly

    Raises:
        AfterimageError: a name is unknown
    """
    for name in names:
        if name not in MEASUREMENTS:
            raise unknown_choice_error("measurement", name, MEASUREMENTS)
    end = time.monotonic() + (QUICK_SECONDS if settings.quick and not names else math.inf)
    here = in_child("work:here", accelerator=settings.accelerator, precision=settings.precision).value
    settings = replace(settings, precision=here["precision"])
    facts: dict[str, Any] = machine() | here | {"left_out": []}
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        told(row)
        save()

    def save() -> None:
        if json_path is not None:  # written after every row, as a later measurement may be stopped
            write_json(json_path, {"machine": facts, "rows": [row.as_dict() for row in rows]})

    order = QUICK_ORDER if settings.quick else MEASUREMENTS
    for name in names or [name for name in order if name not in ON_REQUEST]:
        started, load = time.monotonic(), os.getloadavg()[0]
        if started > end:
            facts["left_out"].append(name)
            continue
        with tempfile.TemporaryDirectory(dir=settings.folder, prefix=f"{name}-") as folder:
            try:
                for row in MEASUREMENTS[name](replace(settings, folder=Path(folder))):
                    add(row)
                    if time.monotonic() > end:
                        facts["left_out"] += [name] * (name not in ONE_ROW)
                        break
            except AfterimageError as error:
                add(Row(name, "", unavailable=str(error)))
        spent = f"{time.monotonic() - started:.0f} s, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        rows[-1] = replace(rows[-1], notes=[*rows[-1].notes, spent])
        save()
    save()
    return rows, facts


def machine() -> dict[str, Any]:
    """Return facts of the machine that the figures depend on: processor, cores, memory, load and versions."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    facts = {
        "processor": models[0] if models else None,
        "cores": available_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }
    return json.loads(json.dumps(environment() | facts))
