"""The base class of encoders: frozen, and without gradients unless requested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from afterimage.config import AfterimageError


class Frozen(nn.Module):
    """A module that stays in evaluation mode, batch statistics included.

    `_gradients` says whether features may have gradients with respect to the images.
    """

    _gradients = False

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Let features have gradients with respect to the images inside this block."""
        before, self._gradients = self._gradients, True
        try:
            yield
        finally:
            self._gradients = before

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode."""
        return super().train(False)


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return `(height, width)` from one whole number or two.

    Raises:
        AfterimageError: the size is anything else
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise AfterimageError(f"image_size must be one whole number greater than 0, or two, got {size!r}")
    return pair
