"""Repeated attempts at work that runs out of memory, with fewer images at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from afterimage.config import AfterimageError
from afterimage.runtime.failures import out_of_memory

Result = TypeVar("Result")


def retry_with_smaller_batch(work: Callable[[int], Result], size: int, what: str) -> tuple[Result, int]:
    """Call `work(size)`, and halve the size until the work fits into memory.

    Args:
        work: function of the batch size
        size: first batch size
        what: name of the work, for the message

    Returns:
        the result, and the batch size that fitted

    Raises:
        AfterimageError: a single image does not fit
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
        # The failed frames are gone now, so their tensors can be freed.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
