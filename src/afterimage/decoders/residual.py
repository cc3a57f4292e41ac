"""The closed-form linear solution, and a network that learns what it leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.config import FeatureSpec
from afterimage.decoders.base import Decoder, resize, stages_between
from afterimage.decoders.linear import LinearDecoder
from afterimage.decoders.wavelet import inverse_haar

GAIN = 0.25
"""Adam's first steps are as large as the learning rate whatever the gradient; the gain keeps them from undoing more
of the linear solution than they mend."""


class ResidualDecoder(Decoder):
    """Starts as `LinearDecoder`, fitted in closed form, and adds a learned correction that starts at zero.

    The correction reads standardised features (channel means and deviations are measured during the closed-form
    pass), refines them with residual blocks without normalisation (as EDSR, Lim et al. 2017) at the features' own
    size, and is composed in the Haar domain, coarse to fine: nothing but the inverse transform runs at the
    picture's own size. The layers that are read off start at zero, so training begins at the linear solution's
    error and can only be kept where it lowers it.
    """

    closed_form = True
    size_option = "width"

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        width: int | None = None,
        blocks: int = 4,
        minimum_width: int = 32,
        kernel: int = 3,
    ) -> None:
        super().__init__(specs, image_size)
        levels = stages_between((self.spec.height, self.spec.width), image_size)
        width = width or min(128, max(64, self.spec.channels // 2))
        self.base = LinearDecoder(specs, image_size, kernel=kernel)
        self.register_buffer("mean", torch.zeros(self.spec.channels))
        self.register_buffer("scale", torch.ones(self.spec.channels))
        self.stem = nn.Conv2d(self.spec.channels, width, kernel_size=3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.approximation = _zeroed(nn.Conv2d(width, 3, kernel_size=3, padding=1))
        self.refine, self.details = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            if level:
                narrower = max(minimum_width, width // 2)
                self.refine.append(nn.ConvTranspose2d(width, narrower, kernel_size=4, stride=2, padding=1))
                width = narrower
            self.details.append(_zeroed(nn.Conv2d(width, 9, kernel_size=3, padding=1)))
        self.levels = levels

    def decode(self, features: Tensor) -> Tensor:
        maps = (features - self.mean[:, None, None]) * self.scale[:, None, None]
        maps = self.blocks(self.stem(maps.to(memory_format=torch.channels_last)))
        correction = self.approximation(maps) * 2**self.levels
        for level, details in enumerate(self.details):
            if level:
                maps = self.refine[level - 1](F.silu(maps))
            correction = inverse_haar(correction, details(maps))
        return self.base.decode(features) + GAIN * resize(correction, self.image_size)

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
        return self.base.solve()


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
