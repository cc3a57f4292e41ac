"""Train runs on a Ray cluster: give groups of them to workers, show their progress, replace lost workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, DataConfig, RunConfig
from afterimage.experiments.queue import RunQueue, groups, report_failures
from afterimage.experiments.ray import worker
from afterimage.experiments.ray.cluster import (
    TICK,
    connect,
    describe,
    group_bytes,
    messages_here,
    share_machines,
)
from afterimage.experiments.ray.worker import Answer, identify, unpack
from afterimage.runs.failures import forget, is_done, recorded_error
from afterimage.runs.lock import POLL
from afterimage.runs.run import Run
from afterimage.runtime.failures import Unexpected, concerns, of_caller, one_line
from afterimage.runtime.progress import Progress, silent
from afterimage.runtime.signals import GracefulShutdown, graceful_shutdown
from afterimage.training.checkpoint import CHECKPOINT, PREVIOUS, remove_checkpoints
from afterimage.training.context import CHECKPOINT_SECONDS


def train_on_ray(
    configs: RunConfig | Sequence[RunConfig],
    root: str | Path = "runs",
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
    keep: int = 8,
    failures: list[AfterimageError] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    address: str = "",
    cpus: int | None = None,
    retries: int = 3,
) -> list[Run]:
    """Train every run that is not done yet on a Ray cluster.

    Runs that are trained together are one task, with CPUs (and as many threads), a GPU if the cluster has some and
    `accelerator` allows it, and the memory of its plan. Workers that see `root` train there. Others train in a folder
    of their own, whose files come back when the task ends.

    Args:
        configs, root, cache, accelerator, progress, keep, failures, checkpoint_seconds: as for `queue.train_runs`
        address: the cluster, see `cluster.connect`
        cpus: CPUs of each task; None for an even share of a machine
        retries: how often a group whose worker or machine is lost is given to another one; it goes on from its last
            checkpoint in `root`, and what was in a worker's own folder is lost with the worker

    Returns:
        all runs, in the order of `configs`

    Raises:
        AfterimageError: Ray is not installed, the cluster cannot be reached or lacks what is asked for, or a run failed
            and there is no list of `failures`
        Stopped: SIGTERM or Ctrl-C; every worker has stopped after its step, with a checkpoint
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    progress = of_caller(progress)
    queue = RunQueue(lambda text: progress(text, 1, 1))
    root = Path(root).resolve()
    runs = queue.open(configs, root)
    if queue.waiting:
        options = {
            "cache": cache and Path(cache).resolve(),
            "accelerator": accelerator,
            "keep": keep,
            "checkpoint_seconds": checkpoint_seconds,
        }
        with connect(address, queue.log) as ray, graceful_shutdown() as stop:
            # All groups, those that are done too: what one gets must not depend on when it is done.
            every = groups(zip(runs, configs, strict=True))
            sizes = [group_bytes(group.values()) for group in every]
            needs = share_machines(sizes, ray.nodes(), accelerator=accelerator, cpus=cpus, log=queue.log)
            jobs = [
                Job(f"[{number}/{len(every)}]", group, need)
                for number, (group, need) in enumerate(zip(every, needs, strict=True), 1)
            ]
            Driver(ray, queue, jobs, root, options, progress, retries).work(stop)
        queue.failures += _different_images(runs)
    report_failures(queue.failures, failures)
    return runs


@dataclass
class Job:
    """A group of runs on the cluster.

    Attributes:
        title: its name in messages
        group: all its runs
        need: what it asks Ray for
        shared: whether the current attempt trains in the driver's folder
        lost: number of workers that were lost
        runs: the runs of the current attempt
        task: Ray's reference to the current attempt
    """

    title: str
    group: dict[Run, RunConfig]
    need: dict[str, int]
    shared: bool = True
    lost: int = 0
    runs: dict[Run, RunConfig] = field(default_factory=dict)
    task: Any = None


@dataclass
class Driver:
    """Gives jobs to the cluster and follows them.

    Args:
        ray: the ray package
        queue: the runs that are not done
        jobs: groups of them
        root: folder of the run folders
        options: options of `queue.train_runs`
        progress: called with the progress of each job
        retries: how often a job whose worker is lost is given to another one
        stopping: whether workers were asked to stop
    """

    ray: Any
    queue: RunQueue
    jobs: Sequence[Job]
    root: Path
    options: dict[str, Any]
    progress: Progress
    retries: int
    stopping: bool = False

    def __post_init__(self) -> None:
        self.messages = messages_here(self.ray)
        self.train_group = self.ray.remote(worker.train_group)

    def work(self, stop: GracefulShutdown) -> None:
        """Train until every run is done or failed, here or elsewhere, or until all workers have stopped.

        Raises:
            Stopped: the process was asked to stop
        """
        look_at = 0.0
        try:
            while any(job.task is not None or self._waiting(job.group) for job in self.jobs):
                stop.check()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + POLL
                    for job in self.jobs:
                        if job.task is None and self._waiting(job.group):
                            self._submit(job)
                self._collect()
        finally:
            if stop.number is not None:
                self._stop()
            for job in self.jobs:
                self._cancel(job)
                self._release(job)
            self.ray.kill(self.messages)

    def _waiting(self, runs: dict[Run, RunConfig]) -> dict[Run, RunConfig]:
        return {run: config for run, config in runs.items() if run in self.queue.waiting}

    def _log(self, job: Job, what: str) -> None:
        self.progress(what, 1, 1, group=job.title)

    def _release(self, job: Job) -> None:
        for run in job.runs:
            self.queue.locks[run].release()

    def _cancel(self, job: Job) -> None:
        """Call off a task that waits, and interrupt one that has begun as Ctrl-C would."""
        if job.task is not None:
            self.ray.cancel(job.task, recursive=False)

    def _submit(self, job: Job) -> None:
        """Start a task for the job's runs, but for those that another process is at."""
        job.runs = self.queue.take(job.group)
        if not job.runs:
            return
        try:
            for run in job.runs:
                if run.state == "failed":  # by an earlier study; what fails from here on is over
                    run.set_state("new")
                    forget(run)
            configs = list(job.runs.values())
            attempt = {
                "number": self.jobs.index(job),
                "configs": {config.digest: config for config in configs},
                "root": str(self.root),
                "folder": identify(str(self.root), configs[0]) if job.shared else None,
                "sent": {} if job.shared else {run.name: _checkpoints(run) for run in job.runs},
                "threads": job.need["num_cpus"],
                "options": self.options,
                "messages": self.messages,
                **worker.driver_context(),
            }
            # The worker locks the folders; where it cannot, this process does until the answer.
            if job.shared:
                self._release(job)
            else:
                self.queue.mark(job.runs, "running")
            # Ray's own retries know of no checkpoint and of no limit that a user is told.
            job.task = self.train_group.options(max_retries=0, **job.need).remote(**attempt)
        except Exception as error:
            self._fail(job, error)
            return
        names = ", ".join(config.name for config in configs)
        self.progress(f"waits for {describe(job.need)}: {names}", 0, 1, group=job.title)

    def _collect(self) -> None:
        """Show what workers said, and take what attempts came to that have ended since the last look."""
        time.sleep(TICK)
        running = [job.task for job in self.jobs if job.task is not None]
        ended = self.ray.wait(running, num_returns=len(running), timeout=0)[0] if running else []
        for number, what, done, total, figures in self.ray.get(self.messages.take.remote()):
            self.progress(what, done, total, group=self.jobs[number].title, **figures)
        for job in self.jobs:
            if job.task in ended:
                self._end(job)
                job.task = None
                self._release(job)

    def _end(self, job: Job) -> None:
        """Take an attempt's answer, or what Ray says in its place; whatever else is wrong ends this job alone."""
        exceptions = self.ray.exceptions
        try:
            self._accept(job, self.ray.get(job.task))
        except exceptions.RayTaskError as error:  # the worker raised it, and would again
            cause = error.cause or error
            known = isinstance(cause, AfterimageError)
            self._fail(job, cause if known else Unexpected(one_line(cause), str(error)))
        except exceptions.TaskCancelledError:
            self._lost(job, "it was stopped")
        except exceptions.RayError as error:
            why = str(error).strip().partition("\n")[0]
            self._lost(job, f"{type(error).__name__}: {why:.500}")
        except Exception as error:
            self._fail(job, error)

    def _accept(self, job: Job, answer: Answer | None) -> None:
        if answer is None:
            job.shared = False
            self._log(job, f"the worker does not see {self.root}: runs are sent back when they have ended")
            return
        for run in job.runs:
            if run.name in answer.folders:
                self.queue.locks[run].check()
                unpack(run, answer.folders[run.name])
                if run.state == "done":
                    remove_checkpoints(run)
        left = {run for run in job.runs if run.name in answer.left}
        self.queue.elsewhere |= left
        ended = [run for run in job.runs if run not in left]
        self._settle(ended)
        if answer.stopped:
            self._lost(job, "it was stopped")
        elif any(run in self.queue.waiting for run in ended):  # not even its failure could be written down
            raise AfterimageError("; ".join(map(str, answer.failures)) or "a worker ended without a result")
        else:
            states = ", ".join(f"{run.name} {run.state}" for run in ended)
            self._log(job, states or "is left to another process")

    def _settle(self, runs: Iterable[Run]) -> None:
        """Those of the runs that a worker has ended wait no longer."""
        for run in runs:
            with self.queue.isolate(run):
                state = run.state
                if state in ("done", "failed") and self.queue.waiting.pop(run, None) and state == "failed":
                    self.queue.failures.append(recorded_error(run))

    def _lost(self, job: Job, why: str) -> None:
        """Let the runs of a lost worker wait for another, or end them when there were too many."""
        self._settle(job.runs)
        if self.stopping:
            self._log(job, "stopped after the step under way")
        elif self._waiting(job.runs):
            job.lost += 1
            if job.lost > self.retries:
                names = ", ".join(run.name for run in job.runs)
                times = f"{job.lost} times, the last time by {why}"
                self._fail(job, AfterimageError(f"{names}: the worker was lost {times}"))
                return
            start = "from the last checkpoint" if job.shared else "anew, since its folder is lost with it"
            self._log(job, f"the worker was lost: retry {job.lost} of {self.retries}, {start} ({why:.200})")

    def _fail(self, job: Job, error: Exception) -> None:
        """End the job's runs that have not ended, in their folders too as far as no other process is at them.

        An error that is the cluster's or the caller's ends everything: it is raised.
        """
        if concerns(error) or isinstance(error, self.ray.exceptions.RayError):
            raise error
        self._log(job, one_line(error))
        self._release(job)
        waiting = self._waiting(job.runs)
        self.queue.fail(self.queue.take(waiting), error)
        for run in waiting:
            self.queue.waiting.pop(run, None)
        self._release(job)

    def _stop(self) -> None:
        """Let every worker stop after its step, with a checkpoint, and wait for that; what waits is called off."""
        self.stopping = True
        for job in self.jobs:
            self._cancel(job)
        while any(job.task is not None for job in self.jobs):
            self._collect()
        for job in self.jobs:  # workers leave theirs like that; lost ones could not
            running = {run: config for run, config in job.runs.items() if run.state == "running"}
            self.queue.mark(self.queue.take(running), "stopped")


def _checkpoints(run: Run) -> dict[str, bytes]:
    """Read the files that an earlier attempt left to go on from."""
    run.remove_leftovers()
    return {name: run.file(name).read_bytes() for name in (PREVIOUS, CHECKPOINT) if run.file(name).exists()}


def _different_images(runs: Sequence[Run]) -> list[AfterimageError]:
    """Find machines that were asked for the same images and found others."""
    found: dict[DataConfig, dict[str, str]] = {}
    for run in filter(is_done, runs):
        with contextlib.suppress(AfterimageError):  # a folder that cannot be read is told elsewhere
            digest = run.result.data.digest
            found.setdefault(run.config.data, {}).setdefault(digest, run.name)
    return [
        AfterimageError(
            f"{' and '.join(digests.values())} were trained on different images, although both ask for {data.source}: "
            "two machines hold different ones. Their scores cannot be compared."
        )
        for data, digests in found.items()
        if len(digests) > 1
    ]
