"""Out of memory: the same work again, on fewer images at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from afterimage.config import AfterimageError
from afterimage.runtime.failures import out_of_memory

Result = TypeVar("Result")


def retry_with_smaller_batch(work: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """`work(size)`, with half the size for as long as it runs out of memory; also returns the size that went.

    Raises `AfterimageError` where one image at a time is too much.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        if size <= 1:
            raise AfterimageError(f"{what}: out of memory even with one image at a time ({reason:.200})")
        size = (size + 1) // 2
        # The frames that failed are gone now, and what they held with them.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
