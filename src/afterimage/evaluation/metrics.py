"""PSNR, SSIM and LPIPS, per image. They see images in [0, 1] or raise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.config import LPIPS_NETS, LPIPS_SMALLEST, SSIM_WINDOW, AfterimageError, unknown
from afterimage.models.lpips import LPIPS, find_lpips_weights
from afterimage.runs.results import METRICS, LpipsStatus

__all__ = ["LPIPS", "PSNR_CAP", "Metrics", "check", "problem", "psnr", "ssim"]

PSNR_CAP = 100.0
"""What identical images score, in dB. Infinity would swallow every mean, and JSON cannot hold it."""

TOLERANCE = 1e-6
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
CHUNK = 8
"""Images that LPIPS takes at once on a CPU: more are hardly quicker, and take more memory."""

Images = Float[Tensor, "batch 3 height width"]
Scores = Float[Tensor, " batch"]


def problem(images: Images) -> tuple[int, str] | None:
    """The first image of a batch that is not finite or leaves [0, 1] by over 1e-6, and what is wrong."""
    values = images.detach().flatten(1)  # amin and amax along an axis are many times faster than aminmax
    bounds = torch.stack([values.amin(1), values.amax(1)], 1).tolist()
    for index, (least, most) in enumerate(bounds):
        if not (math.isfinite(least) and math.isfinite(most)):
            return index, "holds values that are not finite"
        if least < -TOLERANCE or most > 1 + TOLERANCE:
            return index, f"holds values from {least:.6g} to {most:.6g}; images lie in [0, 1]"
    return None


def check(prediction: Tensor, target: Tensor) -> None:
    """Raise `AfterimageError` unless both are floats `(B, 3, H, W)` of one shape, in [0, 1] to 1e-6."""
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
        if found := problem(images):
            raise AfterimageError(f"{name}: image {found[0]} of the batch {found[1]}")


def psnr(prediction: Images, target: Images) -> Scores:
    """Peak signal-to-noise ratio in dB, one value an image, at most `PSNR_CAP`. Raises as `check` does."""
    check(prediction, target)
    return _by_image(_psnr, prediction.float(), target.float())


def ssim(prediction: Images, target: Images) -> Scores:
    """Structural similarity (Wang et al., 2004), one value an image: the mean over channels and over all
    places where an 11 x 11 Gaussian window (sigma 1.5) fits, with population covariances, as scikit-image
    computes it.

    Raises as `check` does, and where a side is shorter than 11 pixels.
    """
    check(prediction, target)
    return _by_image(_ssim, prediction.float(), target.float())


def _by_image(metric: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    # One at a time on a CPU: one image stays in its cache, a batch does not.
    size = 1 if prediction.device.type == "cpu" else len(prediction)
    pairs = zip(prediction.split(size), target.split(size), strict=True)
    return torch.cat([metric(p, t) for p, t in pairs])


def _psnr(prediction: Tensor, target: Tensor) -> Tensor:
    error = (prediction - target).square().flatten(1).mean(1)
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def _ssim(prediction: Tensor, target: Tensor) -> Tensor:
    if min(prediction.shape[-2:]) < SSIM_WINDOW:
        size = "x".join(map(str, prediction.shape[-2:]))
        raise AfterimageError(f"SSIM needs images of {SSIM_WINDOW}x{SSIM_WINDOW} or more, got {size}")
    # By the sum s and the difference d of the images, SSIM's two fractions are
    #     (E[s]^2 - E[d]^2 + 2 C1) / (E[s]^2 + E[d]^2 + 2 C1),
    #     (var s - var d + 2 C2) / (var s + var d + 2 C2).
    # Four moments instead of five, and exactly 1 for equal images. Centred first: float32 would lose the
    # variance of nearly flat images as the difference of two large numbers.
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
    """`(a - b + c) / (a + b + c)`, in fewer passes."""
    return 1 - 2 * b / (a + b + c)


def _gaussian() -> list[float]:
    weights = [math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(SSIM_WINDOW)]
    return [weight / sum(weights) for weight in weights]


def _blur(planes: Tensor, axis: int) -> Tensor:
    """The Gaussian along one axis where it fits: a sum of shifted views, quicker here than a convolution."""
    length = planes.shape[axis] - SSIM_WINDOW + 1
    first, *others = _gaussian()
    result = planes.narrow(axis, 0, length) * first
    for offset, weight in enumerate(others, 1):
        result.add_(planes.narrow(axis, offset, length), alpha=weight)
    return result


class Metrics:
    """PSNR, SSIM and, where its network's weights can be had, LPIPS against the original.

    `lpips_net` is `alex`, `vgg` or `squeeze`; `weights` a file or folder of its backbone, or `pretrained`
    to look for it. Where that finds none, and where images of `size` pixels a side are too small for the
    network, LPIPS is unavailable and `lpips_status` says why. A file that is there but does not fit is an
    `AfterimageError`, and so is a path that does not exist.
    """

    def __init__(
        self, lpips_net: str = "alex", *, weights: str | Path = "pretrained", size: int | None = None
    ) -> None:
        if lpips_net not in LPIPS_NETS:
            raise unknown("LPIPS network", lpips_net, LPIPS_NETS)
        self.lpips: LPIPS | None = None
        self.lpips_status = LpipsStatus(lpips_net)
        smallest = LPIPS_SMALLEST[lpips_net]
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
        self.lpips_status = LpipsStatus(lpips_net, True, weights=found.used)

    def to(self, device: torch.device | str) -> Metrics:
        if self.lpips is not None:
            self.lpips.to(device)
        return self

    def __call__(self, prediction: Images, target: Images) -> dict[str, list[float] | None]:
        """`{"psnr": [...], "ssim": [...], "lpips": [...]}`, one number an image; `lpips` may be None."""
        return self.compare([prediction], target)[0]

    @torch.inference_mode()
    def compare(
        self, predictions: Sequence[Images], target: Images, *, any_size: bool = False
    ) -> list[dict[str, list[float] | None]]:
        """As calling, for several reconstructions of the same images: LPIPS looks at the originals once.

        With `any_size` SSIM and LPIPS are None where images are too small for them.
        """
        for prediction in predictions:
            check(prediction, target)
        columns: list[dict[str, list[Tensor]]] = [{name: [] for name in METRICS} for _ in predictions]
        size = CHUNK if target.device.type == "cpu" else len(target)
        side = min(target.shape[-2:])
        lpips = self.lpips
        if lpips is not None and any_size and side < LPIPS_SMALLEST[self.lpips_status.net]:
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
