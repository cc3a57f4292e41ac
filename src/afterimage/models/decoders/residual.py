"""Decoder that adds a learned correction to the closed-form linear solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from afterimage.config import FeatureSpec
from afterimage.models.decoders.base import Decoder, FeatureCrop
from afterimage.models.decoders.linear import LinearDecoder, pad
from afterimage.models.layers.blocks import pixel_shuffle, pixel_unshuffle, resize, to_float64_device
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup

GAIN = 0.03
"""Factor of the correction. Adam's first steps have the size of the learning rate whatever the gradient is,
and without this factor would damage the linear solution more than they improve it.
"""

MAX_LINEAR_INPUTS = 1728
"""Largest number of feature values from which the linear part predicts a location: 192 channels in 3x3."""

ROWS_PER_INPUT = 200
"""Training locations for each input of the linear part. A fifth of `LinearDecoder`'s default takes a fifth of
the time and costs 0.03 dB before training.
"""

WINDOW = 64
"""Side in pixels of the windows on which decoders train, one optimizer step each."""

CELL = 2
"""Side in pixels of a cell of the grid on which most of the correction is computed."""

TRUNK, TRUNK_PIXELS, TRUNK_MARGIN = 2, 64, 2
"""Number of residual blocks on the features' own grid, number of pixels of a location (8x8) for which they
are used, and number of locations around a window that they see. At 8x8 their gain is worth their cost, at 4x4
and 16x16 it is not (docs/LOG.md).
"""

EMA_EXPONENT = 8
"""Exponent of the weight average: after n steps, step i has a weight of about (i / n) ** EMA_EXPONENT."""

PIXEL_SCALE = 4
"""Factor that brings pixels in [0, 1] to about the scale of standardised features."""


class ResidualDecoder(Decoder):
    """Linear decoder fitted in closed form, plus a learned correction that starts at zero.

    The linear part is `LinearDecoder` on the largest neighbourhood, up to 7x7, that `MAX_LINEAR_INPUTS` allows. The
    correction reads the linear part's image and the features, standardised by channel means and deviations
    from the closed-form pass. It works on a grid with cells of 2x2 pixels: where one location yields many
    pixels, the linear image lacks edges, which the neighbouring pixels across the borders of blocks reveal. A
    convolution and a sub-pixel shuffle (Shi et al. 2016) bring the features to that grid; residual blocks
    without normalisation (EDSR, Lim et al. 2017) follow. With `trunk`, such blocks on the features' own grid
    come first.

    The decoder trains window by window, with one optimizer step each: neighbouring pixels carry nearly the
    same information, so a large number of steps on small parts improves the decoder much more than one step
    on everything in the same time. Decoding uses an average of the weights over the last steps, which covers
    more steps the longer training lasts (the power-function average of Karras et al. 2024, section 3.1). It
    can be used at any time, without waiting for the learning rate to fall.

    Args:
        specs: measured shapes of the features
        image_size: `(height, width)` of the images in pixels
        width: channels of the correction
        blocks: number of residual blocks on the grid of pixels
        trunk: number of residual blocks on the features' own grid; None takes `TRUNK` if a location yields
            8x8 pixels, else 0
        kernel: side in locations of the linear part's neighbourhood; None takes the largest that
            `MAX_LINEAR_INPUTS` allows
        window: side in pixels of the training windows
    """

    closed_form = True
    # `GAIN` makes the gradients small: a weight decay of 1e-5, which is added to them, would dominate.
    uses_weight_decay = False
    size_option = "width"
    # On deep layers the linear part alone exceeds most requested sizes if it reads 3x3 neighbourhoods.
    fallback_options: ClassVar = {"kernel": 1}

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        width: int = 32,
        blocks: int = 2,
        trunk: int | None = None,
        kernel: int | None = None,
        window: int = WINDOW,
    ) -> None:
        super().__init__(specs, image_size)
        channels = self.spec.channels
        kernel = kernel or next((k for k in (7, 5) if channels * k * k <= MAX_LINEAR_INPUTS), 3)
        self.base = LinearDecoder(specs, image_size, kernel=kernel, rows_per_input=ROWS_PER_INPUT)
        self.window = tuple(max(2, round(window / side)) for side in self.base.block)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        if trunk is None:
            trunk = TRUNK if math.prod(self.base.block) == TRUNK_PIXELS else 0
        self.margin = max(TRUNK_MARGIN if trunk else 0, kernel // 2)
        self.correction = RefinementCNN(channels, width, blocks, trunk, self.base.block, self.margin)
        self.register_buffer("average", self._flat())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def decode(self, features: Tensor, window: FeatureCrop | None = None) -> Tensor:
        # The margin gives locations at a window's border the same neighbours as in the whole map.
        maps = pad(features, self.margin)
        if window is not None:
            top, left, height, width = window
            maps = maps[..., top : top + height + 2 * self.margin, left : left + width + 2 * self.margin]
        linear = self.base.unblock(self.base.blocks(_inner(maps, self.margin - self.base.kernel // 2)))
        maps = (maps - self.mean[:, None, None]) * self.scale[:, None, None]
        images = linear + GAIN * self._correct(maps, linear)
        return images if window is not None else resize(images, self.canvas.size)

    def _correct(self, maps: Tensor, linear: Tensor) -> Tensor:
        """Compute the correction; outside training, with the averaged weights."""
        if self.training:
            return self.correction(maps, linear)
        named = dict(self.correction.named_parameters())
        parts = self.average.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
        return functional_call(self.correction, weights, (maps, linear))

    @torch.no_grad()
    def _flat(self) -> Tensor:
        """Return the correction's parameters as one vector."""
        return torch.cat([p.flatten() for p in self.correction.parameters()])

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        self.steps += 1
        self.average.lerp_(self._flat(), 1 - (1 - 1 / self.steps) ** (EMA_EXPONENT + 1))

    def feature_crops(self, generator: torch.Generator) -> list[FeatureCrop | None]:
        """Draw random windows that cover the map's area about once.

        Returns:
            the windows, or `[None]` for the whole map if windows do not fit
        """
        (top, bottom), (left, right) = self.canvas.rows.cells, self.canvas.columns.cells
        h, w = bottom - top, right - left
        height, width = min(h, self.window[0]), min(w, self.window[1])
        if not self.canvas.whole or (height, width) == (h, w):
            return [None]

        def place(first: int, side: int, part: int) -> int:
            return first + int(torch.randint(side - part + 1, (), generator=generator))

        return [
            (place(top, h, height), place(left, w, width), height, width)
            for _ in range(round(h * w / height / width))
        ]

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        self._ranks = ranks
        # One tensor: the number of locations, then each channel's sum and sum of squares.
        self._sums = to_float64_device(self.mean).new_zeros(1 + 2 * self.spec.channels, dtype=torch.float64)
        return self.base.begin_fit(images, seed, ranks)

    @torch.no_grad()
    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        self.base.partial_fit(features, images, validation=validation)
        if not validation:
            # Sum in float64 from the start: far from zero the variance is a small difference of large
            # numbers.
            maps = to_float64_device(features[0]).double()
            self._sums[0] += maps.numel() // maps.shape[1]
            self._sums[1:] += torch.cat([maps.sum((0, 2, 3)), maps.square().sum((0, 2, 3))])

    @property
    def fit_bytes(self) -> int:
        return self.base.fit_bytes

    def fit_macs(self, images: int) -> int:
        return self.base.fit_macs(images)

    @torch.no_grad()
    def finalize_fit(self) -> list[str]:
        self._ranks.sum([self._sums])
        mean, squares = (self._sums[1:] / self._sums[0]).chunk(2)
        deviation = (squares - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(1 / deviation.clamp(min=1e-4 * float(deviation.mean()) + 1e-12))
        notes = self.base.finalize_fit()
        return notes if self.base.kernel > 1 else [*notes, "its linear part reads 1x1 neighbourhoods"]


class RefinementCNN(nn.Module):
    """Network that predicts the missing part of a linear decoder's images from them and the features."""

    def __init__(
        self, channels: int, width: int, blocks: int, trunk: int, block: tuple[int, int], margin: int
    ) -> None:
        super().__init__()
        self.block, self.margin = block, margin
        self.cell = tuple(math.gcd(CELL, side) for side in block)
        self.cells = tuple(side // cell for side, cell in zip(block, self.cell, strict=True))
        inside = 3 * math.prod(self.cell)
        self.trunk = None
        if trunk:
            self.trunk = nn.Sequential(
                nn.Conv2d(channels, 2 * width, kernel_size=3, padding=1),
                *(ResidualBlock(2 * width) for _ in range(trunk)),
                _zero_init(nn.Conv2d(2 * width, 3 * math.prod(block), kernel_size=3, padding=1)),
            )
        self.from_features = nn.Conv2d(channels, width * math.prod(self.cells), kernel_size=1)
        self.from_pixels = nn.Conv2d(inside, width, kernel_size=3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = _zero_init(nn.Conv2d(width, inside, kernel_size=3, padding=1))

    def forward(self, maps: Tensor, images: Tensor) -> Tensor:
        """Predict the correction, before scaling by `GAIN`.

        Args:
            maps: standardised features `(B, C, h, w)`, including a border of `margin` locations
            images: the linear decoder's images, without a margin

        Returns:
            a correction with the shape of the images
        """
        inner, missing = _inner(maps, self.margin), torch.zeros_like(images)
        if self.trunk is not None:
            refined = self.trunk(maps.to(memory_format=torch.channels_last))
            missing = pixel_shuffle(_inner(refined, self.margin), self.block)
        pixels = pixel_unshuffle(PIXEL_SCALE * (images + GAIN * missing - 0.5), self.cell)
        pixels = self.from_pixels(pixels.to(memory_format=torch.channels_last))
        pixels = pixels + pixel_shuffle(self.from_features(inner), self.cells)
        return missing + pixel_shuffle(self.head(self.blocks(pixels)), self.cell)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an activation, added to their input; the second starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.second = _zero_init(nn.Conv2d(width, width, kernel_size=3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.second(F.silu(self.first(maps)))


def _zero_init(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


def _inner(maps: Tensor, margin: int) -> Tensor:
    return maps[..., margin : maps.shape[-2] - margin, margin : maps.shape[-1] - margin]
