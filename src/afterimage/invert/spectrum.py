"""How strong each frequency and colour is expected to be in what a start lacks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from afterimage.config import AfterimageError

Spectrum = Float[Tensor, "radii 3 3"]

HELD_OUT = 32
"""Validation pictures from which a decoder's errors are learnt."""

COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.0, -0.05), (0.27, -0.09, 0.03))
"""Root of the colour covariance of natural pictures: lightness, red-blue, green-purple (Lucid, Olah et al. 2017)."""


def radii(size: tuple[int, int]) -> Int[Tensor, "height half"]:
    """The whole number of cycles along the longer side, for each frequency of `rfft2`."""
    height, width = size
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    return (down.square() + right.square()).sqrt().mul(max(size)).round().long()


def natural_spectrum(size: tuple[int, int]) -> Spectrum:
    """Roots of the covariance of colours by radius, for pictures in general: amplitudes fall with 1/f."""
    amplitude = 1 / torch.arange(int(radii(size).max()) + 1).clamp_min(1)
    return amplitude[:, None, None] * torch.tensor(COLOURS)


@torch.no_grad()
def error_spectrum(errors: Iterable[Float[Tensor, "_ 3 height width"]]) -> Spectrum:
    """The same for what a decoder lacks of pictures that it was not fitted on: original less output.

    `errors` are batches `(B, 3, H, W)`, of any number of pictures each. The covariance of red, green and blue at each
    frequency is averaged over pictures and over frequencies of one radius; returned are its symmetric roots. Raises
    `AfterimageError` where there are no pictures.
    """
    total, count = None, 0
    for error in errors:
        bands = torch.fft.rfft2(error, norm="ortho")
        covariance = _by_radius(bands, tuple(error.shape[-2:]))
        total, count = covariance if total is None else total + covariance, count + len(error)
    if total is None:
        raise AfterimageError("there are no pictures to learn the decoder's errors from")
    values, vectors = torch.linalg.eigh(total / count)
    roots = values.clamp_min(1e-8 * float(values.max())).sqrt()
    return (vectors * roots[:, None]) @ vectors.mT


def _by_radius(bands: Complex[Tensor, "batch 3 height half"], size: tuple[int, int]) -> Spectrum:
    radius = radii(size).flatten().to(bands.device)
    products = torch.einsum("bihw,bjhw->hwij", bands, bands.conj()).real.flatten(0, 1).flatten(1)
    rings = int(radius.max()) + 1
    sums = torch.zeros(rings, 9, device=bands.device).index_add_(0, radius, products)
    return (sums / radius.bincount(minlength=rings).clamp_min(1)[:, None]).view(rings, 3, 3)
