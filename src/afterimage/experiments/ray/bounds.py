"""Search for measured bounds on a Ray cluster, one task for each run, on workers that see the study's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, shown
from afterimage.config.study import StudyConfig
from afterimage.experiments.ray import worker
from afterimage.experiments.ray.cluster import (
    TICK,
    connect,
    describe,
    group_bytes,
    messages_here,
    share_machines,
)
from afterimage.experiments.ray.worker import identify
from afterimage.experiments.study import find_bounds
from afterimage.runs.run import Run
from afterimage.runtime.failures import as_error, concerns, of_caller
from afterimage.runtime.process import graceful_shutdown
from afterimage.runtime.terminal import Progress, silent


def find_bounds_on_ray(
    runs: Sequence[Run],
    study: StudyConfig,
    root: str | Path,
    failures: list[AfterimageError],
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
    address: str = "",
    cpus: int | None = None,
    retries: int = 3,
) -> list[Run]:
    """Find the measured bound of each run on a Ray cluster, as `study.find_bounds` does.

    A search whose worker is lost is given to another worker and resumes after the last finished batch in `root`. If a
    run's worker does not see `root`, the search runs in this process after the others, and a message says so.

    Args:
        runs, study, root, failures, cache, accelerator, progress: as for `study.find_bounds`
        address: address of the cluster, see `cluster.connect`
        cpus: CPUs of each task; None for an even share of a machine
        retries: number of times that a run whose worker or machine is lost is given to another one

    Returns:
        the finished inversions, in the order of `runs`

    Raises:
        AfterimageError: the cluster cannot be reached, or lacks the requested resources
        Stopped: SIGTERM or Ctrl-C while workers search; finished batches are kept
    """
    if not runs:
        return []
    progress, root = of_caller(progress), Path(root).resolve()
    options = {"cache": cache and Path(cache).resolve(), "accelerator": accelerator}
    log = partial(progress, done=1, total=1)
    found: dict[int, list[Run]] = {}
    lost = dict.fromkeys(range(len(runs)), 0)
    unseen: list[int] = []
    with connect(address, log) as ray, graceful_shutdown() as stop:
        sizes = [group_bytes([run.config]) for run in runs]
        needs = share_machines(sizes, ray.nodes(), accelerator=accelerator, cpus=cpus, log=log)
        messages, search = messages_here(ray), ray.remote(worker.find_bound)
        tasks: dict[Any, int] = {}

        def submit(number: int) -> None:
            run, need = runs[number], needs[number]
            task = search.options(max_retries=0, **need).remote(
                number, run.name, study, str(root), folder=identify(str(root), run.config),
                threads=need["num_cpus"], options=options, messages=messages, **worker.driver_context(),
            )  # fmt: skip
            tasks[task] = number
            progress(f"waits for {describe(need)}: the bound of {run.name}", 0, 1, group=_title(number, runs))

        def end(task: Any, number: int) -> None:
            run = runs[number]
            try:
                answer = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                if concerns(error.cause or error):
                    raise
                failures.append(as_error(error.cause or error, f"the measured bound of {run.name}"))
            except ray.exceptions.RayError as error:
                lost[number] += 1
                if lost[number] <= retries:
                    log(
                        f"{run.name}: the worker was lost: retry {lost[number]} of {retries}, from the last batch"
                    )
                    submit(number)
                else:
                    why = f"{type(error).__name__}: {error!s:.200}"
                    failures.append(
                        AfterimageError(
                            f"the measured bound of {run.name}: the worker was lost {lost[number]} times ({why})"
                        )
                    )
            else:
                if answer is None:
                    log(
                        f"{run.name}: the worker does not see {shown(root)}: its bound is found here, after the "
                        "others"
                    )
                    unseen.append(number)
                else:
                    names, own = answer
                    failures.extend(own)
                    found[number] = [Run(root / name) for name in names]

        try:
            for number in range(len(runs)):
                submit(number)
            while tasks:
                stop.check()
                time.sleep(TICK)
                ended = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)[0]
                for number, what, done, total, figures in ray.get(messages.take.remote()):
                    progress(what, done, total, group=_title(number, runs), **figures)
                for task in ended:
                    end(task, tasks.pop(task))
        finally:
            for task in tasks:
                ray.cancel(task, recursive=False)
            ray.kill(messages)
    for number in unseen:
        found[number] = find_bounds([runs[number]], study, root, failures, progress=progress, **options)
    return [run for number in sorted(found) for run in found[number]]


def _title(number: int, runs: Sequence[Run]) -> str:
    return f"[{number + 1}/{len(runs)}]"
