"""The base class of encoders: frozen, and without gradients unless requested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


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
