"""Use of the CPU cores: their number, parallel mapping, and idle threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from afterimage.runtime.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    total: int,
    what: str,
    progress: Progress,
) -> Iterator[Result]:
    """Map `work` over `items` in threads on all cores, and yield the results in order.

    Threads suffice, because Pillow, NumPy and hashlib release the interpreter lock while they work. Unlike processes,
    they need no `if __name__ == "__main__"` in the caller's script.

    Args:
        work: the function
        items: its arguments
        total: number of items, for the progress
        what: name of the work, for the progress
        progress: called as `progress(what, done, total)` after each item
    """
    workers = cores()
    items = iter(items)
    pending: deque[Future[Result]] = deque()
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        try:
            pending.extend(pool.submit(work, item) for item in islice(items, 4 * workers))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(items, 1))
                done += 1
                progress(what, done, total)
                yield result
        finally:
            for future in pending:
                future.cancel()


def let_idle_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait for each other. Must be called before torch is imported.

    The command line calls it. By default a waiting thread keeps its core busy, which slows down other programs and
    the other hardware thread of that core. Threads still wait busily for some microseconds, because going to sleep
    after every small step is slow. Sets `OMP_WAIT_POLICY` and `GOMP_SPINCOUNT`, unless the first is already set.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
