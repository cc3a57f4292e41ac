"""The base class of encoders: frozen, and without gradients unless requested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance of ITU-R BT.601, as in Pillow's conversion to grey."""


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images for a network.

    Args:
        images: `(B, 3, H, W)` in [0, 1]
        mean: means `(1, C, 1, 1)`; if C is 1, images are first converted to their luminance
        std: standard deviations of the same shape
    """
    if mean.shape[1] == 1:
        shares = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        images = (images * shares).sum(1, keepdim=True)
    return (images - mean) / std


class Frozen(nn.Module):
    """A module that stays in evaluation mode, including its batch norms.

    `_gradients` is true while features may have gradients with respect to the images.
    """

    _gradients = False

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Enable gradients of the features with respect to the images in this block."""
        before, self._gradients = self._gradients, True
        try:
            yield
        finally:
            self._gradients = before

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode."""
        return super().train(False)
