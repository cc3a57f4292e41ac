"""Run configurations become finished run folders: grouped, each run in one process at a time, trained, measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from afterimage.checkpoint import remove_checkpoints
from afterimage.config import AfterimageError, DataConfig, RunConfig, split_source
from afterimage.data import Data, load_data
from afterimage.data.near import near_duplicates
from afterimage.group import Group
from afterimage.lock import POLL, Lock
from afterimage.progress import Progress, silent
from afterimage.runs import Run
from afterimage.stop import Stop, stoppable
from afterimage.train import CHECKPOINT_SECONDS


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
) -> list[Run]:
    """Train every run that is not done yet; returns all of them, in the order asked for.

    Runs that share encoders, pictures, batches and seed are trained together on one pass. Each keeps its best
    decoder by validation loss, is measured on the test pictures, and stores `keep` of them. A run that fails is
    recorded with its error and the others go on; the errors are added to `failures`, or the first is raised at
    the end where no such list is given.

    Any number of processes may be given the same runs: each run is trained by one of them, and every one returns
    when all are done. A checkpoint is written after every epoch and, within one, every `checkpoint_seconds`. On
    SIGTERM and Ctrl-C training stops after the step under way with a checkpoint, and `stop.Stopped` is raised.
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    runs = {config.digest: Run.create(root, config) for config in configs}
    queue = _Queue(cache, accelerator, progress, keep, checkpoint_seconds)
    for config in configs:
        run = runs[config.digest]
        if run.state == "done":
            progress(f"{config.name} is done already, nothing to do", 1, 1)
            _tidy(run)
        else:
            queue.waiting[run] = config
    with stoppable() as stop:
        queue.work(stop)
    if failures is not None:
        failures += queue.failures
    elif queue.failures:
        raise queue.failures[0]
    return [runs[config.digest] for config in configs]


def _tidy(run: Run) -> None:
    """Remove what a process left that was killed right after it had finished the run."""
    lock = Lock(run.path)
    with contextlib.suppress(AfterimageError):
        if any(run.path.glob("lock.*")) and lock.acquire():
            run.remove_leftovers()
            remove_checkpoints(run)
            lock.release()


def groups(runs: Iterable[tuple[Run, RunConfig]]) -> list[dict[Run, RunConfig]]:
    """Runs by what they must share to be trained together: encoders, pictures, batches, seed and measure."""
    found: dict[tuple, dict[Run, RunConfig]] = {}
    for run, config in runs:
        models = frozenset(split_source(source)[0] for source in config.sources)
        recipe = replace(config.recipe, epochs=1, learning_rate=1.0, weight_decay=0.0, loss="mse")
        shared = (models, config.weights, config.data, config.seed, config.lpips, recipe)
        found.setdefault(shared, {})[run] = config
    return list(found.values())


@dataclass
class _Queue:
    """Runs that wait to be done, by this process or another."""

    cache: Path | None
    accelerator: str
    progress: Progress
    keep: int
    checkpoint_seconds: float
    waiting: dict[Run, RunConfig] = field(default_factory=dict)
    failures: list[AfterimageError] = field(default_factory=list)
    _locks: dict[Run, Lock] = field(default_factory=dict)
    _elsewhere: set[Run] = field(default_factory=set)
    _loaded: dict[DataConfig, Data] = field(default_factory=dict)

    def work(self, stop: Stop) -> None:
        """Do what no other process does, and wait for the rest."""
        while self.waiting:
            split = groups(self.waiting.items())
            idle = True
            for number, group in enumerate(split, 1):
                stop.check()
                mine = {run: config for run, config in group.items() if self._take(run)}
                if not mine:
                    continue
                idle = False
                if len(split) > 1:
                    self._say(f"group {number} of {len(split)}: {', '.join(c.name for c in mine.values())}")
                self._train(mine, stop)
            if self.waiting and idle:
                time.sleep(POLL)

    def _say(self, text: str) -> None:
        self.progress(text, 1, 1)

    def _take(self, run: Run) -> bool:
        """Whether this process is to do the run now; it then holds the run's lock."""
        lock = self._locks.setdefault(run, Lock(run.path, self._say))
        if not lock.acquire():
            if run not in self._elsewhere:
                self._elsewhere.add(run)
                self._say(f"{run.name} is left to {lock.holder or 'another process'}, which is at it")
            return False
        # Another process may have come to its end just now: what failed there would fail here too.
        state = run.state
        over = state == "done" or (state == "failed" and run in self._elsewhere)
        if over:
            lock.release()
            self._over(run)
        return not over

    def _over(self, run: Run) -> None:
        del self.waiting[run]
        self._say(f"{run.name} is {run.state}, by another process")
        if run.state == "failed":
            self.failures.append(AfterimageError(str(run.status.get("error"))))

    def _train(self, mine: dict[Run, RunConfig], stop: Stop) -> None:
        locks = {run: self._locks[run] for run in mine}
        try:
            data = self._data(next(iter(mine.values())).data)
            Group(
                mine,
                locks,
                data,
                self.failures,
                accelerator=self.accelerator,
                progress=self.progress,
                keep=self.keep,
                pause=stop.check,
                checkpoint_seconds=self.checkpoint_seconds,
            ).train()
        except AfterimageError as error:
            self.failures.append(error)
            for run in mine:
                if run.state not in ("done", "failed"):
                    with contextlib.suppress(AfterimageError):
                        run.set_state("failed", error=str(error))
        except BaseException:
            for run in mine:
                if run.state == "running":
                    with contextlib.suppress(AfterimageError):
                        run.set_state("stopped")
            raise
        finally:
            for run, lock in locks.items():
                lock.release()
                if lock.lost:
                    self._elsewhere.add(run)
                else:
                    del self.waiting[run]

    def _data(self, config: DataConfig) -> Data:
        """Groups mostly share their pictures, which are found, read and checked once."""
        if config not in self._loaded:
            data = load_data(config, cache=self.cache, progress=self.progress)
            self._loaded[config] = replace(data, notes=(*data.notes, *near_duplicates(data)))
        return self._loaded[config]
