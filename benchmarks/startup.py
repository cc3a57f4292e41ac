"""Measure the start-up time of the command line, and check that it does not load PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from afterimage.config import AfterimageError
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings

HEAVY = "import torch, torchvision, timm, lightning_fabric"
COMMANDS = {"help": ["--help"], "report": ["report", "FOLDER"]}


def startup(settings: Settings) -> Iterator[Row]:
    """Measure the seconds of `--help`, and of `report` on a folder without runs."""
    repeats = 3 if settings.quick else 7
    empty = settings.fresh("empty")
    heavy = [_seconds([sys.executable, "-c", HEAVY]) for _ in range(2)]
    for name, arguments in COMMANDS.items():
        arguments = [empty if argument == "FOLDER" else argument for argument in arguments]
        command = [sys.executable, "-m", "afterimage", *arguments]
        _seconds(command)  # warm up the disk cache
        loaded = _loads_torch(arguments)
        row = Row(
            f"startup-{name}",
            f"afterimage {' '.join(COMMANDS[name])}: seconds until it ends (reference: only importing PyTorch, "
            "torchvision, timm and Fabric)",
            "s",
            [_seconds(command) for _ in range(repeats)],
            [min(heavy)] * repeats,
            goal=Goal("at most", 0.5),
            notes=[f"PyTorch is {'LOADED, which it must not be' if loaded else 'not loaded'}"],
        )
        yield replace(row, goal=Goal("at most", 0.0)) if loaded else row


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "100"})
    return time.perf_counter() - started


def _loads_torch(arguments: list[str]) -> bool:
    code = (
        f"import sys\nfrom afterimage.cli import main\ntry:\n    main({arguments!r})\n"
        "except SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    answer = result.stdout.strip().splitlines()[-1:]
    if answer not in (["True"], ["False"]):
        raise AfterimageError(f"afterimage {' '.join(arguments)} ended unexpectedly: {result.stderr[-300:]}")
    return answer == ["True"]
