"""Decoder that predicts wavelet sub-bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.models.decoders.transposed import UpsamplingDecoder
from afterimage.models.layers.blocks import UpConv2x, conv_bn_relu, resize


class WaveletDecoder(UpsamplingDecoder):
    """Decoder that predicts a small image and, level by level, the Haar detail bands that double its size.

    One orthonormal Haar level (Mallat 1989) turns an approximation `(B, 3, h, w)` and its horizontal,
    vertical and diagonal details `(B, 9, h, w)` into `(B, 3, 2h, 2w)`. Between levels a transposed
    convolution (4x4, stride 2), batch norm and ReLU refine the maps that details are predicted from, and
    halve their channels. Only the inverse transform runs at the image's own size.

    The arguments are those of `UpsamplingDecoder`.
    """

    def build(self, widths: Sequence[int]) -> None:
        self.trunk = conv_bn_relu(nn.Conv2d(widths[0], widths[0], kernel_size=3, padding=1))
        self.approximation = nn.Conv2d(widths[0], 3, kernel_size=3, padding=1)
        self.refine, self.details = nn.ModuleList(), nn.ModuleList()
        self.levels = len(widths) - 1
        for level in range(self.levels):
            if level:
                self.refine.append(conv_bn_relu(UpConv2x(widths[level - 1], widths[level])))
            self.details.append(nn.Conv2d(widths[level], 9, kernel_size=3, padding=1))

    def decode(self, features: Tensor) -> Tensor:
        maps = self.trunk(self.channel_projection(features))
        # Each inverse level halves the mean, so the first approximation is 2^levels times an image.
        image = self.approximation(maps) * 2**self.levels
        for level, details in enumerate(self.details):
            if level:
                maps = self.refine[level - 1](maps)
            image = inverse_haar(image, details(maps))
        return resize(image, self.canvas.size)


def inverse_haar(
    approximation: Float[Tensor, "batch c h w"], details: Float[Tensor, "batch c*3 h w"]
) -> Float[Tensor, "batch c 2*h 2*w"]:
    """Apply one level of the orthonormal inverse Haar transform.

    Args:
        approximation: `(B, C, h, w)`
        details: horizontal, vertical and diagonal bands `(B, 3C, h, w)`

    Returns:
        `(B, C, 2h, 2w)`
    """
    horizontal, vertical, diagonal = details.chunk(3, dim=1)
    top = torch.stack(
        (approximation + horizontal + vertical + diagonal, approximation - horizontal + vertical - diagonal),
        -1,
    )
    bottom = torch.stack(
        (approximation + horizontal - vertical - diagonal, approximation - horizontal - vertical + diagonal),
        -1,
    )
    b, c, h, w = approximation.shape
    return torch.stack((top, bottom), dim=3).reshape(b, c, 2 * h, 2 * w) / 2
