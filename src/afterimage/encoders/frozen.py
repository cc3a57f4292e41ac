"""What every encoder is: frozen, and without gradients unless asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


class Frozen(nn.Module):
    """A module that stays in eval mode, its batch statistics too; `_gradients` says whether features may have them."""

    _gradients = False

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside this context the features can be differentiated with respect to the pictures."""
        before, self._gradients = self._gradients, True
        try:
            yield
        finally:
            self._gradients = before

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode."""
        return super().train(False)
