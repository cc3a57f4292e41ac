"""What training asks of the world around it and tells it, in one object that everything which trains is given."""

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
    """The world of a program that trains by itself: an error ends it, no folder is locked, nothing is timed.

    Who needs more overrides a method: a study records the failure of one run and goes on with the others, and asks
    whether it still holds a run's lock; an audit records its attackers' failures; the profiler times the sections.

    Args:
        ranks: the processes that train together, each on its part of every batch.
        progress: is told how far training is, and of anything that a user should know.
        shutdown: whether this process was asked to stop.
        checkpoint_seconds: time between two checkpoints within an epoch; one is written after every epoch anyway.
    """

    ranks: ProcessGroup = SINGLE_PROCESS
    progress: Progress = silent
    shutdown: GracefulShutdown = field(default_factory=GracefulShutdown)
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    failed: set[Run] = field(default_factory=set)
    """The runs whose failure was recorded; they take no further part in training."""

    def log(self, text: str) -> None:
        """Tell the user something."""
        self.progress(text, 1, 1)

    def check_shutdown(self) -> None:
        """Raise `Stopped` on every rank if one of them was asked to stop."""
        with self.ranks.raise_on_all_ranks():
            self.shutdown.check()

    def check_lock(self, run: Run) -> None:
        """Raise `LockLost` where another process has taken over the folder that is about to be written to."""

    @contextlib.contextmanager
    def isolate(self, run: Run | None) -> Iterator[None]:
        """Inside the block an error, on whatever rank, ends this run alone, if `record_failure` records it."""
        try:
            with self.ranks.raise_on_all_ranks():
                yield
        except Exception as error:
            self.record_failure(run, error)
            self.failed.add(run)

    def record_failure(self, run: Run | None, error: Exception) -> None:
        """Write down that an error has ended a run, or raise it."""
        raise error

    def section(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Enclose a part of a training step: `data`, `encoder`, `decoder forward`, `backward` or `optimizer`."""
        return contextlib.nullcontext()
