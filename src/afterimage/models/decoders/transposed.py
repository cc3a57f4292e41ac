"""The published study's decoder (transformer blocks, then transposed convolutions), and its second half alone."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.models.decoders.base import Decoder
from afterimage.models.layers.attention import TransformerBlock
from afterimage.models.layers.blocks import UpConv2x, conv_bn_relu, resize


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
        self.channel_projection = (
            nn.Identity() if channels is None else nn.Conv2d(self.spec.channels, channels, kernel_size=1)
        )
        self.channels = channels or self.spec.channels
        widths = [self.channels]
        doublings = math.log2(math.sqrt(math.prod(self.canvas.size) / self.spec.locations))
        for _ in range(max(0, round(doublings))):
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


class AttentionDecoder(TransposedDecoder):
    """The published study's decoder: transformer blocks on the feature tokens, then `TransposedDecoder`.

    Args:
        specs: measured shapes of the features
        image_size: `(height, width)` of the images in pixels
        depth: number of transformer blocks
        heads: number of attention heads; reduced to their greatest common divisor with the number of channels
        mlp_ratio: ratio of the MLP's hidden channels to the channels
        channels: channels to which a 1x1 convolution first brings the features; None keeps theirs
        minimum_channels: smallest number of channels of an upsampling stage
    """

    size_option = "channels"
    size_step = 8
    fine_option = "mlp_ratio"

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        depth: int = 4,
        heads: int = 8,
        mlp_ratio: float = 4,
        channels: int | None = None,
        minimum_channels: int = 32,
    ) -> None:
        super().__init__(specs, image_size, channels=channels, minimum_channels=minimum_channels)
        heads = math.gcd(heads, self.channels)
        hidden = max(1, round(mlp_ratio * self.channels))
        self.blocks = nn.Sequential(*(TransformerBlock(self.channels, heads, hidden) for _ in range(depth)))

    def decode(self, features: Tensor) -> Tensor:
        features = self.channel_projection(features)
        tokens = self.blocks(features.flatten(2).transpose(1, 2))
        return self.upsample(tokens.transpose(1, 2).reshape(features.shape))
