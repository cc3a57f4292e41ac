"""`afterimage bench`: what training, evaluating and starting cost, beside a plain reference in the same run."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from afterimage.bench import equal_time, gpu, growth, memory, quality, scoring, startup, stream, training
from afterimage.bench.child import in_child
from afterimage.bench.rows import Row, print_rows
from afterimage.bench.settings import Settings
from afterimage.config import AfterimageError, unknown
from afterimage.runs import cores, environment, write_json

__all__ = ["MEASUREMENTS", "Row", "Settings", "print_rows", "run_bench"]

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
    "gpu": gpu.gpu,
    "decoders": equal_time.decoders,
}
ON_REQUEST = ("decoders",)
"""Takes long: left out where no measurement is named."""


def run_bench(
    names: Sequence[str] = (), *, settings: Settings, json_path: Path | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Take the named measurements, or all but those `ON_REQUEST`; returns their rows and facts of the machine.

    Both also go to `json_path`. One that fails is a row that says why, and the others go on.

    Raises `AfterimageError` for an unknown name.
    """
    for name in names:
        if name not in MEASUREMENTS:
            raise unknown("measurement", name, MEASUREMENTS)
    here = in_child("work:here", accelerator=settings.accelerator, precision=settings.precision).value
    settings = replace(settings, precision=here["precision"])
    facts, rows = machine() | here, []

    def save() -> None:
        if json_path is not None:  # kept up to date: what comes later may be stopped
            write_json(json_path, {"machine": facts, "rows": [row.as_dict() for row in rows]})

    for name in names or [name for name in MEASUREMENTS if name not in ON_REQUEST]:
        started, load = time.monotonic(), os.getloadavg()[0]
        with tempfile.TemporaryDirectory(dir=settings.folder, prefix=f"{name}-") as folder:
            try:
                for row in MEASUREMENTS[name](replace(settings, folder=Path(folder))):
                    rows.append(row)
                    save()
            except AfterimageError as error:
                rows.append(Row(name, "", unavailable=str(error)))
        spent = f"{time.monotonic() - started:.0f} s, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        rows[-1] = replace(rows[-1], notes=[*rows[-1].notes, spent])
        save()
    return rows, facts


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and versions: what one needs to make sense of the figures."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    facts = {
        "processor": models[0] if models else None,
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }
    return json.loads(json.dumps(environment() | facts))
