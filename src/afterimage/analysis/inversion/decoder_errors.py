"""Statistics of a decoder's errors: by colour and frequency in the image, and by channel in the features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from afterimage.analysis.inversion.parametrisations import Spectrum, radii
from afterimage.config import AfterimageError

WHITENING_FLOOR = 1e-2
"""Share of the mean eigenvalue added to each, which bounds the weight of directions with hardly any error."""

Whitening = Float[Tensor, "channels channels"]


@dataclass(frozen=True)
class DecoderErrors:
    """Statistics of a decoder's errors on images that it was not fitted on.

    A search uses both statistics as in a Gaussian posterior: it first changes what the decoder usually gets
    wrong, and it weighs the remaining error by how unusual it is. A plain distance would depend on hardly
    more than the few channels that are much larger than the others, as in the last blocks of vision
    transformers.

    Attributes:
        spectrum: symmetric square roots `(radii, 3, 3)` of the covariance between red, green and blue of the
            error (original less decoded image) at each frequency, averaged over images and over frequencies
            of one radius
        whitening: for each feature map a `(C, C)` matrix after which the differences between the features of
            decoded image and original have unit variance and no correlation between channels; None compares
            plain features
    """

    spectrum: Spectrum
    whitening: tuple[Whitening, ...] | None

    @classmethod
    @torch.no_grad()
    def estimate(cls, errors: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> DecoderErrors:
        """Estimate the statistics from batches of errors; raise an `AfterimageError` if there are none.

        Args:
            errors: for each batch, the original less the decoded images `(B, 3, H, W)`, and for each feature
                map the difference between both `(B, C, h, w)`
        """
        pixels, features, images = 0, None, 0
        for error, differences in errors:
            pixels = pixels + _by_radius(torch.fft.rfft2(error, norm="ortho"), tuple(error.shape[-2:]))
            found = [_covariance(difference) for difference in differences]
            features = [a + b for a, b in zip(features or [0] * len(found), found, strict=True)]
            images += len(error)
        if features is None:
            raise AfterimageError("there are no images to learn the decoder's errors from")
        values, vectors = torch.linalg.eigh(pixels / images)
        roots = values.clamp_min(1e-8 * float(values.max())).sqrt()
        spectrum = (vectors * roots[:, None]) @ vectors.mT
        return cls(spectrum, tuple(_inverse_root(total / images) for total in features))


def _by_radius(bands: Complex[Tensor, "batch 3 height half"], size: tuple[int, int]) -> Spectrum:
    radius = radii(size).flatten().to(bands.device)
    products = torch.einsum("bihw,bjhw->hwij", bands, bands.conj()).real.flatten(0, 1).flatten(1)
    rings = int(radius.max()) + 1
    sums = torch.zeros(rings, 9, device=bands.device).index_add_(0, radius, products)
    return (sums / radius.bincount(minlength=rings).clamp_min(1)[:, None]).view(rings, 3, 3)


def _covariance(difference: Float[Tensor, "batch channels *grid"]) -> Whitening:
    """Return the second moments of channels, averaged over locations and summed over images."""
    rows = difference.flatten(2).float()
    return torch.einsum("bcn,bdn->cd", rows, rows) / rows.shape[-1]


def _inverse_root(covariance: Whitening) -> Whitening:
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    scales = (values + WHITENING_FLOOR * values.mean() + 1e-20).rsqrt()
    return (vectors * scales) @ vectors.T
