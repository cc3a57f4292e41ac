"""Work spread over the cores, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from afterimage.runs import cores

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
