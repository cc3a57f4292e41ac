"""The closed-form linear solution, and a network that learns what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.decoders.base import Decoder, Window, resize
from afterimage.decoders.linear import LinearDecoder, pad

GAIN = 3.2
"""Divided by the width it scales the correction: Adam's first steps are as large as the learning rate whatever the
gradient, and would undo more of the linear solution than they mend."""

MOST_INPUTS = 1728
"""The linear part reads the largest neighbourhood, up to 7x7, with no more values than this (192 channels in 3x3)."""

ROWS_PER_INPUT = 200
"""Five times fewer than `LinearDecoder` takes: 0.03 dB less before training, at a fifth of the time."""

WINDOW = 28
"""Maps with more locations a side are trained on windows of a quarter of the map, but no smaller than this."""


class ResidualDecoder(Decoder):
    """Starts as a linear decoder, fitted in closed form, and adds a learned correction that starts at zero.

    The linear part is `LinearDecoder` on the largest neighbourhood that `MOST_INPUTS` allows. The correction reads
    standardised features (channel means and deviations are measured during the closed-form pass), refines them with
    residual blocks without normalisation (as EDSR, Lim et al. 2017) and, like the linear part, gives every location
    its block of pixels (sub-pixel convolution, Shi et al. 2016): nothing runs at the picture's own size.

    Large maps are trained window by window, an optimizer step each: neighbouring locations tell nearly the same, so
    four steps on a quarter of the map each bring much more than one step on all of it, in the same time.
    """

    closed_form = True
    size_option = "width"
    # On deep layers the linear part alone, from 3x3 neighbourhoods, is larger than most sizes asked for.
    smaller: ClassVar = {"kernel": 1}

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        width: int | None = None,
        blocks: int = 2,
        kernel: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(specs, image_size)
        channels = self.spec.channels
        width = width or min(128, max(64, channels // 2))
        kernel = kernel or next((k for k in (7, 5) if channels * k * k <= MOST_INPUTS), 3)
        self.base = LinearDecoder(specs, image_size, kernel=kernel, rows_per_input=ROWS_PER_INPUT)
        self.window = max(WINDOW, min(self.spec.height, self.spec.width) // 2) if window is None else window
        self.margin = max(2, kernel // 2)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.stem = nn.Conv2d(channels, width, kernel_size=3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = _zeroed(nn.Conv2d(width, self.base.outputs, kernel_size=3, padding=1))

    def decode(self, features: Tensor, window: Window | None = None) -> Tensor:
        # The margin gives a window's border the neighbours it has in the whole map.
        m = self.margin
        maps = pad(features, m)
        if window is not None:
            top, left, height, width = window
            maps = maps[..., top : top + height + 2 * m, left : left + width + 2 * m]
        linear = self.base.blocks(_inner(maps, m - self.base.kernel // 2))
        maps = (maps - self.mean[:, None, None]) * self.scale[:, None, None]
        maps = self.blocks(self.stem(maps.to(memory_format=torch.channels_last)))
        pictures = self.base.unblock(linear + GAIN / self.stem.out_channels * _inner(self.head(maps), m))
        return pictures if window is not None else resize(pictures, self.image_size)

    def windows(self, generator: torch.Generator) -> list[Window | None]:
        """A random quarter of the map at a time, four times; all of it where it is small or blocks are not whole."""
        h, w = self.spec.height, self.spec.width
        whole = (h * self.base.block[0], w * self.base.block[1]) == tuple(self.image_size)
        height, width = min(h, self.window), min(w, self.window)
        if not whole or (height, width) == (h, w):
            return [None]

        def place(side: int, part: int) -> int:
            return int(torch.randint(side - part + 1, (), generator=generator))

        return [
            (place(h, height), place(w, width), height, width) for _ in range(round(h * w / height / width))
        ]

    def prepare(self, pictures: int, seed: int) -> int:
        self._count, self._sum, self._squares = 0, 0, 0
        return self.base.prepare(pictures, seed)

    @torch.no_grad()
    def accumulate(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        self.base.accumulate(features, images, validation=validation)
        if not validation:
            maps = features[0].float()
            self._count += maps.numel() // maps.shape[1]
            self._sum = self._sum + maps.sum((0, 2, 3)).double()
            self._squares = self._squares + maps.square().sum((0, 2, 3)).double()

    @torch.no_grad()
    def solve(self) -> list[str]:
        mean = self._sum / self._count
        deviation = (self._squares / self._count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(1 / deviation.clamp(min=1e-4 * float(deviation.mean()) + 1e-12))
        notes = self.base.solve()
        return notes if self.base.kernel > 1 else [*notes, "its linear part reads 1x1 neighbourhoods"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an activation, added to their input; the second starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.second = _zeroed(nn.Conv2d(width, width, kernel_size=3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.second(F.silu(self.first(maps)))


def _zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


def _inner(maps: Tensor, margin: int) -> Tensor:
    return maps[..., margin : maps.shape[-2] - margin, margin : maps.shape[-1] - margin]
