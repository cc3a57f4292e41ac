"""Training of runs, and search for their measured bounds, on a Ray cluster; lost workers are replaced."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, RunConfig, printable_path
from afterimage.config.study import StudyConfig
from afterimage.experiments.inference import review_finished
from afterimage.experiments.queue import RunQueue, group_runs, report_failures
from afterimage.experiments.ray import worker
from afterimage.experiments.ray.cluster import Tasks, WorkerLost, allocate_resources, connect, group_bytes
from afterimage.experiments.ray.worker import GroupOutcome, folder_identity, unpack
from afterimage.experiments.study import find_bounds
from afterimage.runs.lock import POLL_SECONDS
from afterimage.runs.run import Run, read_failure, remove_traceback
from afterimage.runtime.failures import collect_failures, error_scope, one_line, protect_callback
from afterimage.runtime.process import GracefulShutdown, graceful_shutdown
from afterimage.runtime.terminal import Progress, no_progress
from afterimage.training.checkpoint import CHECKPOINT, remove_checkpoint
from afterimage.training.feature_loader import CHECKPOINT_SECONDS


def train_on_ray(
    configs: RunConfig | Sequence[RunConfig],
    root: str | Path = "runs",
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
    keep: int = 8,
    failures: list[AfterimageError] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    address: str = "",
    cpus: int | None = None,
    retries: int = 3,
) -> list[Run]:
    """Train every run that is not done yet on a Ray cluster, as `queue.train_runs` does in this process.

    Runs that are trained together are one task. It reserves CPUs (with as many threads), its estimated memory, and a
    GPU if the cluster has one and `accelerator` allows it. Workers that see `root` train there; others train in a
    temporary folder, whose files are sent back when the task ends.

    Args:
        configs, root, cache, accelerator, progress, keep, failures, checkpoint_seconds: as for `queue.train_runs`
        address: address of the cluster, see `cluster.connect`
        cpus: CPUs of each task; None for an even share of a machine
        retries: number of times that a group whose worker or machine is lost is given to another one; it resumes from
            its last checkpoint in `root`, while a temporary folder is lost with its worker

    Raises:
        AfterimageError: Ray is not installed, the cluster cannot be reached or lacks the requested resources, or a run
            failed and `failures` is None
        Stopped: SIGTERM or Ctrl-C; every worker has stopped after its current step, with a checkpoint
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    progress = protect_callback(progress)
    queue = RunQueue(lambda text: progress(text, 1, 1))
    root = Path(root).resolve()
    runs = queue.open(configs, root)
    if queue.finished:
        review_finished(queue.finished, cache=cache, accelerator=accelerator, progress=progress)
    if queue.waiting:
        options = {
            "cache": cache and Path(cache).resolve(),
            "accelerator": accelerator,
            "keep": keep,
            "checkpoint_seconds": checkpoint_seconds,
        }
        with connect(address, queue.log) as ray, graceful_shutdown() as stop:
            # Count finished groups too: the resources of a group must not depend on which others are done.
            every = group_runs(zip(runs, configs, strict=True))
            sizes = [group_bytes(group.values()) for group in every]
            needs = allocate_resources(sizes, ray.nodes(), accelerator=accelerator, cpus=cpus, log=queue.log)
            tasks, jobs = Tasks(ray, progress, needs, retries), [Job(*job) for job in enumerate(every)]
            Driver(tasks, queue, jobs, root, options).work(stop)
    report_failures(queue.failures, failures)
    return runs


@dataclass
class Job:
    """A group of runs on the cluster, trained in one or more attempts.

    Attributes:
        number: number of the job
        group: all runs of the group
        shared: whether the next or current attempt trains in the driver's folder
        runs: runs of the current attempt
        running: whether an attempt is under way
    """

    number: int
    group: dict[Run, RunConfig]
    shared: bool = True
    runs: dict[Run, RunConfig] = field(default_factory=dict)
    running: bool = False


@dataclass
class Driver:
    """Driver of jobs on the cluster: submits them and follows them until they end.

    Args:
        tasks: the tasks of the jobs' attempts
        queue: the runs that are not done
        jobs: the groups of runs
        root: folder of the run folders
        options: options of `queue.train_runs`
        stopping: whether workers were asked to stop
    """

    tasks: Tasks
    queue: RunQueue
    jobs: Sequence[Job]
    root: Path
    options: dict[str, Any]
    stopping: bool = False

    def work(self, stop: GracefulShutdown) -> None:
        """Train until every run is done or failed, here or in another process; wait for workers if asked to stop.

        Raises:
            Stopped: the process was asked to stop
        """
        look_at = 0.0
        try:
            while any(job.running or self._waiting(job.group) for job in self.jobs):
                stop.check()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + POLL_SECONDS
                    for job in self.jobs:
                        if not job.running and self._waiting(job.group):
                            self._submit(job)
                self._collect()
        finally:
            if stop.number is not None:
                self._stop()
            self.tasks.close()
            for job in self.jobs:
                self._release(job)

    def _waiting(self, runs: dict[Run, RunConfig]) -> dict[Run, RunConfig]:
        return {run: config for run, config in runs.items() if run in self.queue.waiting}

    def _release(self, job: Job) -> None:
        for run in job.runs:
            self.queue.locks[run].release()

    def _submit(self, job: Job) -> None:
        """Submit a task for the job's runs, except those that another process is training."""
        job.runs = self.queue.acquire_runs(job.group)
        if not job.runs:
            return
        try:
            for run in job.runs:
                if run.state == "failed":  # in an earlier study; a run that fails from now on is not retried
                    run.set_state("new")
                    remove_traceback(run)
            configs = list(job.runs.values())
            attempt = {
                "configs": {config.digest: config for config in configs},
                "root": str(self.root),
                "folder": folder_identity(str(self.root), configs[0]) if job.shared else None,
                "sent": {} if job.shared else {run.name: _checkpoints(run) for run in job.runs},
                "options": self.options,
            }
            # The worker locks shared folders; otherwise this process keeps the locks until the outcome arrives.
            if job.shared:
                self._release(job)
            else:
                self.queue.set_states(job.runs, "running")
            names = ", ".join(config.name for config in configs)
            self.tasks.submit(job.number, worker.train_group, names, **attempt)
            job.running = True
        except Exception as error:
            self._fail(job, error)

    def _collect(self) -> None:
        """Handle the attempts that have ended since the last call; an error in that ends this job alone."""
        for number, outcome in self.tasks.ended():
            job = self.jobs[number]
            try:
                if isinstance(outcome, WorkerLost):
                    self._lost(job, str(outcome))
                elif isinstance(outcome, Exception):
                    self._fail(job, outcome)
                else:
                    self._accept(job, outcome)
            except Exception as error:
                self._fail(job, error)
            job.running = False
            self._release(job)

    def _accept(self, job: Job, outcome: GroupOutcome | None) -> None:
        if outcome is None:
            job.shared = False
            where = f"the worker does not see {printable_path(self.root)}: runs are sent back when they have ended"
            self.tasks.show(job.number, where)
            return
        for run in job.runs:
            if run.name in outcome.folders:
                self.queue.locks[run].check()
                unpack(run, outcome.folders[run.name])
                if run.state == "done":
                    remove_checkpoint(run)
        skipped = {run for run in job.runs if run.name in outcome.skipped}
        self.queue.running_elsewhere |= skipped
        ended = [run for run in job.runs if run not in skipped]
        self._remove_ended(ended)
        if outcome.stopped:
            self._lost(job, "it was stopped")
        elif any(run in self.queue.waiting for run in ended):  # without a recorded failure
            raise AfterimageError("; ".join(map(str, outcome.failures)) or "a worker ended without a result")
        else:
            states = ", ".join(f"{run.name} {run.state}" for run in ended)
            self.tasks.show(job.number, states or "is left to another process")

    def _remove_ended(self, runs: Iterable[Run]) -> None:
        """Remove the runs that a worker has ended from the queue, and record their failures."""
        for run in runs:
            with self.queue.isolate(run):
                state = run.state
                if state in ("done", "failed") and self.queue.waiting.pop(run, None) and state == "failed":
                    self.queue.failures.append(read_failure(run))

    def _lost(self, job: Job, why: str) -> None:
        """Leave the runs of a lost worker waiting for another one, or end them if the retries are used up."""
        self._remove_ended(job.runs)
        if self.stopping:
            self.tasks.show(job.number, "stopped after the step under way")
        elif self._waiting(job.runs):
            start = "from the last checkpoint" if job.shared else "anew, since its folder is lost with it"
            self.tasks.count_lost(job.number, ", ".join(run.name for run in job.runs), why, start)

    def _fail(self, job: Job, error: Exception) -> None:
        """End the job's unfinished runs with an error, also in their folders unless another process holds the lock.

        An error of the cluster or of the caller ends everything: it is raised.
        """
        if error_scope(error) or isinstance(error, self.tasks.ray.exceptions.RayError):
            raise error
        self.tasks.show(job.number, one_line(error))
        self._release(job)
        waiting = self._waiting(job.runs)
        self.queue.fail(self.queue.acquire_runs(waiting), error)
        for run in waiting:
            self.queue.waiting.pop(run, None)
        self._release(job)

    def _stop(self) -> None:
        """Cancel tasks that have not begun, and wait until every worker has stopped with a checkpoint."""
        self.stopping = True
        self.tasks.cancel()
        while self.tasks.running:
            self._collect()
        for job in self.jobs:  # workers set this state themselves, unless they were lost
            running = {run: config for run, config in job.runs.items() if run.state == "running"}
            self.queue.set_states(self.queue.acquire_runs(running), "stopped")


def _checkpoints(run: Run) -> dict[str, bytes]:
    """Read the checkpoint that an earlier attempt left, from which the next one resumes."""
    run.remove_leftovers()
    path = run.file(CHECKPOINT)
    return {CHECKPOINT: path.read_bytes()} if path.exists() else {}


def find_bounds_on_ray(
    runs: Sequence[Run],
    study: StudyConfig,
    root: str | Path,
    failures: list[AfterimageError],
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
    address: str = "",
    cpus: int | None = None,
    retries: int = 3,
) -> list[Run]:
    """Find the measured bound of each run on a Ray cluster, as `study.find_bounds` does.

    A search whose worker is lost is given to another worker and resumes after the last finished batch in `root`. If a
    run's worker does not see `root`, the search runs in this process after the others, and a message says so.

    Args:
        runs, study, root, failures, cache, accelerator, progress: as for `study.find_bounds`
        address, cpus, retries: as for `train_on_ray`

    Returns:
        the finished inversions, in the order of `runs`

    Raises:
        AfterimageError: the cluster cannot be reached, or lacks the requested resources
        Stopped: SIGTERM or Ctrl-C while workers search; finished batches are kept
    """
    if not runs:
        return []
    progress, root = protect_callback(progress), Path(root).resolve()
    options = {"cache": cache and Path(cache).resolve(), "accelerator": accelerator}
    log = partial(progress, done=1, total=1)
    found: dict[int, list[Run]] = {}
    unseen: list[int] = []
    with connect(address, log) as ray, graceful_shutdown() as stop:
        sizes = [group_bytes([run.config]) for run in runs]
        needs = allocate_resources(sizes, ray.nodes(), accelerator=accelerator, cpus=cpus, log=log)
        tasks = Tasks(ray, progress, needs, retries)

        def submit(number: int) -> None:
            run = runs[number]
            search = {"name": run.name, "study": study, "root": str(root), "options": options}
            folder, names = folder_identity(str(root), run.config), f"the bound of {run.name}"
            tasks.submit(number, worker.find_bound, names, folder=folder, **search)

        try:
            for number in range(len(runs)):
                submit(number)
            while tasks.running:
                stop.check()
                for number, outcome in tasks.ended():
                    bound = f"the measured bound of {runs[number].name}"
                    with collect_failures(failures, bound):
                        if outcome is None:
                            where = f"the worker does not see {printable_path(root)}"
                            tasks.show(number, f"{where}: its bound is found here, after the others")
                            unseen.append(number)
                        elif isinstance(outcome, WorkerLost):
                            tasks.count_lost(number, bound, str(outcome), "from the last batch")
                            submit(number)
                        elif isinstance(outcome, Exception):
                            raise outcome
                        else:
                            names, own = outcome
                            failures += own
                            found[number] = [Run(root / name) for name in names]
        finally:
            tasks.close()
    for number in unseen:
        found[number] = find_bounds([runs[number]], study, root, failures, progress=progress, **options)
    return [run for number in sorted(found) for run in found[number]]
