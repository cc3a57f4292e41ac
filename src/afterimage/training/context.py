"""The context of training: its processes, progress, locks and failures in one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from afterimage.runs.run import Run
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from afterimage.runtime.process import GracefulShutdown
from afterimage.runtime.terminal import Progress, silent

CHECKPOINT_SECONDS = 45.0
"""Seconds between checkpoints: with the current step added, at most about a minute of work is lost."""


@dataclass(kw_only=True)
class RunContext:
    """Context of a stand-alone training: an error ends it, no folder is locked, nothing is timed.

    Studies, audits and the profiler override its methods: to record the failure of one run and continue with the
    others, to check that they still hold a run's lock, to time the sections.

    Args:
        ranks: processes that train together, each on its part of every batch
        progress: callback for progress and for messages to the user
        shutdown: record of a signal that asks this process to stop
        checkpoint_seconds: time between two checkpoints within an epoch; another is written after every epoch
        failed: runs whose failure was recorded; their training has ended
    """

    ranks: ProcessGroup = SINGLE_PROCESS
    progress: Progress = silent
    shutdown: GracefulShutdown = field(default_factory=GracefulShutdown)
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    failed: set[Run] = field(default_factory=set)

    def log(self, text: str) -> None:
        """Show the user a message."""
        self.progress(text, 1, 1)

    def check_shutdown(self) -> None:
        """Raise `Stopped` on all ranks if any of them was asked to stop."""
        with self.ranks.raise_on_all_ranks():
            self.shutdown.check()

    def check_lock(self, run: Run) -> None:
        """Raise `LockLost` if another process has taken over a run's lock, before this one writes to its folder."""

    @contextlib.contextmanager
    def isolate(self, run: Run | None) -> Iterator[None]:
        """Limit an error in this block, on any rank, to one run, unless `record_failure` raises it.

        Args:
            run: the run; None for a decoder without a folder
        """
        try:
            with self.ranks.raise_on_all_ranks():
                yield
        except Exception as error:
            self.fail(run, error)

    def fail(self, run: Run | None, error: Exception) -> None:
        """End a run with an error that all ranks have, unless `record_failure` raises it."""
        self.record_failure(run, error)
        self.failed.add(run)

    def record_failure(self, run: Run | None, error: Exception) -> None:
        """Record that an error ended a run, or raise the error; this class always raises."""
        raise error

    def section(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context for `data`, `encoder`, `decoder forward`, `backward` or `optimizer`, which may be timed."""
        return contextlib.nullcontext()
