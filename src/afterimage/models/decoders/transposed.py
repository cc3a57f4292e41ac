"""Decoder of transposed convolutions, as the published study's decoder has after its attention."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.models.decoders.base import Decoder
from afterimage.models.layers.blocks import UpConv2x, channel_projection, conv_bn_relu, resize, stages_between


class UpsamplingDecoder(Decoder):
    """Base of decoders that double the feature map's size stage by stage; subclasses implement `build`.

    Each stage halves the channels. The number of stages is the number of doublings that comes nearest to the
    image's size.

    Args:
        specs: shape of the features; exactly one.
        image_size: height and width of the images in pixels.
        channels: channels to which a 1x1 convolution first brings the features; None keeps theirs.
        minimum_channels: smallest number of channels of a stage.
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
        self.channels = channels or self.spec.channels
        widths = [self.channels]
        for _ in range(stages_between((self.spec.height, self.spec.width), self.canvas.size)):
            widths.append(max(minimum_channels, widths[-1] // 2))
        self.build(widths)

    @abstractmethod
    def build(self, widths: Sequence[int]) -> None:
        """Create the layers, for maps of `widths[i]` channels after i stages."""


class TransposedDecoder(UpsamplingDecoder):
    """Decoder that upsamples by transposed convolutions, then a 3x3 convolution to RGB.

    A stage is a 4x4 transposed convolution of stride 2, batch norm and ReLU. If the sizes differ, the last map
    is resampled bilinearly before the convolution to RGB. The arguments are those of `UpsamplingDecoder`.
    """

    def build(self, widths: Sequence[int]) -> None:
        pairs = itertools.pairwise(widths)
        self.stages = nn.Sequential(*(conv_bn_relu(UpConv2x(wide, narrow)) for wide, narrow in pairs))
        self.to_rgb = nn.Conv2d(widths[-1], 3, kernel_size=3, padding=1)

    def decode(self, features: Tensor) -> Tensor:
        return self.upsample(self.channel_projection(features))

    def upsample(self, features: Tensor) -> Tensor:
        """Turn `(B, channels, h, w)` into the canvas `(B, 3, H, W)`."""
        return self.to_rgb(resize(self.stages(features), self.canvas.size))
