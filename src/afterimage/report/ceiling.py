"""What the published pipeline could have scored at best on given pictures: the range its decoders reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afterimage.config import AfterimageError
from afterimage.runs import Run, read_image

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
BATCH = 8


@dataclass(frozen=True)
class Ceiling:
    """The best score under the published pipeline, over `count` pictures.

    `psnr` and `psnr_std` are over pictures; `psnr_of_mean_error` is the PSNR of the squared error averaged
    over all pictures first. `batch_std` is the deviation of batch means (the published way of reporting it),
    None for fewer than two whole batches. `unreachable` is the share of values outside the decoder's range.
    """

    count: int
    psnr: float
    psnr_std: float | None
    psnr_of_mean_error: float
    batch_std: float | None
    unreachable: float


def published_ceiling(images: Iterable[np.ndarray | str | Path]) -> Ceiling:
    """What a perfect decoder would have scored under the published pipeline on these very pictures.

    Documented: decoders end in a sigmoid, their targets are pictures normalised with ImageNet's mean and std,
    and metrics are computed on denormalised pictures clamped to [0, 1]. Taken together, a picture x in [0, 1]
    becomes the target n = (x - mean) / std per channel, of about -2.1 to 2.6; the decoder answers y in (0, 1);
    as a picture (v * std + mean) its answer lies between mean and mean + std: red 0.485 to 0.714, green 0.456
    to 0.680, blue 0.406 to 0.631. Nearest to x in there, value by value, is x clipped to that range, hence
    no decoder's PSNR exceeds

        10 log10(1 / mean((clip(x, mean, mean + std) - x)^2)).

    Computed here on photographs, three quarters to four fifths of the values lie outside, and the bound is 14
    to 15 dB as a mean over pictures, about 14 dB as the PSNR of the squared error averaged over all of them;
    the best published single rows score 14.3 to 14.5 dB. The published fusion (17.57 dB) lies above; that it
    was scored in another way is an inference.

    Args:
        images: paths of RGB pictures, or arrays `(3, height, width)` in [0, 1].

    Raises:
        AfterimageError: no pictures; a picture that cannot be read; an array of another shape or range.
    """
    errors, outside = [], []
    low, high = MEAN[:, None, None], (MEAN + STD)[:, None, None]
    for image in images:
        x = _pixels(image)
        errors.append(float(((x.clip(low, high) - x) ** 2).mean()))
        outside.append(float(((x < low) | (x > high)).mean()))
    if not errors:
        raise AfterimageError("the published pipeline's ceiling needs at least one picture")
    # A picture wholly within reach would be perfect; one grey level in one value keeps its PSNR finite.
    psnr = -10 * np.log10(np.maximum(errors, 1e-10))
    whole = psnr[: len(psnr) // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
    return Ceiling(
        count=len(errors),
        psnr=float(psnr.mean()),
        psnr_std=float(psnr.std(ddof=1)) if len(psnr) > 1 else None,
        psnr_of_mean_error=float(-10 * np.log10(max(np.mean(errors), 1e-10))),
        batch_std=float(whole.std(ddof=1)) if len(whole) > 1 else None,
        unreachable=float(np.mean(outside)),
    )


def _pixels(image: np.ndarray | str | Path) -> np.ndarray:
    if isinstance(image, str | Path):
        return np.asarray(read_image(image).convert("RGB"), dtype=float).transpose(2, 0, 1) / 255
    x = np.asarray(image, dtype=float)
    if x.ndim != 3 or x.shape[0] != 3 or x.size == 0:
        raise AfterimageError(f"a picture must have the shape (3, height, width), got {x.shape}")
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise AfterimageError("a picture's values must lie in [0, 1]")
    return x


def originals(runs: Iterable[Run]) -> dict[str, Path]:
    """The test pictures kept in these run folders, by id."""
    found: dict[str, Path] = {}
    for run in runs:
        for name, original, _ in run.pictures:
            found.setdefault(name, original)
    return {name: found[name] for name in sorted(found)}
