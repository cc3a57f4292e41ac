"""Training of runs on a Ray cluster: groups are given to workers, progress is shown, lost workers are replaced."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, DataConfig, RunConfig, shown
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
from afterimage.runs.lock import POLL
from afterimage.runs.run import Run, forget, is_done, recorded_error
from afterimage.runtime.failures import Unexpected, concerns, of_caller, one_line
from afterimage.runtime.process import GracefulShutdown, graceful_shutdown
from afterimage.runtime.terminal import Progress, silent
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

    Runs that are trained together are one task. It reserves CPUs (with as many threads), its estimated memory, and a
    GPU if the cluster has one and `accelerator` allows it. Workers that see `root` train there; others train in a
    temporary folder, whose files are sent back when the task ends.

    Args:
        configs, root, cache, accelerator, progress, keep, failures, checkpoint_seconds: as for `queue.train_runs`
        address: address of the cluster, see `cluster.connect`
        cpus: CPUs of each task; None for an even share of a machine
        retries: number of times that a group whose worker or machine is lost is given to another one; it resumes from
            its last checkpoint in `root`, while a temporary folder is lost with its worker

    Returns:
        all runs, in the order of `configs`

    Raises:
        AfterimageError: Ray is not installed, the cluster cannot be reached or lacks the requested resources, or a run
            failed and `failures` is None
        Stopped: SIGTERM or Ctrl-C; every worker has stopped after its current step, with a checkpoint
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
            # Count finished groups too: the resources of a group must not depend on which others are done.
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
    """A group of runs on the cluster, trained in one or more attempts.

    Attributes:
        title: name of the job in messages
        group: all runs of the group
        need: resources that are requested from Ray
        shared: whether the next or current attempt trains in the driver's folder
        lost: number of workers that were lost
        runs: runs of the current attempt
        task: Ray's reference to the current attempt; None between attempts
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
    """Driver of jobs on the cluster: submits them and follows them until they end.

    Args:
        ray: the ray package
        queue: the runs that are not done
        jobs: the groups of runs
        root: folder of the run folders
        options: options of `queue.train_runs`
        progress: callback for the progress and messages of each job
        retries: number of times that a job whose worker is lost is given to another one
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
        """Train until every run is done or failed, here or in another process; wait for workers if asked to stop.

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
        """Cancel the job's task; a task that has begun is interrupted with the effect of Ctrl-C."""
        if job.task is not None:
            self.ray.cancel(job.task, recursive=False)

    def _submit(self, job: Job) -> None:
        """Submit a task for the job's runs, except those that another process is training."""
        job.runs = self.queue.take(job.group)
        if not job.runs:
            return
        try:
            for run in job.runs:
                if run.state == "failed":  # in an earlier study; a run that fails from now on is not retried
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
            # The worker locks shared folders; otherwise this process keeps the locks until the answer arrives.
            if job.shared:
                self._release(job)
            else:
                self.queue.mark(job.runs, "running")
            # No retries by Ray: they would ignore checkpoints and the limit `retries`.
            job.task = self.train_group.options(max_retries=0, **job.need).remote(**attempt)
        except Exception as error:
            self._fail(job, error)
            return
        names = ", ".join(config.name for config in configs)
        self.progress(f"waits for {describe(job.need)}: {names}", 0, 1, group=job.title)

    def _collect(self) -> None:
        """Show new messages of workers, and handle the attempts that have ended since the last call."""
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
        """Handle an attempt's answer or Ray's error in its place; any other error ends this job alone."""
        exceptions = self.ray.exceptions
        try:
            self._accept(job, self.ray.get(job.task))
        except exceptions.RayTaskError as error:  # raised by the task, so a retry would raise it again
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
            self._log(
                job, f"the worker does not see {shown(self.root)}: runs are sent back when they have ended"
            )
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
        elif any(run in self.queue.waiting for run in ended):  # without a recorded failure
            raise AfterimageError("; ".join(map(str, answer.failures)) or "a worker ended without a result")
        else:
            states = ", ".join(f"{run.name} {run.state}" for run in ended)
            self._log(job, states or "is left to another process")

    def _settle(self, runs: Iterable[Run]) -> None:
        """Remove the runs that a worker has ended from the queue, and record their failures."""
        for run in runs:
            with self.queue.isolate(run):
                state = run.state
                if state in ("done", "failed") and self.queue.waiting.pop(run, None) and state == "failed":
                    self.queue.failures.append(recorded_error(run))

    def _lost(self, job: Job, why: str) -> None:
        """Leave the runs of a lost worker waiting for another one, or end them if the retries are used up."""
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
        """End the job's unfinished runs with an error, also in their folders unless another process holds the lock.

        An error of the cluster or of the caller ends everything: it is raised.
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
        """Cancel tasks that have not begun, and wait until every worker has stopped with a checkpoint."""
        self.stopping = True
        for job in self.jobs:
            self._cancel(job)
        while any(job.task is not None for job in self.jobs):
            self._collect()
        for job in self.jobs:  # workers set this state themselves, unless they were lost
            running = {run: config for run, config in job.runs.items() if run.state == "running"}
            self.queue.mark(self.queue.take(running), "stopped")


def _checkpoints(run: Run) -> dict[str, bytes]:
    """Read the checkpoint files that an earlier attempt left, from which the next one resumes."""
    run.remove_leftovers()
    return {name: run.file(name).read_bytes() for name in (PREVIOUS, CHECKPOINT) if run.file(name).exists()}


def _different_images(runs: Sequence[Run]) -> list[AfterimageError]:
    """Return an error for each data configuration whose runs were trained on different images."""
    found: dict[DataConfig, dict[str, str]] = {}
    for run in filter(is_done, runs):
        with contextlib.suppress(AfterimageError):  # a folder that cannot be read is reported elsewhere
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
