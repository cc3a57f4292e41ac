"""Transformer blocks, then transposed convolutions: the published study's decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.models.decoders.transposed import TransposedDecoder
from afterimage.models.layers.attention import TransformerBlock


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
