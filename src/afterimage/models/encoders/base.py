"""What every encoder is: frozen, and without gradients unless asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from afterimage.config import AfterimageError


class Frozen(nn.Module):
    """A module that stays in eval mode, its batch statistics too; `_gradients` says whether features may have them."""

    _gradients = False

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside this context the features can be differentiated with respect to the images."""
        before, self._gradients = self._gradients, True
        try:
            yield
        finally:
            self._gradients = before

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode."""
        return super().train(False)


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """`(height, width)` from one number or two."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise AfterimageError(f"image_size must be one whole number greater than 0, or two, got {size!r}")
    return pair
