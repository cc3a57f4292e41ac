"""Decode by transposed convolutions, as the published study's decoder does after its attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.models.decoders.base import Decoder
from afterimage.models.layers.blocks import UpConv2x, channel_projection, conv_bn_relu, resize, stages_between


class TransposedDecoder(Decoder):
    """Doubles the feature map's size stage by stage, then turns it into RGB by a 3x3 convolution.

    A stage is a 4x4 transposed convolution of stride 2, batch norm and ReLU, and halves the channels. There are as
    many stages as doublings come nearest to the image's size; where that is not exact, the last map is resampled
    bilinearly before the convolution to RGB.

    Args:
        specs: the shape of the features; one.
        image_size: height and width of the images in pixels.
        channels: channels to begin with, brought about by a 1x1 convolution; by default the features' own.
        minimum_channels: below so many they are not halved.
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
        """`(B, channels, h, w)` to the canvas `(B, 3, H, W)`."""
        return self.to_rgb(resize(self.stages(features), self.canvas.size))
