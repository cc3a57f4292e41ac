"""Transposed convolutions, with or without a transformer before them: the published study's decoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.decoders.attend import attend
from afterimage.decoders.base import Decoder, Doubling, adapter, resize, stage, stages_between


class TransposedDecoder(Decoder):
    """Stages of 4x4 transposed convolution (stride 2), batch norm and ReLU, halving channels down to 32,
    then a 3x3 convolution to RGB.

    The number of stages is the number of doublings nearest to the picture's size; where that is not exact,
    the last map is resampled bilinearly before the convolution to RGB. With `channels` a 1x1 convolution first
    brings the features to that many.
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
        self.adapter = adapter(self.spec.channels, channels)
        channels = channels or self.spec.channels
        self.channels = channels
        stages = []
        for _ in range(stages_between((self.spec.height, self.spec.width), self.canvas.size)):
            narrower = max(minimum_channels, channels // 2)
            stages.append(stage(Doubling(channels, narrower)))
            channels = narrower
        self.stages = nn.Sequential(*stages)
        self.to_rgb = nn.Conv2d(channels, 3, kernel_size=3, padding=1)

    def decode(self, features: Tensor) -> Tensor:
        return self.upsample(self.adapter(features))

    def upsample(self, features: Tensor) -> Tensor:
        return self.to_rgb(resize(self.stages(features), self.canvas.size))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block (Vaswani et al. 2017; Xiong et al. 2020) on tokens `(B, N, C)`.

    Attention is fused: memory grows linearly with N.
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, c = tokens.shape
        q, k, v = (
            self.qkv(self.norm1(tokens)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )
        attended = attend(q, k, v)
        tokens = tokens + self.projection(attended.transpose(1, 2).reshape(b, n, c))
        return tokens + self.mlp(self.norm2(tokens))


class AttentionDecoder(TransposedDecoder):
    """The published study's decoder: transformer blocks on the feature tokens, then `TransposedDecoder`.

    Four blocks, eight heads (fewer where the channels do not divide by eight), MLP ratio 4. With `channels` a 1x1
    convolution first brings the features to that many.
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
        features = self.adapter(features)
        tokens = self.blocks(features.flatten(2).transpose(1, 2))
        return self.upsample(tokens.transpose(1, 2).reshape(features.shape))
