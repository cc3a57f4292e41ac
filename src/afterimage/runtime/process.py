"""This process: its identity, by which locks recognise a holder that has ended; its signals; its threads."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

from afterimage.config import AfterimageError
from afterimage.runtime.terminal import Progress


class LockLost(AfterimageError):
    """Error for a lock that another process took over, because this process did not touch it for too long."""


class ProcessIdentity(NamedTuple):
    """The process that holds a lock: its id, its start time and its machine.

    The start time, in the operating system's own unit, tells processes with a reused id apart; the machine is host
    name, boot id and process namespace.
    """

    pid: int
    started: str
    machine: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.partition(' ')[0]}"


def this_process() -> ProcessIdentity:
    """Return the identity of this process."""
    return ProcessIdentity(os.getpid(), _start_time(os.getpid()) or "", _machine())


def is_local(process: ProcessIdentity) -> bool:
    """Return whether a process is of this machine, and this system can say whether it has ended."""
    return process.machine == _machine() and os.name == "posix"


def has_ended(process: ProcessIdentity) -> bool:
    """Return whether a process of this machine has ended; False for other machines, where this is unknown."""
    return is_local(process) and _start_time(process.pid) != process.started


def _machine() -> str:
    """Return host name, boot id and process namespace; containers may share a host's name but not its processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_time(pid: int) -> str | None:
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


class Interrupted(KeyboardInterrupt):
    """A signal's request to end the process. `code` is the exit code that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


class Stopped(Interrupted):
    """A stop between two steps, after a signal's request to end the process."""


class GracefulShutdown:
    """A record of whether a signal asked this process to stop.

    Attributes:
        number: number of the signal, or None
        ignore_second_signal: whether a second signal is ignored instead of ending the process at once; needed below
            a launcher, which passes on signals that its process group has already received
    """

    def __init__(self, ignore_second_signal: bool = False) -> None:
        self.number: int | None = None
        self.ignore_second_signal = ignore_second_signal

    def check(self) -> None:
        """Raise `Stopped` if the process was asked to stop."""
        if self.number is not None:
            raise Stopped(self.number)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not self.ignore_second_signal:  # asked twice: end at once
            raise Interrupted(number)
        self.number = number


@contextlib.contextmanager
def graceful_shutdown(ignore_second_signal: bool = False) -> Iterator[GracefulShutdown]:
    """Record a SIGTERM or Ctrl-C that arrives inside this block in the yielded `GracefulShutdown`.

    A second signal ends the block at once, unless `ignore_second_signal` is set.
    """
    stop = GracefulShutdown(ignore_second_signal)
    with _install_handler(stop._handle_signal, signal.SIGTERM, signal.SIGINT):
        yield stop
    stop.check()  # the signal may have come after the last check


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM end this block at once, as Ctrl-C does, except inside `graceful_shutdown`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _install_handler(end, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _install_handler(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Handle signals inside this block, in the main thread alone: Python delivers signals to no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    total: int,
    what: str,
    progress: Progress,
) -> Iterator[Result]:
    """Map `work` over `items` in threads on all cores, and yield the results in order.

    Threads suffice, because Pillow, NumPy and hashlib release the interpreter lock while they work. Unlike processes,
    they need no `if __name__ == "__main__"` in the caller's script. `progress(what, done, total)` is called after each.
    """
    workers = available_cpus()
    items = iter(items)
    pending: deque[Future[Result]] = deque()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            pending.extend(pool.submit(work, item) for item in islice(items, 4 * workers))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(items, 1))
                done += 1
                progress(what, done, total)
                yield result
        finally:
            for future in pending:
                future.cancel()


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait for each other. Must be called before torch is imported.

    The command line calls it. By default a waiting thread keeps its core busy, which slows down other programs and
    the other hardware thread of that core. Threads still wait busily for some microseconds, because going to sleep
    after every small step is slow. Sets `OMP_WAIT_POLICY` and `GOMP_SPINCOUNT`, unless the first is already set.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def available_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
