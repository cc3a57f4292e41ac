"""Parametrisations of the images during a search: a start plus a correction computed from parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch 3 height width"]


class Parametrisation(ABC):
    """Images as `start + correction(parameters)`, with one row of parameters for each image.

    At `initial` the correction is 0. Values may leave [0, 1] during the search and are clamped at its end: a
    clamp during the search would give L-BFGS gradients of a different objective, and it would go astray.

    Only `Prior` uses the `seed`, for its weights and noise, and only `Fourier` the `spectrum`, the expected size of
    the correction by colour and frequency.
    """

    learning_rate: float
    """Adam's learning rate, and the root mean square of L-BFGS's first step."""

    def __init__(self, start: Images, seed: int, spectrum: Spectrum | None = None) -> None:
        self.start = start

    @property
    @abstractmethod
    def initial(self) -> Tensor:
        """Parameters of the start itself, `(B, ...)`."""

    @abstractmethod
    def correction(self, parameters: Tensor) -> Tensor:
        """Return the correction that is added to the start, `(B, 3, H, W)`."""

    def images(self, parameters: Tensor) -> Images:
        return self.start + self.correction(parameters)


class Pixels(Parametrisation):
    """The pixel values themselves as parameters."""

    learning_rate = 0.01

    @property
    def initial(self) -> Tensor:
        return torch.zeros_like(self.start)

    def correction(self, parameters: Tensor) -> Tensor:
        return parameters


class Fourier(Parametrisation):
    """Amplitudes of frequencies in decorrelated colours, each scaled by the root of its expected power.

    Without a `spectrum` the expectation is that of natural images, amplitudes of 1/f, as in Olah, Mordvintsev
    & Schubert (2017), "Feature Visualization". With one (see `DecoderErrors`) it is that of the errors of the
    start's decoder. Gradient steps or L-BFGS from 0 then approach, if the encoder is linear, the mean of a
    Gaussian posterior: whatever the features do not determine takes the value expected from what they do.
    """

    learning_rate = 0.02

    def __init__(self, start: Images, seed: int, spectrum: Spectrum | None = None) -> None:
        super().__init__(start, seed)
        size = tuple(start.shape[-2:])
        roots = natural_spectrum(size) if spectrum is None else spectrum
        # Normalised, so that parameters of size 1 give corrections of size 1 for any scale of the spectrum.
        roots = roots[radii(size)]
        roots = roots / roots.square().sum((-2, -1)).mean().div(3).sqrt()
        self.roots = roots.to(start.device, torch.complex64)

    @property
    def initial(self) -> Tensor:
        return torch.zeros(len(self.start), 3, *self.roots.shape[:2], 2, device=self.start.device)

    def correction(self, parameters: Tensor) -> Tensor:
        spectrum = torch.einsum("hwij,bjhw->bihw", self.roots, torch.view_as_complex(parameters))
        return torch.fft.irfft2(spectrum, s=self.start.shape[-2:], norm="ortho")


class Prior(Parametrisation):
    """Weights of an untrained hourglass network with skips and a fixed noise input: a deep image prior.

    After Ulyanov, Vedaldi & Lempitsky (2018), but smaller, and with its last layer at 0, so that the first
    correction is 0. Every image has its own weights; all start from the same values.
    """

    learning_rate = 0.003
    width, skip, levels = 32, 4, 4

    def __init__(self, start: Images, seed: int, spectrum: Spectrum | None = None) -> None:
        super().__init__(start, seed)
        generator = torch.Generator().manual_seed(seed)
        levels = [min(self.levels, (size - 1).bit_length() - 2) for size in start.shape[-2:]]
        self._shapes: list[tuple[int, int, int]] = []
        for level in range(max(1, min(levels))):
            inputs = self.width if level else 8
            self._shapes += [
                (self.width, inputs, 3),
                (self.skip, inputs, 1),
                (self.width, self.width + self.skip, 3),
            ]
        weights = [
            torch.randn(o, i, k, k, generator=generator) * (2 / (i * k * k)) ** 0.5
            for o, i, k in self._shapes
        ]
        self._weights = torch.cat([w.flatten() for w in weights] + [torch.zeros(3 * self.width)]).to(
            start.device
        )
        self._noise = torch.rand(1, 8, *start.shape[-2:], generator=generator).to(start.device)

    @property
    def initial(self) -> Tensor:
        return self._weights.repeat(len(self.start), 1)

    def correction(self, parameters: Tensor) -> Tensor:
        return torch.cat([self._network(row) for row in parameters])

    def _network(self, row: Tensor) -> Tensor:
        sizes = [o * i * k * k for o, i, k in self._shapes]
        parts = row.split([*sizes, 3 * self.width])
        kernels = [part.view(o, i, k, k) for part, (o, i, k) in zip(parts, self._shapes, strict=False)]
        x, skips = self._noise, []
        for down, skip, _ in zip(*[iter(kernels)] * 3, strict=True):
            skips.append(_layer(x, skip))
            x = _layer(x, down, stride=2)
        for up, skip in zip(kernels[-1::-3], reversed(skips), strict=True):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = _layer(torch.cat([x, skip], 1), up)
        return F.conv2d(x, parts[-1].view(3, self.width, 1, 1))


def _layer(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    margin = kernel.shape[-1] // 2
    x = F.conv2d(F.pad(x, (margin,) * 4, mode="reflect"), kernel, stride=stride)
    return F.leaky_relu(F.instance_norm(x), 0.2)


PARAMETRISATIONS = {"pixels": Pixels, "fourier": Fourier, "prior": Prior}


Spectrum = Float[Tensor, "radii 3 3"]

COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.0, -0.05), (0.27, -0.09, 0.03))
"""Square root of the colour covariance of natural images (Lucid, Olah et al. 2017).

Rows are red, green and blue; columns are lightness, red-blue and green-purple.
"""


def radii(size: tuple[int, int]) -> Int[Tensor, "height half"]:
    """Return the number of cycles along the longer side, rounded, for each frequency of `rfft2`."""
    height, width = size
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    return (down.square() + right.square()).sqrt().mul(max(size)).round().long()


def natural_spectrum(size: tuple[int, int]) -> Spectrum:
    """Return square roots of the colour covariance of natural images by radius; amplitudes fall with 1/f."""
    amplitude = 1 / torch.arange(int(radii(size).max()) + 1).clamp_min(1)
    return amplitude[:, None, None] * torch.tensor(COLOURS)
