"""One piece of work in a process of its own, so that its peak memory is the operating system's figure for it alone."""

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
    """What a child returned, the seconds from its start to its end, and its peak resident memory in bytes."""

    value: Any
    seconds: float
    peak_bytes: int


def in_child(work: str, /, *, timeout: float | None = None, **arguments: Any) -> Outcome:
    """Call `work`, written `module:function` below `benchmarks`, with plain JSON arguments and result.

    Raises `AfterimageError` with the child's last line where it fails, is killed or takes longer than `timeout`.
    """
    with tempfile.TemporaryDirectory(prefix="afterimage-bench-") as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.child", work, json.dumps(arguments), str(result)]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise AfterimageError(f"{work} took longer than {timeout:g} s and was stopped") from None
        seconds = time.perf_counter() - started
        if done.returncode or not result.exists():
            killed = " (killed, for lack of memory perhaps)" if done.returncode == -signal.SIGKILL else ""
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise AfterimageError(f"{work} failed with exit code {done.returncode}{killed}: {last}")
        told = json.loads(result.read_text())
    return Outcome(told["value"], seconds, told["peak_bytes"])


def peak_bytes() -> int:
    """This process's peak resident memory: VmHWM where there is /proc, else what getrusage says."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start at what the parent held when it forked.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that could be had now without swapping; None where the system does not say."""
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
