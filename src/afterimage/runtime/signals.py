"""Graceful shutdown on SIGTERM and Ctrl-C, after the current step and with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


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

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not self.ignore_second_signal:  # asked twice: end at once
            raise Interrupted(number)
        self.number = number


@contextlib.contextmanager
def graceful_shutdown(ignore_second_signal: bool = False) -> Iterator[GracefulShutdown]:
    """Record SIGTERM and Ctrl-C inside this block in the `GracefulShutdown` that it yields.

    A second signal ends the block at once, unless `ignore_second_signal` is set. Outside the main thread
    nothing changes, because Python delivers signals to the main thread only.
    """
    stop = GracefulShutdown(ignore_second_signal)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.check()  # the signal may have come after the last check


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM end this block at once, as Ctrl-C does, except inside `graceful_shutdown`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
