"""Break down the error of reconstructions by spatial frequency, luma and chroma, position and kind of region."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.ndimage import correlate1d, uniform_filter
from torch import Tensor

from afterimage.evaluation.metrics import psnr_from_mse
from afterimage.runs.controls import PLANES, REGIONS

BANDS = 32
"""Number of equally wide frequency bands from 0 to 0.5 cycles per pixel, without the spectrum's corners."""
CELLS = 56
"""Largest number of cells on each side of the map of the error by position."""
WINDOW = 7
"""Side in pixels of the neighbourhood that decides a pixel's kind of region."""
FLAT_STD = 0.02
"""Standard deviation of luma in [0, 1] below which a region is flat: 5 of 255 levels."""
EDGE_COHERENCE = 0.5
"""Smallest coherence of the structure tensor, in [0, 1], of an edge."""
MATRIX = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
"""Matrix from RGB to Y, Cb and Cr by ITU-R BT.601."""

Images = Float[Tensor, "batch 3 height width"]
Planes = Float[Tensor, "batch planes height width"]


def ycbcr(images: Images) -> Images:
    """Convert images to luma, Cb and Cr by ITU-R BT.601 in full range, as in JPEG; chroma lies in [-0.5, 0.5]."""
    return torch.einsum("pc,bchw->bphw", images.new_tensor(MATRIX), images)


def regions(images: Images) -> Int[Tensor, "batch height width"]:
    """Classify each pixel as an index of `REGIONS`, from the luma in the 7 x 7 pixels around it.

    A region is flat if its standard deviation is below 0.02 (5 of 255 levels). Otherwise it is an edge if its
    structure tensor has one clear direction, `(l1 - l2) / (l1 + l2) >= 0.5` (Bigun and Granlund 1987), and
    texture if not.
    """
    luma = ycbcr(images)[:, 0].double().cpu().numpy()

    def local(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values, (0, WINDOW, WINDOW), mode="reflect")

    centred = luma - luma.mean((1, 2), keepdims=True)
    deviation = np.sqrt(np.maximum(local(centred**2) - local(centred) ** 2, 0))
    gy, gx = (correlate1d(luma, [-0.5, 0, 0.5], axis=axis, mode="reflect") for axis in (1, 2))
    xx, yy, xy = local(gx * gx), local(gy * gy), local(gx * gy)
    coherence = np.hypot(xx - yy, 2 * xy) / np.maximum(xx + yy, 1e-12)
    kinds = np.where(deviation < FLAT_STD, 0, np.where(coherence >= EDGE_COHERENCE, 1, 2))
    return torch.from_numpy(kinds).to(images.device)


def frequencies() -> list[float]:
    """Return the centre of each band in cycles per pixel."""
    return [(i + 0.5) * 0.5 / BANDS for i in range(BANDS)]


def cross_spectrum(a: Planes, b: Planes) -> Float[Tensor, "batch planes bands"]:
    """Compute the real part of the cross-spectral density of two sets of planes, as the mean over each band.

    The mean is removed and a Hann window is applied along both axes to prevent leakage from the borders. The
    spectrum of white noise is its variance in every band. If `a` is `b`, this is the radially averaged power
    spectrum.

    Returns:
        `(B, P, BANDS)`, with NaN for bands without any frequency, which small images have
    """
    height, width = a.shape[-2:]
    window = torch.outer(_hann(height), _hann(width)).to(a)

    def transform(planes: Tensor) -> Tensor:
        planes = planes - (planes * window).sum((-2, -1), keepdim=True) / window.sum()
        return torch.fft.fft2(planes * window)

    one = transform(a)
    products = (one * (one if a is b else transform(b)).conj()).real / window.square().sum()
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]).to(a.device)
    band = (radius * 2 * BANDS).long().flatten()
    inside = band < BANDS
    inside[0] = False  # the mean, which was removed
    sums = products.new_zeros(*products.shape[:2], BANDS)
    sums.index_add_(2, band[inside], products.flatten(2)[..., inside])
    return sums / torch.bincount(band[inside], minlength=BANDS).to(sums)


def _hann(length: int) -> Tensor:
    return torch.hann_window(length + 1, periodic=False, dtype=torch.float64)[:-1]


class ErrorBreakdown:
    """Error breakdown of reconstructions, accumulated batch by batch.

    Attributes:
        rows: PSNR of each image in each plane, and share and mean squared error of each kind of region
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._spectra: Tensor | float = 0.0
        self._variance: Tensor | float = 0.0
        self._error: Tensor | float = 0.0
        self._error_map: Tensor | float = 0.0

    def add(self, ids: list[str], images: Images, outputs: Images, *features: Any) -> None:
        """Add a batch of originals `(B, 3, H, W)` in [0, 1] and their reconstructions; features are not used."""
        images, outputs = images.double(), outputs.double()
        planes, rebuilt = ycbcr(images), ycbcr(outputs)
        error = (rebuilt - planes).square()
        squared = (outputs - images).square().mean(1)
        kinds = regions(images)
        for i, identity in enumerate(ids):
            row: dict[str, Any] = {"id": identity}
            row |= dict(
                zip((f"psnr_{p}" for p in PLANES), psnr_from_mse(error[i].mean((1, 2))).tolist(), strict=True)
            )
            for kind, name in enumerate(REGIONS):
                mask = kinds[i] == kind
                row[f"share_{name}"] = float(mask.double().mean())
                row[f"mse_{name}"] = float(squared[i][mask].mean()) if mask.any() else None
            self.rows.append(row)
        pairs = ((planes, planes), (rebuilt, rebuilt), (planes, rebuilt), (rebuilt - planes,) * 2)
        self._spectra = self._spectra + torch.stack([cross_spectrum(*pair).sum(0).cpu() for pair in pairs])
        centred = planes - planes.mean((2, 3), keepdim=True)
        self._variance = self._variance + centred.square().mean((2, 3)).sum(0).cpu()
        self._error = self._error + error.mean((2, 3)).sum(0).cpu()
        size = tuple(min(CELLS, side) for side in squared.shape[-2:])
        self._error_map = self._error_map + F.adaptive_avg_pool2d(squared, size).sum(0).cpu()

    def result(self) -> dict[str, Any]:
        """Return the content of `error_breakdown.json`: means over images, as plain JSON values.

        `spectra` holds, for luma and for chroma (the sum of Cb and Cr), the power in each band of the images,
        the reconstructions and the error, and the real part of the cross-spectrum of images and
        reconstructions (`shared`).
        """
        count = len(self.rows)
        spectra = self._spectra / count
        names = ("image", "reconstruction", "shared", "error")
        groups = {"luma": spectra[:, 0], "chroma": spectra[:, 1:].sum(1)}
        return {
            "images": count,
            "frequencies": frequencies(),
            "spectra": {g: dict(zip(names, map(_numbers, s), strict=True)) for g, s in groups.items()},
            "planes": {
                name: {"variance": float(variance) / count, "error": float(error) / count}
                for name, variance, error in zip(PLANES, self._variance, self._error, strict=True)
            },
            "place": [_numbers(row) for row in (self._error_map / count).sqrt()],
            "regions": {
                "window": WINDOW, "flat_below": FLAT_STD, "edge_from": EDGE_COHERENCE,
                **{name: self._region(name) for name in REGIONS},
            },
        }  # fmt: skip

    def _region(self, name: str) -> dict[str, float | None]:
        """Return one kind of region's share of all pixels and the mean squared error on them."""
        shares = [row[f"share_{name}"] for row in self.rows]
        total = sum(shares)
        error = sum(s * row[f"mse_{name}"] for s, row in zip(shares, self.rows, strict=True) if s)
        return {"share": total / len(shares), "mse": error / total if total else None}


def _numbers(values: Tensor) -> list[float | None]:
    """Round to five significant digits; empty bands (NaN) become None."""
    return [None if value != value else float(f"{value:.5g}") for value in values.tolist()]
