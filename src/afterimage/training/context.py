"""The context of training: its processes, progress, locks and failures, in one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from afterimage.runs.run import Run
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from afterimage.runtime.progress import Progress, silent
from afterimage.runtime.signals import GracefulShutdown

CHECKPOINT_SECONDS = 45.0
"""With the step that is under way when they have passed, a checkpoint is never older than a minute of work."""


@dataclass(kw_only=True)
class RunContext:
    """The context of a program that trains by itself: an error ends it, no folder is locked, nothing is timed.

    Subclasses override methods: a study records the failure of one run, goes on with the others, and checks that it
    still holds a run's lock; an audit records the failures of attackers; the profiler times the sections.

    Args:
        ranks: processes that train together, each on its part of every batch
        progress: called with how far training is, and with messages for the user
        shutdown: whether this process was asked to stop
        checkpoint_seconds: time between two checkpoints within an epoch; one is written after every epoch anyway
        failed: runs whose failure was recorded; they are trained no further
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
        """Check on all ranks that none was asked to stop.

        Raises:
            Stopped: one was
        """
        with self.ranks.raise_on_all_ranks():
            self.shutdown.check()

    def check_lock(self, run: Run) -> None:
        """Check that this process still holds a run's lock, before its folder is written to.

        Raises:
            LockLost: another process has taken it over
        """

    @contextlib.contextmanager
    def isolate(self, run: Run | None) -> Iterator[None]:
        """Limit an error of this block, on any rank, to one run, if `record_failure` records it.

        Args:
            run: the run; None for a decoder without a folder
        """
        try:
            with self.ranks.raise_on_all_ranks():
                yield
        except Exception as error:
            self.record_failure(run, error)
            self.failed.add(run)

    def record_failure(self, run: Run | None, error: Exception) -> None:
        """Record that an error has ended a run, or raise it."""
        raise error

    def section(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context for one part of a training step, which a subclass may time.

        Args:
            name: `data`, `encoder`, `decoder forward`, `backward` or `optimizer`
        """
        return contextlib.nullcontext()
