"""Identify a process on any machine, so that a lock's holder can be told dead."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import NamedTuple

from afterimage.config import AfterimageError


class LockLost(AfterimageError):
    """Another process took the lock over, since this one gave no sign of life for too long."""


class Holder(NamedTuple):
    """Who holds a lock: process id, when it started (in the system's own unit), and on which machine."""

    pid: int
    started: str
    machine: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.partition(' ')[0]}"


def this_process() -> Holder:
    return Holder(os.getpid(), _started(os.getpid()) or "", _machine())


def ended(process: Holder) -> bool:
    """Whether a process has ended; False for one of another machine, of which that cannot be known."""
    return process.machine == _machine() and os.name == "posix" and _started(process.pid) != process.started


def _machine() -> str:
    """Host, boot and process namespace: two containers may share a host's name but not its processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started, so that a number used again is not taken for it; None if it ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
