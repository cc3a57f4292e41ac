"""Training of run configurations into finished run folders, each run by one process at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, DataConfig, RunConfig, join_names
from afterimage.data.dataset import load_data
from afterimage.data.images import Data
from afterimage.experiments.inference import review_finished
from afterimage.experiments.joint_run import JointRun, StudyContext
from afterimage.models.encoders.providers import open_network
from afterimage.runs.lock import POLL_SECONDS, Lock
from afterimage.runs.run import TRACEBACK, Run, read_failure, write_failure
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup, distributed_context
from afterimage.runtime.failures import (
    ENCODERS,
    EVERYTHING,
    clear_error_frames,
    error_scope,
    protect_callback,
    to_afterimage_error,
)
from afterimage.runtime.process import GracefulShutdown, graceful_shutdown
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.checkpoint import remove_checkpoint
from afterimage.training.feature_loader import CHECKPOINT_SECONDS

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def train_runs(
    configs: RunConfig | Sequence[RunConfig],
    root: str | Path = "runs",
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
    keep: int = 8,
    failures: list[AfterimageError] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    skipped: list[Run] | None = None,
) -> list[Run]:
    """Train every run that is not done yet, and measure it on the test images.

    Runs that share encoders, images, batches and seed are trained together on one pass. Several processes may be given
    the same runs: one process trains each run, and every process returns when all runs have ended. Processes started by
    `torchrun` train together instead, each on its part of every batch (see `runtime.distributed`).

    Args:
        configs: the runs
        root: folder of the run folders
        cache: folder of decoded images; None for the default
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        progress: callback for progress and messages, see `Progress`; an exception in it ends everything
        keep: number of test images that each run stores with their reconstructions
        failures: list to which the errors of failed runs are added; each error is also recorded in its run's folder,
            and everything that does not depend on that run continues
        checkpoint_seconds: time between two checkpoints within an epoch; another is written after every epoch
        skipped: list to which runs that other processes are training are added; if given, they are not waited for

    Returns:
        all runs, in the order of `configs`

    Raises:
        AfterimageError: a run failed and `failures` is None; raised when the other runs have ended
        Stopped: SIGTERM or Ctrl-C; training has stopped after the current step, with a checkpoint
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    with distributed_context(accelerator) as ranks:
        progress = protect_callback(progress) if ranks.is_main_process else no_progress
        queue = RunQueue(lambda text: progress(text, 1, 1), ranks)
        runs = queue.open(configs, root)
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process and queue.finished:
                review_finished(queue.finished, cache=cache, accelerator=accelerator, progress=progress)
        worker = _Worker(queue, cache, accelerator, progress, keep, checkpoint_seconds)
        with ranks.raise_on_all_ranks(), graceful_shutdown(ignore_second_signal=ranks.world_size > 1) as stop:
            worker.work(stop, wait=skipped is None)
    if skipped is not None:
        skipped += queue.waiting
    report_failures(queue.failures, failures)
    return runs


def check_weights(models: Iterable[str], weights: str) -> None:
    """Raise an `AfterimageError` if a model's weights are not available; random ones always are."""
    for model in () if weights in RANDOM_WEIGHTS else models:
        open_network(model).find_weights(weights)


def report_failures(found: Sequence[AfterimageError], failures: list[AfterimageError] | None) -> None:
    """Add errors to the list `failures`, or raise the first one if `failures` is None."""
    if failures is not None:
        failures += found
    elif found:
        raise found[0]


def _clean_up(run: Run) -> None:
    """Remove locks, half-written files and checkpoints of a process that was killed right after it finished the run."""
    lock = Lock(run.path)
    with contextlib.suppress(AfterimageError):
        if any(run.path.glob("lock.*")) and lock.acquire():
            run.remove_leftovers()
            remove_checkpoint(run)
            lock.release()


def group_runs(runs: Iterable[tuple[Key, RunConfig]]) -> list[dict[Key, RunConfig]]:
    """Group runs that can be trained together, in the order of their first run.

    The runs of a group share encoders or stored features, images, batches, seed and LPIPS network.

    Args:
        runs: pairs of any key and the run's configuration
    """
    found: dict[tuple, dict[Key, RunConfig]] = {}
    for run, config in runs:
        recipe = replace(config.recipe, epochs=1, learning_rate=1.0, weight_decay=0.0, loss="mse")
        models = frozenset(config.models)
        shared = (models, config.weights, config.features, config.data, config.seed, config.lpips, recipe)
        found.setdefault(shared, {})[run] = config
    return list(found.values())


@dataclass
class RunQueue:
    """Runs that are not done; this process may train a run after it has locked the run's folder.

    If several processes train together, the main process holds the locks and decides; the others follow.

    Args:
        log: callback for messages, such as which runs another process is training
        ranks: processes that train together
        waiting: runs that have not ended, here or in another process
        failures: errors of runs that have failed, here or in another process
        locks: lock of each folder that this process has tried to lock
        running_elsewhere: runs that another process was found training
        finished: runs that were done when the queue was opened; known to the main process only
    """

    log: Callable[[str], None]
    ranks: ProcessGroup = SINGLE_PROCESS
    waiting: dict[Run, RunConfig] = field(default_factory=dict)
    failures: list[AfterimageError] = field(default_factory=list)
    locks: dict[Run, Lock] = field(default_factory=dict)
    running_elsewhere: set[Run] = field(default_factory=set)
    finished: dict[Run, RunConfig] = field(default_factory=dict)

    def open(self, configs: Sequence[RunConfig], root: str | Path) -> list[Run]:
        """Create the run folders, and add the runs that are not done to `waiting`.

        Returns:
            all runs, in the order of `configs`
        """
        with self.ranks.raise_on_all_ranks():
            unique = {config.digest: config for config in configs} if self.ranks.is_main_process else {}
            for config in unique.values():
                run = Run(Path(root) / config.name)
                with self.isolate(run):
                    if Run.create(root, config).state == "done":
                        self.log(f"{config.name} is done already, nothing to do")
                        _clean_up(run)
                        self.finished[run] = config
                    else:
                        self.waiting[run] = config
            return self.synchronise([Run(Path(root) / config.name) for config in configs])

    @contextlib.contextmanager
    def isolate(self, run: Run) -> Iterator[None]:
        """Limit an error in reading or locking a run's folder to that run; nothing is written into the folder."""
        try:
            yield
        except Exception as error:
            if error_scope(error):
                raise
            self.failures.append(to_afterimage_error(error, run.name))
            self.waiting.pop(run, None)
            if run in self.locks:
                self.locks[run].release()

    def acquire_runs(self, runs: Mapping[Run, RunConfig]) -> dict[Run, RunConfig]:
        """Lock those of the given runs that this process can train now, and return them."""
        with self.ranks.raise_on_all_ranks():
            mine = []
            for run in runs if self.ranks.is_main_process else ():
                with self.isolate(run):
                    if run in self.waiting and self._acquire(run):
                        mine.append(run)
            return {run: runs[run] for run in self.synchronise(mine)}

    def _acquire(self, run: Run) -> bool:
        """Lock a run; return False if another process is training it or has ended it."""
        lock = self.locks.setdefault(run, Lock(run.path, self.log))
        if not lock.acquire():
            if run not in self.running_elsewhere:
                self.running_elsewhere.add(run)
                self.log(f"{run.name} is left to {lock.holder or 'another process'}, which is training it")
            return False
        # Another process may have ended the run just now; a run that failed there would fail here too.
        state = run.state
        if state != "done" and not (state == "failed" and run in self.running_elsewhere):
            return True
        lock.release()
        del self.waiting[run]
        self.log(f"{run.name} is {state}, by another process")
        if state == "failed":
            self.failures.append(read_failure(run))
        return False

    def synchronise(self, value: Value) -> Value:
        """Return the main process's value on all ranks, and copy its `waiting` and `failures` to them."""
        value, waiting, failures = self.ranks.broadcast((value, self.waiting, self.failures))
        if not self.ranks.is_main_process:
            self.waiting.clear()
            self.waiting.update(waiting)
            self.failures[:] = failures
        return value

    def fail(self, runs: Iterable[Run], error: Exception) -> None:
        """Record an error that ended all the given runs, except in folders whose lock was lost."""
        runs = [run for run in runs if not (run in self.locks and self.locks[run].lost)]
        names = join_names([run.name for run in runs]) or "a group of runs"
        self.failures.append(to_afterimage_error(error, names, runs[0].file(TRACEBACK) if runs else None))
        for run in runs if self.ranks.is_main_process else ():
            with contextlib.suppress(Exception):
                if run.state not in ("done", "failed"):
                    write_failure(run, error)
        clear_error_frames(error)

    def set_states(self, runs: Iterable[Run], state: str, **details: str) -> None:
        """Set the state of each given run that has not ended, if its folder can be written."""
        for run in runs if self.ranks.is_main_process else ():
            with contextlib.suppress(Exception):
                if run.state not in ("done", "failed"):
                    run.set_state(state, **details)


@dataclass
class _Worker:
    """Training of the runs of a queue in this process, group by group."""

    queue: RunQueue
    cache: Path | None
    accelerator: str
    progress: Progress
    keep: int
    checkpoint_seconds: float
    _loaded: dict[DataConfig, Data] = field(default_factory=dict)

    def work(self, stop: GracefulShutdown, wait: bool) -> None:
        """Train the runs that no other process is training, and wait for the others if `wait` is set."""
        waiting = self.queue.waiting
        while waiting:
            split = group_runs(waiting.items())
            idle = True
            for number, group in enumerate(split, 1):
                with self.queue.ranks.raise_on_all_ranks():
                    stop.check()
                mine = self.queue.acquire_runs(group)
                if not mine:
                    continue
                idle = False
                if len(split) > 1:
                    self.queue.log(
                        f"group {number} of {len(split)}: {', '.join(c.name for c in mine.values())}"
                    )
                self._train(mine, stop)
            if waiting and idle:
                if not wait:
                    return
                time.sleep(POLL_SECONDS)

    def _train(self, mine: dict[Run, RunConfig], stop: GracefulShutdown) -> None:
        ranks = self.queue.ranks
        locks = {run: self.queue.locks[run] for run in mine if ranks.is_main_process}
        context = StudyContext(
            ranks=ranks,
            progress=self.progress,
            shutdown=stop,
            checkpoint_seconds=self.checkpoint_seconds,
            locks=locks,
            failures=self.queue.failures,
        )
        try:
            with ranks.raise_on_all_ranks():
                first = next(iter(mine.values()))
                if first.features is None:  # without weights all rows fail, and looking for them may be slow
                    ranks.main_process_first(lambda: check_weights(first.models, first.weights))
                self._together(mine, lambda: self._data(first.data, stop), context)
        except BaseException as error:
            if error_scope(error) == EVERYTHING:
                self.queue.set_states((run for run in mine if run.state == "running"), "stopped")
                raise
            self.queue.fail([run for run in mine if run not in context.ended_runs], error)
        finally:
            for run, lock in locks.items():
                lock.release()
                if lock.lost:
                    self.queue.running_elsewhere.add(run)
                else:
                    del self.queue.waiting[run]
        self.queue.synchronise(None)

    def _together(
        self, mine: dict[Run, RunConfig], load_images: Callable[[], Data], context: StudyContext
    ) -> None:
        """Train runs on one pass through their encoders; if these fail, try each half of the rows by itself."""
        try:
            with self.queue.ranks.raise_on_all_ranks():
                JointRun(mine, load_images, context, accelerator=self.accelerator, keep=self.keep).train()
            return
        except Exception as caught:
            if error_scope(caught) != ENCODERS:
                raise
            error = caught
        clear_error_frames(error)
        remaining = {run: config for run, config in mine.items() if run not in context.ended_runs}
        rows = list(dict.fromkeys(config.sources for config in remaining.values()))
        if len(rows) < 2:
            self.queue.fail(remaining, error)
            return
        self.queue.log(
            f"the encoders of {len(rows)} rows failed: half of the rows are tried first, then the others"
        )
        first = rows[: len(rows) // 2]
        for in_first in (True, False):
            half = {run: config for run, config in remaining.items() if (config.sources in first) is in_first}
            self._together(half, load_images, context)

    def _data(self, config: DataConfig, stop: GracefulShutdown) -> Data:
        """Load and check the images of a data configuration once; groups of runs mostly share them.

        Decoding may take long. A single process can be stopped between two images; ranks stop when all have loaded.
        """
        if config not in self._loaded:
            ranks = self.queue.ranks

            def progress(what: str, done: int, total: int, **figures: Any) -> None:
                self.progress(what, done, total, **figures)
                if ranks.world_size == 1:
                    stop.check()

            self._loaded[config] = ranks.main_process_first(
                lambda: load_data(config, cache=self.cache, progress=progress)
            )
        return self._loaded[config]
