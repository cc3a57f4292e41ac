"""The driver of a study on Ray: hands groups of runs to workers, shows what they do, gives lost ones to others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import afterimage.experiments.ray.worker as worker
from afterimage.config import AfterimageError, RunConfig
from afterimage.experiments.queue import RunQueue
from afterimage.experiments.ray.files import PIECE, Inbox, check_result
from afterimage.experiments.ray.needs import describe
from afterimage.experiments.ray.post import Answer, Order, Piece, Post, Said, Started
from afterimage.runs.failures import forget, record, recorded_error
from afterimage.runs.lock import POLL
from afterimage.runs.run import Run
from afterimage.runtime.failures import Unexpected, concerns, one_line
from afterimage.runtime.progress import Progress
from afterimage.runtime.signals import GracefulShutdown
from afterimage.training.checkpoint import CHECKPOINT, PREVIOUS, remove_checkpoints

TICK = 0.2
"""Seconds between two looks at the post."""


@dataclass
class Job:
    """A group of runs, and the attempt at it that is under way: `runs` are those it does, `ref` is its answer."""

    number: int
    count: int
    group: dict[Run, RunConfig]
    need: dict[str, int]
    attempt: int = 0
    lost: int = 0
    fetch: bool = False
    machine: str = ""
    runs: dict[Run, RunConfig] = field(default_factory=dict)
    ref: Any = None
    inbox: Inbox | None = None
    error: Exception | None = None
    look_at: float = 0.0

    @property
    def title(self) -> str:
        return f"[{self.number}/{self.count}]{f' {self.machine}:' if self.machine else ''}"


class Driver:
    """Jobs on their way through the cluster. `order` is what all attempts have in common."""

    def __init__(
        self, ray: Any, claims: RunQueue, jobs: Sequence[Job], order: Order, progress: Progress, retries: int
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.ray, self.claims, self.jobs, self.order = ray, claims, jobs, order
        self.progress, self.retries, self.fetch = progress, retries, order.fetch
        self.stopping = False
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.post = ray.remote(Post).options(num_cpus=0, scheduling_strategy=here).remote()
        # Ray's own retries know of no checkpoint and of no limit that a user is told.
        self.task = ray.remote(worker.train_group)

    def work(self, stop: GracefulShutdown) -> None:
        """Until every run is done, here or elsewhere, or failed; on a stop until every worker has stopped."""
        try:
            while any(self._unfinished(job) for job in self.jobs):
                stop.check()
                self._hand_out()
                self._read_post()
                self._collect()
                time.sleep(TICK)
        finally:
            if stop.number is not None:
                self._stop()
            self.ray.kill(self.post)
            for job in self.jobs:
                self._release(job)

    def _unfinished(self, job: Job) -> bool:
        return job.ref is not None or any(run in self.claims.waiting for run in job.group)

    def _say(self, job: Job, what: str) -> None:
        self.progress(what, 1, 1, group=job.title)

    def _hand_out(self) -> None:
        """A task for every job that has none, unless other processes are at all of its runs."""
        now = time.monotonic()
        for job in self.jobs:
            if job.ref is None and self._unfinished(job) and now >= job.look_at:
                job.look_at = now + POLL
                if mine := self.claims.take(job.group):
                    try:
                        self._submit(job, mine)
                    except Exception as error:
                        if self._concerns_all(error):
                            raise
                        self._release(job)
                        self._fail(job, error)
                        self._release(job)

    def _submit(self, job: Job, mine: dict[Run, RunConfig]) -> None:
        job.runs, job.attempt, job.fetch, job.machine = mine, job.attempt + 1, self.fetch, ""
        for run in mine:
            if run.state == "failed":  # by an earlier study; what fails from here on is over
                run.set_state("new")
                forget(run)
        sent = []
        if job.fetch:  # the worker cannot lock the folders, so this process does, until the answer
            job.inbox = Inbox(
                {run.name: run for run in mine},
                self.order.keep,
                lambda run: self.claims.locks[run].check(),
            )
            for run in mine:
                run.remove_leftovers()
                sent += [(run.name, name, self._put(run.file(name))) for name in (PREVIOUS, CHECKPOINT)]
        else:
            self._release(job)
        order = replace(
            self.order,
            number=job.number,
            attempt=job.attempt,
            configs=tuple(mine.values()),
            digests=tuple(config.digest for config in mine.values()),
            fetch=job.fetch,
            threads=int(job.need["num_cpus"]),
        )
        names = ", ".join(config.name for config in mine.values())
        job.ref = self.task.options(max_retries=0, **job.need).remote(
            order, self.post, [s for s in sent if s[2]]
        )
        self.progress(f"waits for {describe(job.need)}: {names}", 0, 1, group=job.title)

    def _put(self, path: Path) -> list[Any]:
        """References to a file's pieces; none where there is no such file."""
        if not path.exists():
            return []
        with open(path, "rb") as file:
            return [self.ray.put(piece) for piece in iter(lambda: file.read(PIECE), b"")]

    def _read_post(self) -> None:
        for letter in self.ray.get(self.post.take.remote()):
            job = self.jobs[letter.number - 1]
            if letter.attempt != job.attempt or job.ref is None:
                continue  # from a worker that was given up
            if isinstance(letter, Said):
                self.progress(letter.what, letter.done, letter.total, group=job.title, **letter.figures)
            elif isinstance(letter, Started):
                self._say(job, self._began(job, letter))
                job.machine = letter.machine
            elif isinstance(letter, Piece) and job.error is None:
                try:
                    job.inbox.add(letter)
                except Exception as error:
                    job.error = error

    def _began(self, job: Job, letter: Started) -> str:
        where = "in the shared folder"
        if job.fetch:
            self.claims.mark(job.runs, "running")
            where = "in a folder of its own, whose files are fetched"
        return f"is trained on {letter.machine} {where}: {', '.join(run.name for run in job.runs)}"

    def _collect(self) -> None:
        """What came of attempts that have ended."""
        open_jobs = {job.ref: job for job in self.jobs if job.ref is not None}
        if not open_jobs:
            return
        ready, _ = self.ray.wait(list(open_jobs), num_returns=len(open_jobs), timeout=0)
        if ready:
            self._read_post()  # all that a worker sent before its answer
        for ref in ready:
            job = open_jobs[ref]
            self._end(job)
            job.ref, job.inbox, job.error = None, None, None
            self._release(job)

    def _end(self, job: Job) -> None:
        exceptions = self.ray.exceptions
        try:
            self._answered(job, self.ray.get(job.ref))
        except exceptions.RayTaskError as error:
            # Neither a lost worker nor a run's error: it would happen again.
            cause = error.cause or error
            known = isinstance(cause, AfterimageError)
            self._fail(job, cause if known else Unexpected(one_line(cause), str(error)))
        except exceptions.TaskCancelledError:
            pass
        except exceptions.RayError as error:
            self._lost(job, error)
        except Exception as error:
            if concerns(error):
                raise
            self._fail(job, error)

    def _concerns_all(self, error: Exception) -> bool:
        """Whether an error of the driver is the cluster's, or its caller's, and no job's."""
        return bool(concerns(error)) or isinstance(error, self.ray.exceptions.RayError)

    def _answered(self, job: Job, answer: Answer) -> None:
        if answer.unseen:
            self.fetch = True
            self._say(job, f"the worker does not see {self.order.root}: results are fetched from here on")
            return
        ended = [run for run in job.runs if run.name not in answer.left]
        for run in ended:
            self._over(job, run)
        if job.error is not None:
            raise job.error
        if answer.stopped:
            self._say(job, "stopped after the step under way")
            return
        if any(run in self.claims.waiting for run in ended):  # not even its failure could be written down
            raise AfterimageError("; ".join(answer.failures) or f"group {job.number} ended without a result")
        self.claims.elsewhere.update(run for run in job.runs if run.name in answer.left)
        states = ", ".join(f"{run.name} {run.state}" for run in ended)
        self._say(job, states or "is left to another process")

    def _over(self, job: Job, run: Run) -> None:
        """A run has ended, by a worker of this driver; one whose files were refused has not."""
        with self.claims.of_one(run):
            if job.fetch and run.state == "done":
                try:
                    check_result(run, job.runs[run].digest)
                    remove_checkpoints(run)
                except Exception as error:
                    record(run, error)
            if (
                run.state in ("done", "failed")
                and self.claims.waiting.pop(run, None)
                and run.state == "failed"
            ):
                self.claims.failures.append(recorded_error(run))

    def _lost(self, job: Job, error: Exception) -> None:
        for run in job.runs:
            self._over(job, run)
        if self.stopping or not any(run in self.claims.waiting for run in job.runs):
            return
        job.lost += 1
        why = str(error).strip().partition("\n")[0]
        if job.lost <= self.retries:
            again = f"retry {job.lost} of {self.retries}, from the last checkpoint"
            self._say(job, f"the worker was lost: {again} ({type(error).__name__}: {why:.200})")
            return
        self._fail(
            job,
            AfterimageError(
                f"{', '.join(run.name for run in job.runs)}: the worker was lost {job.lost} times, the last time by "
                f"{type(error).__name__}: {why:.500}"
            ),
        )

    def _fail(self, job: Job, error: Exception) -> None:
        """End the job's runs that have not ended, in their folders too as far as no other process is at them."""
        self._say(job, one_line(error))
        waiting = {run: config for run, config in job.runs.items() if run in self.claims.waiting}
        mine = waiting if job.fetch else self.claims.take(waiting)
        self.claims.fail(mine, error)
        for run in waiting:
            self.claims.waiting.pop(run, None)

    def _stop(self) -> None:
        """Let every worker stop after its step, with a checkpoint, and wait for that; what waits is called off."""
        self.ray.get(self.post.stop.remote())
        self._read_post()
        for job in self.jobs:
            if job.ref is not None and not job.machine:
                self.ray.cancel(job.ref)
        self.stopping = True
        while any(job.ref is not None for job in self.jobs):
            self._read_post()
            self._collect()
            time.sleep(TICK)
        for job in self.jobs:  # workers leave theirs like that; lost ones could not
            self.claims.mark(
                self.claims.take({r: c for r, c in job.runs.items() if r.state == "running"}), "stopped"
            )

    def _release(self, job: Job) -> None:
        for run in job.runs:
            self.claims.locks[run].release()
