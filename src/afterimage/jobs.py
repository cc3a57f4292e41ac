"""Run configurations become finished run folders: grouped, each run in one process at a time, trained, measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from afterimage.checkpoint import remove_checkpoints
from afterimage.config import AfterimageError, DataConfig, RunConfig, split_source
from afterimage.data import Data, load_data
from afterimage.data.near import near_duplicates
from afterimage.group import Group
from afterimage.lock import POLL, Lock
from afterimage.progress import Progress, silent
from afterimage.ranks import ALONE, Ranks, joined
from afterimage.runs import Run
from afterimage.stop import Stop, stoppable
from afterimage.train import CHECKPOINT_SECONDS

Key = TypeVar("Key", bound=Hashable)
Heard = TypeVar("Heard")


def train_runs(
    configs: RunConfig | Sequence[RunConfig],
    root: str | Path = "runs",
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
    keep: int = 8,
    failures: list[AfterimageError] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    stop: Stop | None = None,
    left: list[Run] | None = None,
) -> list[Run]:
    """Train every run that is not done yet; returns all of them, in the order asked for.

    Runs that share encoders, pictures, batches and seed are trained together on one pass. Each keeps its best
    decoder by validation loss, is measured on the test pictures, and stores `keep` of them. A run that fails is
    recorded with its error and the others go on; the errors are added to `failures`, or the first is raised at
    the end where no such list is given.

    Any number of processes may be given the same runs: each run is trained by one of them, and every one returns
    when all are done; with `left` what others are at is added to that list instead of waited for. A checkpoint is
    written after every epoch and, within one, every `checkpoint_seconds`. On SIGTERM and Ctrl-C, or when `stop` is
    set where one is given, training stops after the step under way with a checkpoint, and `stop.Stopped` is raised.

    Processes that `torchrun` has started do the runs together instead, each its part of every batch (see `ranks`).
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    with joined(accelerator) as ranks:
        progress = progress if ranks.leads else silent
        claims = Claims(lambda text: progress(text, 1, 1), ranks)
        runs = claims.open(configs, root)
        queue = _Queue(claims, cache, accelerator, progress, keep, checkpoint_seconds)
        stopping = stoppable(patient=ranks.count > 1) if stop is None else contextlib.nullcontext(stop)
        with ranks.agreed(), stopping as asked:
            queue.work(asked, wait=left is None)
    if left is not None:
        left += claims.waiting
    report_failures(claims.failures, failures)
    return runs


def report_failures(found: Sequence[AfterimageError], failures: list[AfterimageError] | None) -> None:
    """Add what failed to `failures`, or raise the first where no such list is given."""
    if failures is not None:
        failures += found
    elif found:
        raise found[0]


def _tidy(run: Run) -> None:
    """Remove what a process left that was killed right after it had finished the run."""
    lock = Lock(run.path)
    with contextlib.suppress(AfterimageError):
        if any(run.path.glob("lock.*")) and lock.acquire():
            run.remove_leftovers()
            remove_checkpoints(run)
            lock.release()


def groups(runs: Iterable[tuple[Key, RunConfig]]) -> list[dict[Key, RunConfig]]:
    """Runs by what they must share to be trained together: encoders, pictures, batches, seed and measure."""
    found: dict[tuple, dict[Key, RunConfig]] = {}
    for run, config in runs:
        models = frozenset(split_source(source)[0] for source in config.sources)
        recipe = replace(config.recipe, epochs=1, learning_rate=1.0, weight_decay=0.0, loss="mse")
        shared = (models, config.weights, config.data, config.seed, config.lpips, recipe)
        found.setdefault(shared, {})[run] = config
    return list(found.values())


@dataclass
class Claims:
    """Runs that wait to be done, by this process or another: which of them this one may do.

    `say` is told what others do. A run that ends elsewhere leaves `waiting`; its error goes to `failures`. Of several
    `ranks` the leading one holds the locks and decides, and the others hear what it has decided.
    """

    say: Callable[[str], None]
    ranks: Ranks = ALONE
    waiting: dict[Run, RunConfig] = field(default_factory=dict)
    failures: list[AfterimageError] = field(default_factory=list)
    locks: dict[Run, Lock] = field(default_factory=dict)
    elsewhere: set[Run] = field(default_factory=set)

    def open(self, configs: Sequence[RunConfig], root: str | Path) -> list[Run]:
        """Make the folders, and let those wait that are not done; returns all runs, in the order asked for."""
        with self.ranks.agreed():
            return self.heard(self._open(configs, root) if self.ranks.leads else [])

    def _open(self, configs: Sequence[RunConfig], root: str | Path) -> list[Run]:
        runs = {config.digest: Run.create(root, config) for config in configs}
        for config in configs:
            run = runs[config.digest]
            if run.state == "done":
                self.say(f"{config.name} is done already, nothing to do")
                _tidy(run)
            else:
                self.waiting[run] = config
        return [runs[config.digest] for config in configs]

    def take(self, runs: Mapping[Run, RunConfig]) -> dict[Run, RunConfig]:
        """Those of the runs that this process is to do now; it then holds the lock of each."""
        with self.ranks.agreed():
            leads = self.ranks.leads
            mine = [run for run in runs if leads and run in self.waiting and self._take(run)]
            return {run: runs[run] for run in self.heard(mine)}

    def heard(self, value: Heard) -> Heard:
        """The leading rank's value, and what it now lets wait."""
        value, waiting, failures = self.ranks.broadcast((value, self.waiting, self.failures))
        if not self.ranks.leads:
            self.waiting.clear()
            self.waiting.update(waiting)
            self.failures[:] = failures
        return value

    def _take(self, run: Run) -> bool:
        lock = self.locks.setdefault(run, Lock(run.path, self.say))
        if not lock.acquire():
            if run not in self.elsewhere:
                self.elsewhere.add(run)
                self.say(f"{run.name} is left to {lock.holder or 'another process'}, which is at it")
            return False
        # Another process may have come to its end just now: what failed there would fail here too.
        state = run.state
        over = state == "done" or (state == "failed" and run in self.elsewhere)
        if over:
            lock.release()
            self._over(run)
        return not over

    def _over(self, run: Run) -> None:
        del self.waiting[run]
        self.say(f"{run.name} is {run.state}, by another process")
        if run.state == "failed":
            self.failures.append(AfterimageError(str(run.status.get("error"))))

    def fail(self, runs: Iterable[Run], error: AfterimageError) -> None:
        """Record an error that ended all of the runs; the locks are held."""
        self.failures.append(error)
        self.mark(runs, "failed", error=str(error))

    def mark(self, runs: Iterable[Run], state: str, **details: str) -> None:
        """Set the state of those of the runs that have not ended, as far as their folders can be written."""
        for run in runs if self.ranks.leads else ():
            with contextlib.suppress(AfterimageError):
                if run.state not in ("done", "failed"):
                    run.set_state(state, **details)


@dataclass
class _Queue:
    """What one process does of the runs that wait."""

    claims: Claims
    cache: Path | None
    accelerator: str
    progress: Progress
    keep: int
    checkpoint_seconds: float
    _loaded: dict[DataConfig, Data] = field(default_factory=dict)

    def work(self, stop: Stop, wait: bool) -> None:
        """Do what no other process does, and wait for the rest if told to."""
        waiting = self.claims.waiting
        while waiting:
            split = groups(waiting.items())
            idle = True
            for number, group in enumerate(split, 1):
                with self.claims.ranks.agreed():
                    stop.check()
                mine = self.claims.take(group)
                if not mine:
                    continue
                idle = False
                if len(split) > 1:
                    self.claims.say(
                        f"group {number} of {len(split)}: {', '.join(c.name for c in mine.values())}"
                    )
                self._train(mine, stop)
            if waiting and idle:
                if not wait:
                    return
                time.sleep(POLL)

    def _train(self, mine: dict[Run, RunConfig], stop: Stop) -> None:
        locks = {run: self.claims.locks[run] for run in mine if self.claims.ranks.leads}
        try:
            data = self._data(next(iter(mine.values())).data, stop)
            Group(
                mine,
                locks,
                data,
                self.claims.failures,
                accelerator=self.accelerator,
                progress=self.progress,
                keep=self.keep,
                pause=stop.check,
                checkpoint_seconds=self.checkpoint_seconds,
                ranks=self.claims.ranks,
            ).train()
        except AfterimageError as error:
            self.claims.fail(mine, error)
        except BaseException:
            self.claims.mark((run for run in mine if run.state == "running"), "stopped")
            raise
        finally:
            for run, lock in locks.items():
                lock.release()
                if lock.lost:
                    self.claims.elsewhere.add(run)
                else:
                    del self.claims.waiting[run]
        self.claims.heard(None)

    def _data(self, config: DataConfig, stop: Stop) -> Data:
        """Groups mostly share their pictures, which are found, read and checked once.

        Decoding them may take long: one process alone stops between two pictures, ranks when all have them.
        """
        if config not in self._loaded:
            ranks = self.claims.ranks

            def progress(what: str, done: int, total: int, **figures: Any) -> None:
                self.progress(what, done, total, **figures)
                if ranks.count == 1:
                    stop.check()

            data = ranks.first_to_lead(lambda: load_data(config, cache=self.cache, progress=progress))
            with ranks.agreed():
                found = near_duplicates(data) if ranks.leads else ()
            self._loaded[config] = replace(data, notes=(*data.notes, *found))
        return self._loaded[config]
