"""A clean stop on SIGTERM and Ctrl-C: at the next step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The process was asked to end. `code` is the exit code that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


class Stopped(Interrupted):
    """It was asked to, and stopped between two steps."""


class GracefulShutdown:
    """Whether this process was asked to stop; `check` raises `Stopped` where it was.

    With `ignore_second_signal` it does not end at once when it is asked twice: a launcher passes on what its
    group got already.
    """

    def __init__(self, ignore_second_signal: bool = False) -> None:
        self.number: int | None = None
        self.ignore_second_signal = ignore_second_signal

    def check(self) -> None:
        if self.number is not None:
            raise Stopped(self.number)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not self.ignore_second_signal:  # asked twice: at once
            raise Interrupted(number)
        self.number = number


@contextlib.contextmanager
def graceful_shutdown(ignore_second_signal: bool = False) -> Iterator[GracefulShutdown]:
    """Inside the block SIGTERM and Ctrl-C only set the `GracefulShutdown`.

    A second one ends the block at once, unless `ignore_second_signal`.

    Python hands signals to the main thread alone, so in any other nothing changes.
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
    stop.check()  # it came after the last step


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM ends what runs as Ctrl-C does, at once unless in a `graceful_shutdown` block."""

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
