"""Decoder of transposed convolutions, as the published study's decoder has after its attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.models.decoders.base import Decoder
from afterimage.models.layers.blocks import UpConv2x, channel_projection, conv_bn_relu, resize, stages_between


class TransposedDecoder(Decoder):
    """Decoder that doubles the feature map's size stage by stage, then a 3x3 convolution to RGB.

    A stage is a 4x4 transposed convolution of stride 2, batch norm and ReLU, and halves the channels. The
    number of stages is the number of doublings that comes nearest to the image's size; if the sizes differ,
    the last map is resampled bilinearly before the convolution to RGB.

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
        channels = channels or self.spec.channels
        self.channels = channels
        stages = []
        for _ in range(stages_between((self.spec.height, self.spec.width), self.canvas.size)):
            narrower = max(minimum_channels, channels // 2)
            stages.append(conv_bn_relu(UpConv2x(channels, narrower)))
            channels = narrower
        self.stages = nn.Sequential(*stages)
        self.to_rgb = nn.Conv2d(channels, 3, kernel_size=3, padding=1)

    def decode(self, features: Tensor) -> Tensor:
        return self.upsample(self.channel_projection(features))

    def upsample(self, features: Tensor) -> Tensor:
        """Turn `(B, channels, h, w)` into the canvas `(B, 3, H, W)`."""
        return self.to_rgb(resize(self.stages(features), self.canvas.size))
