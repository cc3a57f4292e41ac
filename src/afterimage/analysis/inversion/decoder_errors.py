"""What a decoder's images are expected to lack, in colours and frequencies and in features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from afterimage.analysis.inversion.parametrizations import Spectrum, radii
from afterimage.config import AfterimageError

WHITENING_FLOOR = 1e-2
"""Share of the mean eigenvalue that is added to each: directions in which the decoder errs less than by chance."""

Whitening = Float[Tensor, "channels channels"]


@dataclass(frozen=True)
class DecoderErrors:
    """Statistics of the errors that a decoder makes on images that it was not fitted on.

    Attributes:
        spectrum: symmetric roots `(radii, 3, 3)` of the covariance of red, green and blue of original less decoded
            image at each frequency, averaged over images and over frequencies of one radius
        whitening: for each feature map the `(C, C)` matrix that turns the difference between the features of the
            decoded image and of the original into values of unit variance, uncorrelated between channels; None compares
            features as they are

    The search for an image sees both as a Gaussian posterior does: what is changed first is what the decoder usually
    gets wrong, and what is compared is how unusual the remaining error is. Where a few channels are much larger
    than the others, as in the last blocks of vision transformers, the plain distance sees little but these.
    """

    spectrum: Spectrum
    whitening: tuple[Whitening, ...] | None

    @classmethod
    @torch.no_grad()
    def learn(cls, errors: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> DecoderErrors:
        """Learn from batches.

        Args:
            errors: original less decoded images `(B, 3, H, W)` and, of both, the difference of each of their feature
                maps `(B, C, h, w)`; batches may differ in size

        Raises:
            AfterimageError: there are no images
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
    """Second moments of channels, averaged over locations and summed over images."""
    rows = difference.flatten(2).float()
    return torch.einsum("bcn,bdn->cd", rows, rows) / rows.shape[-1]


def _inverse_root(covariance: Whitening) -> Whitening:
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    scales = (values + WHITENING_FLOOR * values.mean() + 1e-20).rsqrt()
    return (vectors * scales) @ vectors.T
