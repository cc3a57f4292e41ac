"""Run one piece of work in a child process, so that its peak memory can be read from the operating system."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError


@dataclass(frozen=True)
class Outcome:
    """Result of a child process: returned value, seconds from start to end, and peak resident memory in bytes."""

    value: Any
    seconds: float
    peak_bytes: int


def in_child(work: str, /, **arguments: Any) -> Outcome:
    """Call a function in a child process.

    Args:
        work: `module:function` below `benchmarks`
        arguments: the function's arguments; they and its result must be plain JSON values

    Raises:
        AfterimageError: the child fails, with the last line of its errors, or is killed
    """
    with tempfile.TemporaryDirectory(prefix="afterimage-bench-") as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.child", work, json.dumps(arguments), str(result)]
        started = time.perf_counter()
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run(command, text=True, errors="backslashreplace", **streams)
        seconds = time.perf_counter() - started
        if done.returncode or not result.exists():
            killed = " (killed, for lack of memory perhaps)" if done.returncode == -signal.SIGKILL else ""
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise AfterimageError(f"{work} failed with exit code {done.returncode}{killed}: {last}")
        told = json.loads(result.read_text())
    return Outcome(told["value"], seconds, told["peak_bytes"])


def peak_bytes() -> int:
    """Return this process's peak resident memory in bytes: VmHWM if there is /proc, else the value of getrusage."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would include the memory of the parent at the fork.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Return the bytes of memory that are available without swapping; None if the system does not report it."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _main(work: str, arguments: str, result: str) -> None:
    module, _, function = work.partition(":")
    call = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    keywords: Mapping[str, Any] = json.loads(arguments)
    value = call(**keywords)
    Path(result).write_text(json.dumps({"value": value, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
