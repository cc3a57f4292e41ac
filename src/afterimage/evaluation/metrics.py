"""Compute PSNR, SSIM and LPIPS for each image. Images must lie in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.config import LPIPS_MIN_SIDE, LPIPS_NETS, SSIM_WINDOW, AfterimageError, check_choice
from afterimage.models.lpips import LPIPS, find_lpips_weights
from afterimage.runs.results import METRICS, LpipsStatus

__all__ = ["LPIPS", "PSNR_CAP", "Metrics", "check_pair", "find_invalid_image", "psnr", "ssim"]

PSNR_CAP = 100.0
"""PSNR of identical images, in dB. Infinity would make every mean infinite, and JSON cannot hold it."""

TOLERANCE = 1e-6
"""Largest distance by which values may leave [0, 1], to allow for rounding."""
SIGMA = 1.5
"""Standard deviation of SSIM's Gaussian window, in pixels."""
C1, C2 = 0.01**2, 0.03**2
"""SSIM's constants (0.01 L)^2 and (0.03 L)^2 for images of range L = 1."""
CHUNK = 8
"""Number of images that LPIPS processes at once on a CPU; more need more memory and save hardly any time."""

Images = Float[Tensor, "batch 3 height width"]
Scores = Float[Tensor, " batch"]


def find_invalid_image(images: Images) -> tuple[int, str] | None:
    """Find the first image of a batch `(B, 3, H, W)` that is not finite or leaves [0, 1] by more than 1e-6.

    Returns:
        its index and what is wrong with it, or None
    """
    values = images.detach().flatten(1)  # amin and amax along an axis are many times faster than aminmax
    bounds = torch.stack([values.amin(1), values.amax(1)], 1).tolist()
    for index, (least, most) in enumerate(bounds):
        if not (math.isfinite(least) and math.isfinite(most)):
            return index, "holds values that are not finite"
        if least < -TOLERANCE or most > 1 + TOLERANCE:
            return index, f"holds values from {least:.6g} to {most:.6g}; images lie in [0, 1]"
    return None


def check_pair(prediction: Tensor, target: Tensor) -> None:
    """Raise an `AfterimageError` unless both are batches of images `(B, 3, H, W)` of one shape, floats in [0, 1]."""
    pair = (("prediction", prediction), ("target", target))
    for name, images in pair:
        if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
            raise AfterimageError(f"{name} must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise AfterimageError(f"{name} must hold floats in [0, 1], got {images.dtype}")
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise AfterimageError(f"prediction and target differ in shape: {shapes}")
    for name, images in pair:
        if found := find_invalid_image(images):
            raise AfterimageError(f"{name}: image {found[0]} of the batch {found[1]}")


def psnr(prediction: Images, target: Images) -> Scores:
    """Compute the peak signal-to-noise ratio of each image.

    Args:
        prediction: reconstructions `(B, 3, H, W)` in [0, 1]
        target: originals, likewise

    Returns:
        PSNR in dB, `(B,)`, at most `PSNR_CAP`

    Raises:
        AfterimageError: as `check_pair`
    """
    check_pair(prediction, target)
    return _by_image(_psnr, prediction.float(), target.float())


def ssim(prediction: Images, target: Images) -> Scores:
    """Compute the structural similarity (Wang et al. 2004) of each image, equal to scikit-image's.

    It is the mean over channels and over all positions where the 11 x 11 Gaussian window (sigma 1.5) fits, with
    population covariances.

    Args:
        prediction: reconstructions `(B, 3, H, W)` in [0, 1]
        target: originals, likewise

    Returns:
        SSIM, `(B,)`, in [-1, 1]

    Raises:
        AfterimageError: as `check_pair`, or a side is shorter than 11 pixels
    """
    check_pair(prediction, target)
    return _by_image(_ssim, prediction.float(), target.float())


def _by_image(metric: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    # Process one image at a time on a CPU: it fits into the cache, a batch does not.
    size = 1 if prediction.device.type == "cpu" else len(prediction)
    pairs = zip(prediction.split(size), target.split(size), strict=True)
    return torch.cat([metric(p, t) for p, t in pairs])


def _psnr(prediction: Tensor, target: Tensor) -> Tensor:
    return psnr_from_mse((prediction - target).square().flatten(1).mean(1))


def psnr_from_mse(errors: Tensor) -> Tensor:
    """Return the PSNR of mean squared errors, at most `PSNR_CAP`."""
    return -10 * errors.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def _ssim(prediction: Tensor, target: Tensor) -> Tensor:
    if min(prediction.shape[-2:]) < SSIM_WINDOW:
        size = "x".join(map(str, prediction.shape[-2:]))
        raise AfterimageError(f"SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} or more, got {size}")
    # With the sum s and the difference d of the images, SSIM's two fractions are
    #     (E[s]^2 - E[d]^2 + 2 C1) / (E[s]^2 + E[d]^2 + 2 C1),
    #     (var s - var d + 2 C2) / (var s + var d + 2 C2).
    # This needs four moments instead of five, and gives exactly 1 for equal images. The images are centred first:
    # otherwise float32 loses the variance of nearly flat images, a difference of two large numbers.
    s, d = prediction + target, prediction - target
    centre_s, centre_d = s.mean((2, 3), keepdim=True), d.mean((2, 3), keepdim=True)
    s, d = s.sub_(centre_s), d.sub_(centre_d)
    planes = torch.cat([s, d, s.square(), d.square()], 1)
    for axis in (-2, -1):
        planes = _blur(planes, axis)
    mean_s, mean_d, square_s, square_d = planes.chunk(4, 1)
    luminance = _fraction((mean_s + centre_s).square(), (mean_d + centre_d).square(), 2 * C1)
    structure = _fraction(square_s - mean_s.square(), square_d - mean_d.square(), 2 * C2)
    return (luminance * structure).flatten(1).mean(1)


def _fraction(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Compute `(a - b + c) / (a + b + c)` with fewer passes over memory."""
    return 1 - 2 * b / (a + b + c)


def _gaussian() -> list[float]:
    """Return the normalised weights of SSIM's window along one axis."""
    weights = [math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(SSIM_WINDOW)]
    return [weight / sum(weights) for weight in weights]


def _blur(planes: Tensor, axis: int) -> Tensor:
    """Apply the Gaussian along one axis where it fits, as a sum of shifted views: this is faster than a convolution."""
    length = planes.shape[axis] - SSIM_WINDOW + 1
    first, *others = _gaussian()
    result = planes.narrow(axis, 0, length) * first
    for offset, weight in enumerate(others, 1):
        result.add_(planes.narrow(axis, offset, length), alpha=weight)
    return result


class Metrics:
    """Compute PSNR, SSIM and, if its weights are available, LPIPS of reconstructions.

    LPIPS is unavailable if its weights are not found, or if images of `size` pixels are too small for its network;
    `lpips_status` gives the reason.

    Args:
        lpips_net: `alex`, `vgg` or `squeeze`
        weights: file or folder of the network's backbone, or `pretrained` to search for it
        size: shorter side of the images in pixels, if known

    Raises:
        AfterimageError: the network is unknown, the path does not exist, or the file does not fit
    """

    def __init__(
        self, lpips_net: str = "alex", *, weights: str | Path = "pretrained", size: int | None = None
    ) -> None:
        check_choice("LPIPS network", lpips_net, LPIPS_NETS)
        self.lpips: LPIPS | None = None
        self.lpips_status = LpipsStatus(lpips_net)
        smallest = LPIPS_MIN_SIDE[lpips_net]
        if size is not None and size < smallest:
            reason = f"LPIPS ({lpips_net}) needs images of {smallest}x{smallest} or more, got {size}x{size}"
            self.lpips_status = LpipsStatus(lpips_net, reason=reason)
            return
        try:
            found = find_lpips_weights(lpips_net, weights)
        except AfterimageError as error:
            if weights != "pretrained":
                raise
            self.lpips_status = LpipsStatus(lpips_net, reason=str(error))
            return
        self.lpips = LPIPS(lpips_net, found)
        self.lpips_status = LpipsStatus(lpips_net, True, weights=found.record)

    def to(self, device: torch.device | str) -> Metrics:
        """Move LPIPS to a device and return the metrics."""
        if self.lpips is not None:
            self.lpips.to(device)
        return self

    def __call__(self, prediction: Images, target: Images) -> dict[str, list[float] | None]:
        """Score reconstructions `(B, 3, H, W)` in [0, 1] against originals of the same shape and range.

        Returns:
            `{"psnr": [...], "ssim": [...], "lpips": [...]}` with one number per image; `lpips` is None if unavailable
        """
        return self.compare([prediction], target)[0]

    @torch.inference_mode()
    def compare(
        self, predictions: Sequence[Images], target: Images, *, any_size: bool = False
    ) -> list[dict[str, list[float] | None]]:
        """Score several reconstructions of the same images; LPIPS computes the originals' features only once.

        Args:
            predictions: batches of reconstructions `(B, 3, H, W)` in [0, 1]
            target: originals, likewise
            any_size: whether to return None for SSIM and LPIPS of images that are too small, instead of raising

        Returns:
            for each batch of reconstructions, a dict as `__call__` returns it
        """
        for prediction in predictions:
            check_pair(prediction, target)
        columns: list[dict[str, list[Tensor]]] = [{name: [] for name in METRICS} for _ in predictions]
        size = CHUNK if target.device.type == "cpu" else len(target)
        side = min(target.shape[-2:])
        lpips = self.lpips
        if lpips is not None and any_size and side < LPIPS_MIN_SIDE[self.lpips_status.net]:
            lpips = None
        for start in range(0, len(target), size):
            original = target[start : start + size].float()
            features = None if lpips is None else lpips.features(original)
            for column, prediction in zip(columns, predictions, strict=True):
                image = prediction[start : start + size].float()
                column["psnr"].append(_by_image(_psnr, image, original))
                if side >= SSIM_WINDOW or not any_size:
                    column["ssim"].append(_by_image(_ssim, image, original))
                if lpips is not None:
                    column["lpips"].append(lpips.distance(lpips.features(image), features))
        return [
            {name: torch.cat(parts).tolist() if parts else None for name, parts in column.items()}
            for column in columns
        ]
