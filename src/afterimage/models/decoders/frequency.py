"""Decoder that adds a low-pass and a high-pass branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.models.decoders.base import Decoder
from afterimage.models.layers.blocks import UpConv2x, channel_projection, conv_bn_relu, resize, stages_between


class FrequencyDecoder(Decoder):
    """Decoder that adds a smooth image from one branch and details from another.

    The low-pass branch convolves at the features' own size, predicts RGB and enlarges it bilinearly. The
    high-pass branch upsamples by transposed convolutions (4x4, stride 2, halving the channels), each followed
    by channel and spatial attention (CBAM, Woo et al. 2018). Its low frequencies, which survive a reduction
    to the features' size, are subtracted from its output.

    Args:
        specs: measured shapes of the features
        image_size: `(height, width)` of the images in pixels
        channels: channels to which a 1x1 convolution first brings the features; None keeps theirs
        minimum_channels: smallest number of channels after a halving
    """

    size_option = "channels"

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        channels: int | None = None,
        minimum_channels: int = 32,
    ) -> None:
        super().__init__(specs, image_size)
        self.channel_projection = channel_projection(self.spec.channels, channels)
        width = channels or self.spec.channels
        self.low = nn.Sequential(
            *conv_bn_relu(nn.Conv2d(width, width, kernel_size=3, padding=1)),
            nn.Conv2d(width, 3, kernel_size=3, padding=1),
        )
        stages: list[nn.Module] = []
        for _ in range(stages_between((self.spec.height, self.spec.width), self.canvas.size)):
            narrower = max(minimum_channels, width // 2)
            stages += [
                *conv_bn_relu(UpConv2x(width, narrower)),
                ChannelAttention(narrower),
                SpatialAttention(),
            ]
            width = narrower
        self.high = nn.Sequential(*stages, nn.Conv2d(width, 3, kernel_size=3, padding=1))

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
