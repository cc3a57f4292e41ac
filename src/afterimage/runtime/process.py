"""Identity of a process on any machine, to recognise locks whose holder has ended."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import NamedTuple

from afterimage.config import AfterimageError


class LockLost(AfterimageError):
    """Loss of a lock: another process took it over, because this one gave no sign of life for too long."""


class Holder(NamedTuple):
    """The process that holds a lock.

    Attributes:
        pid: process id
        started: start time in the operating system's own unit, to tell processes with a reused id apart
        machine: host name, boot id and process namespace
    """

    pid: int
    started: str
    machine: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.partition(' ')[0]}"


def this_process() -> Holder:
    """Return the identity of this process."""
    return Holder(os.getpid(), _started(os.getpid()) or "", _machine())


def is_local(process: Holder) -> bool:
    """Return whether a process is of this machine, and this system can say whether it has ended."""
    return process.machine == _machine() and os.name == "posix"


def ended(process: Holder) -> bool:
    """Return whether a process of this machine has ended; False for other machines, where this is unknown."""
    return is_local(process) and _started(process.pid) != process.started


def _machine() -> str:
    """Return host name, boot id and process namespace; containers may share a host's name but not its processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """Return the start time of a process of this machine, to tell reused ids apart; None if it has ended."""
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
