"""Measure the rate of features, quantised and entropy-coded, and of the same images as JPEG and WebP files."""

from __future__ import annotations

import bz2
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from afterimage.evaluation.baselines import decode_images, encode_image
from afterimage.evaluation.evaluate import to_uint8
from afterimage.evaluation.metrics import psnr

BITS = (8, 6, 4, 3, 2, 1)
"""Numbers of bits per feature value that are measured."""
CLIPPED_SHARE = 0.001
"""Share of training values beyond either end of the quantiser's range, so that outliers do not widen it."""
JPEG = (1, 5, 10, 20, 30, 50, 70, 80, 90, 95, 100)
"""JPEG qualities that are measured."""
WEBP = (0, 5, 10, 20, 30, 50, 70, 80, 90, 95, 100)
"""WebP qualities that are measured."""
CODER = "bzip2"
"""Name of the symbols' entropy coder in the files."""

Maps = Float[Tensor, "batch channels h w"]
Symbols = UInt8[Tensor, "batch channels h w"]


@dataclass(frozen=True)
class Quantiser:
    """Uniform quantiser with a range for each channel.

    The range of a channel, from the 0.1 % to the 99.9 % quantile of training features, is divided into `2 **
    bits` cells of equal width; values outside go to the outermost cells. A symbol decodes to the mean of the
    training features in its cell (the centroid condition of Lloyd 1982), or to the cell's middle where there
    are none.

    Attributes:
        bits: number of bits of a symbol
        low: lower end of each channel's range `(C,)`
        width: width of each channel's cells `(C,)`
        table: decoded value of each channel's symbols `(C, 2 ** bits)`
    """

    bits: int
    low: Float[Tensor, " channels"]
    width: Float[Tensor, " channels"]
    table: Float[Tensor, "channels symbols"]

    @classmethod
    def fit(cls, values: Float[Tensor, "channels values"], bits: int) -> Quantiser:
        """Fit a quantiser of 1 to 8 bits to training features `(C, n)`."""
        ends = np.quantile(values.numpy(), (CLIPPED_SHARE, 1 - CLIPPED_SHARE), axis=1)
        low, high = torch.from_numpy(ends).float()
        count = 2**bits
        width = (high - low) / count
        middles = low[:, None] + (torch.arange(count) + 0.5) * width[:, None]
        symbols = _symbols(values, low[:, None], width[:, None], count).long()
        sums = torch.zeros(len(values), count, dtype=torch.float64).scatter_add_(1, symbols, values.double())
        number = torch.zeros_like(sums).scatter_add_(1, symbols, torch.ones_like(values, dtype=torch.float64))
        return cls(bits, low, width, torch.where(number > 0, (sums / number).float(), middles))

    def encode(self, maps: Maps) -> Symbols:
        """Return the symbols of feature maps `(B, C, h, w)`."""
        shape = (1, -1, 1, 1)
        low, width = self.low.to(maps.device).view(shape), self.width.to(maps.device).view(shape)
        return _symbols(maps, low, width, 2**self.bits)

    def decode(self, symbols: Symbols) -> Maps:
        """Return the feature maps of symbols `(B, C, h, w)`."""
        table = self.table.to(symbols.device)
        channel = torch.arange(len(table), device=symbols.device)[:, None, None]
        return table[channel, symbols.long()]


def _symbols(values: Tensor, low: Tensor, width: Tensor, count: int) -> Tensor:
    """Return the index of each value's cell; a channel without variation has cell 0 only."""
    steps = torch.where(width > 0, (values - low) / width.clamp_min(1e-30), 0)
    return steps.floor().clamp(0, count - 1).to(torch.uint8)


def coded_bytes(symbols: Symbols) -> list[int]:
    """Return the size in bytes of each image's symbols after bzip2 (Burrows and Wheeler 1994), channel by channel.

    The quantiser's tables, which all images share, are not counted.
    """
    return [len(bz2.compress(image.cpu().numpy().tobytes(), 9)) for image in symbols]


def histograms(symbols: Symbols, bits: int) -> Float[Tensor, "channels symbols"]:
    """Count how often each symbol of so many bits occurs in each channel, `(C, 2 ** bits)`."""
    channels, count = symbols.shape[1], 2**bits
    index = symbols.long() + torch.arange(channels, device=symbols.device)[:, None, None] * count
    return torch.bincount(index.flatten(), minlength=channels * count).view(channels, count).double().cpu()


def entropy(counts: Float[Tensor, "channels symbols"]) -> Float[Tensor, " channels"]:
    """Compute Shannon's entropy of each channel's symbols, in bits per symbol, from their counts.

    This is the shortest mean code length for values that are coded independently with one table per channel;
    a code that uses the dependence between neighbours can be shorter.
    """
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return -torch.xlogy(shares, shares).sum(1) / np.log(2)


def measure_codecs(batches: Iterable[Float[Tensor, "_ 3 height width"]]) -> list[dict[str, Any]]:
    """Code images as JPEG (optimised Huffman tables, chroma at half size) and as WebP at many qualities.

    Args:
        batches: images `(B, 3, H, W)` in [0, 1]

    Returns:
        a row for each codec and quality (JPEG 1 to 100, WebP 0 to 100) with the mean bits per pixel of whole
            files and the mean PSNR in dB; the last row is lossless WebP, whose PSNR is None
    """
    settings = [("JPEG", {"quality": q, "optimize": True}) for q in JPEG]
    settings += [("WebP", {"quality": q, "method": 4}) for q in WEBP]
    sizes: list[list[float]] = [[] for _ in settings]
    scores: list[list[float]] = [[] for _ in settings]
    exact: list[float] = []
    for images in batches:
        arrays = to_uint8(images)
        pixels = images.shape[-2] * images.shape[-1]
        for i, (kind, options) in enumerate(settings):
            files = [encode_image(array, kind, **options) for array in arrays]
            sizes[i] += [8 * len(file) / pixels for file in files]
            scores[i] += psnr(decode_images(files).to(images.device), images).tolist()
        exact += [8 * len(encode_image(array, "WebP", lossless=True)) / pixels for array in arrays]
    rows = [
        {"codec": kind, "quality": o["quality"], "bits_per_pixel": _mean(size), "psnr": _mean(score)}
        for (kind, o), size, score in zip(settings, sizes, scores, strict=True)
    ]
    return [*rows, {"codec": "lossless WebP", "quality": None, "bits_per_pixel": _mean(exact), "psnr": None}]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
