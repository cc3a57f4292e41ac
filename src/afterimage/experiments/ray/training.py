"""The Ray executor: training as `queue.train_runs` does it, by the workers of a cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, RunConfig
from afterimage.experiments.queue import RunQueue, groups, report_failures
from afterimage.experiments.ray.connect import cluster
from afterimage.experiments.ray.driver import Driver, Job
from afterimage.experiments.ray.needs import group_bytes, share
from afterimage.experiments.ray.post import Order
from afterimage.runs.files import LEFTOVER, write_atomic
from afterimage.runs.run import Run
from afterimage.runtime.failures import of_caller
from afterimage.runtime.progress import Progress, silent
from afterimage.runtime.signals import graceful_shutdown
from afterimage.training.trainer import CHECKPOINT_SECONDS

RETRIES = 3
FETCH_SECONDS = 60.0


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
    fetch: bool = False,
    retries: int = RETRIES,
    fetch_seconds: float = FETCH_SECONDS,
) -> list[Run]:
    """Train every run that is not done yet on a Ray cluster; returns all of them, as `queue.train_runs` does.

    Each group of runs that are trained together is a task with `cpus` CPUs (and as many threads; by default an even
    share of a machine), a GPU where the cluster has some and `accelerator` allows it, and the memory that its plan
    says. One whose worker or machine is lost is given to another, up to `retries` times, and goes on from its last
    checkpoint. Workers that see `root` write there; from others, and from all with `fetch`, results are fetched when
    a group ends and checkpoints every `fetch_seconds`. `address` is `connect.cluster`'s.
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    progress = of_caller(progress)
    claims = RunQueue(lambda text: progress(text, 1, 1))
    root = Path(root).resolve()
    runs = claims.open(configs, root)
    if claims.waiting:
        with cluster(address, claims.say) as ray, _probe(root) as probe, graceful_shutdown() as stop:
            order = Order(
                number=0,
                attempt=0,
                configs=(),
                digests=(),
                root=str(root),
                probe=probe.name,
                token=probe.read_text(encoding="utf-8"),
                fetch=fetch,
                cwd=os.getcwd(),
                command=tuple(sys.argv),
                environment={k: v for k, v in os.environ.items() if k.startswith("AFTERIMAGE_")},
                cache=None if cache is None else str(Path(cache).resolve()),
                accelerator=accelerator,
                keep=keep,
                threads=1,
                checkpoint_seconds=checkpoint_seconds,
                fetch_seconds=fetch_seconds,
            )
            # All groups, those that are done too: what one gets must not depend on when it is done.
            everything = groups(zip(runs, configs, strict=True))
            needs = share(
                [group_bytes(group.values()) for group in everything],
                ray.nodes(),
                accelerator=accelerator,
                cpus=cpus,
                say=claims.say,
            )
            jobs = [
                Job(number, len(everything), group, need)
                for number, (group, need) in enumerate(zip(everything, needs, strict=True), 1)
            ]
            Driver(ray, claims, jobs, order, progress, retries).work(stop)
        claims.failures += _disagreeing(runs)
    report_failures(claims.failures, failures)
    return runs


@contextlib.contextmanager
def _probe(root: Path) -> Iterator[Path]:
    """A file that only those see who see this very folder."""
    path = root / f".probe-{secrets.token_hex(8)}{LEFTOVER}"
    write_atomic(path, secrets.token_hex(16))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _disagreeing(runs: Sequence[Run]) -> list[AfterimageError]:
    """Machines that were asked for the same images and found others."""
    found: dict[Any, dict[str, Run]] = {}
    for run in runs:
        with contextlib.suppress(AfterimageError):  # a folder that cannot be read is told elsewhere
            if run.state != "done":
                continue
            digest = run.summary.get("data", {}).get("digest")
            found.setdefault(run.config.data, {}).setdefault(digest, run)
    return [
        AfterimageError(
            f"{' and '.join(run.name for run in digests.values())} were trained on different images, although both "
            f"ask for {data.source}: two machines hold different ones. Their scores cannot be compared."
        )
        for data, digests in found.items()
        if len(digests) > 1
    ]
