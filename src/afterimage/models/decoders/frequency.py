"""Decoder that adds a low-pass and a high-pass branch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.models.decoders.transposed import UpsamplingDecoder
from afterimage.models.layers.blocks import UpConv2x, conv_bn_relu, resize


class FrequencyDecoder(UpsamplingDecoder):
    """Decoder that adds a smooth image from one branch and details from another.

    The low-pass branch convolves at the features' own size, predicts RGB and enlarges it bilinearly. The
    high-pass branch upsamples by transposed convolutions (4x4, stride 2, halving the channels), each followed
    by channel and spatial attention (CBAM, Woo et al. 2018). Its low frequencies, which survive a reduction
    to the features' size, are subtracted from its output.

    The arguments are those of `UpsamplingDecoder`.
    """

    def build(self, widths: Sequence[int]) -> None:
        self.low = nn.Sequential(
            *conv_bn_relu(nn.Conv2d(widths[0], widths[0], kernel_size=3, padding=1)),
            nn.Conv2d(widths[0], 3, kernel_size=3, padding=1),
        )
        stages: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            stages += [*conv_bn_relu(UpConv2x(wide, narrow)), ChannelAttention(narrow), SpatialAttention()]
        self.high = nn.Sequential(*stages, nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1))

    def decode(self, features: Tensor) -> Tensor:
        features = self.channel_projection(features)
        low = F.interpolate(self.low(features), self.canvas.size, mode="bilinear", align_corners=False)
        high = resize(self.high(features), self.canvas.size)
        return low + high - _blur(high, (self.spec.height, self.spec.width))


def _blur(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Reduce images to the features' size and enlarge them again: structure coarser than a cell remains."""
    small = F.adaptive_avg_pool2d(images, size)
    return F.interpolate(small, images.shape[-2:], mode="bilinear", align_corners=False)


class ChannelAttention(nn.Module):
    """Channel attention: a factor in (0, 1) per channel, from its mean and its maximum (CBAM, eq. 2)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.weigh = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.weigh(maps.mean((2, 3))) + self.weigh(maps.amax((2, 3)))
        return maps * weights.sigmoid()[:, :, None, None]


class SpatialAttention(nn.Module):
    """Spatial attention: a factor in (0, 1) per location, from the mean and maximum there (CBAM, eq. 3)."""

    def __init__(self, kernel: int = 7) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(2, 1, kernel_size=kernel, padding=kernel // 2)

    def forward(self, maps: Tensor) -> Tensor:
        seen = torch.cat((maps.mean(1, keepdim=True), maps.amax(1, keepdim=True)), dim=1)
        return maps * self.weigh(seen).sigmoid()
