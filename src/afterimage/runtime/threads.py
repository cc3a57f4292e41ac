"""Threads: how many cores there are, and work spread over them in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    total: int,
    what: str,
    progress: Progress | None,
    ahead: int = 0,
) -> Iterator[Result]:
    """`map(work, items)` on all cores, in order, `ahead` items ahead or a few; reports `(what, done, total)`.

    Threads: Pillow, NumPy and hashlib let go of the interpreter lock while they work, and threads need no
    guard around the caller's script.
    """
    workers = cores()
    items = iter(items)
    pending: deque[Future[Result]] = deque()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            pending.extend(pool.submit(work, item) for item in islice(items, max(ahead, 4 * workers)))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(items, 1))
                done += 1
                if progress is not None:
                    progress(what, done, total)
                yield result
        finally:
            for future in pending:
                future.cancel()


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait for others. Call it before torch is imported; see Notes.

    The command line calls it. By default a waiting thread keeps its core busy, which takes time from whoever shares
    that core: another program, or the other half of it. Some microseconds of that pay, since work in many small steps
    is then not slowed by going to sleep after each. Sets `OMP_WAIT_POLICY` and `GOMP_SPINCOUNT`, unless the first is
    set already.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
