"""The published study's figures, set beside ours with the reason for the difference.

They are Blazanovic and Khan's (2025), "Input Image Reconstruction from CNN Features", measured on DIV2K.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afterimage.config import AfterimageError, split_source
from afterimage.report.format import number
from afterimage.report.rows import Row
from afterimage.runs.files import read_image
from afterimage.runs.run import Run

_VGG16_POOLS = {f"features.{i}": f"block{n}" for n, i in enumerate((4, 9, 16, 23, 30), start=1)}

RESNET, VGG, VIT = "resnet34.tv_in1k", "vgg16.tv_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k"


@dataclass(frozen=True)
class Published:
    """One published row: means and deviations as printed, minutes of training, and its decoder's parameters.

    `parameters` is the exact count of the study's decoder on these features; its table prints rounded ones,
    which for VGG16 differ. Its deviations are over batch means, not over images. None: not published.
    """

    sources: tuple[str, ...]
    decoder: str
    psnr: tuple[float, float | None]
    ssim: tuple[float, float | None]
    lpips: tuple[float, float] | None
    minutes: float | None
    parameters: int | None


def _row(source: str, parameters: int, psnr: Any, ssim: Any, lpips: Any, minutes: float) -> Published:
    return Published((source,), "attention", psnr, ssim, lpips, minutes, parameters)


FUSION = Published(
    (
        f"{RESNET}:layer1",
        f"{VGG}:block1",
        "vit_small_patch16_224.augreg_in21k_ft_in1k:block1",
        "pvt_v2_b2.in1k:stage1",
    ),
    "transposed",
    (17.57, None),
    (0.586, None),
    None,
    None,
    None,
)
PUBLISHED = (
    _row(f"{RESNET}:layer1", 250_147, (14.32, 0.94), (0.474, 0.045), (0.455, 0.031), 69.8),
    _row(f"{RESNET}:layer2", 974_563, (14.04, 0.86), (0.390, 0.042), (0.555, 0.029), 30.0),
    _row(f"{RESNET}:layer3", 3_865_187, (13.12, 0.71), (0.283, 0.045), (0.782, 0.025), 29.9),
    _row(f"{RESNET}:layer4", 15_413_603, (12.72, 0.63), (0.272, 0.046), (0.867, 0.023), 30.0),
    _row(f"{VGG}:block1", 233_667, (14.45, 2.27), (0.530, 0.121), (0.398, 0.109), 162.8),
    _row(f"{VGG}:block2", 958_083, (14.34, 0.94), (0.495, 0.045), (0.432, 0.031), 12.9),
    _row(f"{VGG}:block3", 3_848_707, (14.01, 0.85), (0.405, 0.044), (0.536, 0.031), 11.4),
    _row(f"{VGG}:block4", 15_397_123, (13.40, 0.69), (0.305, 0.048), (0.709, 0.038), 11.5),
    _row(f"{VGG}:block5", 15_413_603, (12.68, 0.59), (0.273, 0.047), (0.880, 0.030), 11.5),
    _row(f"{VIT}:block0", 34_621_827, (14.29, 0.93), (0.454, 0.045), (0.509, 0.033), 32.2),
    _row(f"{VIT}:block1", 34_621_827, (14.01, 0.87), (0.377, 0.043), (0.611, 0.027), 32.5),
    _row(f"{VIT}:block5", 34_621_827, (13.89, 0.82), (0.346, 0.044), (0.654, 0.027), 33.1),
    _row(f"{VIT}:block8", 34_621_827, (13.33, 0.71), (0.289, 0.047), (0.790, 0.031), 33.7),
    _row(f"{VIT}:block11", 34_621_827, (12.85, 0.65), (0.278, 0.046), (0.861, 0.026), 34.2),
    FUSION,
)


def published(sources: Iterable[str], decoder: str) -> Published | None:
    """The published row for these sources (tags pinned, layers by alias or module path) and this decoder."""
    key = frozenset(_canonical(source) for source in sources)
    for row in PUBLISHED:
        if row.decoder == decoder and frozenset(row.sources) == key:
            return row
    return None


def _canonical(source: str) -> str:
    """The study's own name of a layer that is written as a module path."""
    model, layer = split_source(source)
    if model.startswith("vgg16."):
        layer = _VGG16_POOLS.get(layer, layer)
    elif model.startswith("vit_") and layer.startswith("blocks."):
        layer = f"block{layer.removeprefix('blocks.')}"
    elif model.startswith("pvt_v2") and layer in {f"stages.{i}" for i in range(4)}:
        layer = f"stage{int(layer.removeprefix('stages.')) + 1}"
    return f"{model}:{layer}"


@dataclass(frozen=True)
class Beside:
    """One run with the published row it repeats; `reason` says in words why the two differ.

    `ours` are mean scores; LPIPS is None where it was measured with another network than the published
    AlexNet. `why` is the reason without the row's own numbers.
    """

    run: str
    published: Published
    ours: dict[str, float | None]
    ceiling: Ceiling | None
    reason: str
    why: str


def beside_published(rows: Iterable[Row]) -> list[Beside]:
    """Every row that repeats a published row, with the ceiling of the test images that are kept.

    It does when sources, decoder and its parameters agree (for the fusion: its name and size) and
    its weights are pretrained. The data need not be DIV2K.
    """
    by_data: dict[str, list[Row]] = {}
    for row in rows:
        by_data.setdefault(row.data.test_digest, []).append(row)
    results = []
    for same in by_data.values():
        images = originals(row.run for row in same)
        ceiling = published_ceiling(images.values()) if images else None
        for row in same:
            theirs = _counterpart(row)
            if theirs is not None:
                ours, kept = _means(row), _mean_psnr(row, images)
                reason, why = explain(theirs, ours, ceiling, kept), why_they_differ(theirs, kept, ceiling)
                results.append(Beside(row.run.name, theirs, ours, ceiling, reason, why))
    return results


def _mean_psnr(row: Row, images: Collection[str]) -> float | None:
    """The row's mean over these images alone, with whose ceiling it is compared."""
    scores = [value for identity, value in row.values("psnr").items() if identity in images]
    return statistics.fmean(scores) if scores else None


def _means(row: Row) -> dict[str, float | None]:
    ours = {metric: score and score.mean for metric, score in row.scores.items()}
    return ours if row.lpips.net == "alex" else ours | {"lpips": None}


def _counterpart(row: Row) -> Published | None:
    if row.kind != "decoder" or row.is_random:
        return None
    theirs = published(row.sources, row.decoder)
    if theirs is FUSION:
        return theirs if row.fusion and (row.fusion.name, row.fusion.size) == ("attention", 28) else None
    return theirs if theirs and theirs.parameters == row.parameters else None


def explain(
    row: Published, ours: Mapping[str, float | None], ceiling: Ceiling | None, kept: float | None
) -> str:
    """Ours beside the published PSNR, and why they differ, in sentences.

    Args:
        ours: our mean `psnr` (and other metrics) for the same sources and decoder; None where unavailable.
        ceiling: of the images that are kept in the run folders; None where there are none.
        kept: our mean PSNR over these very images; None where they have no scores.
    """
    psnr = ours["psnr"]
    if psnr is None:
        return f"No PSNR here; {number(row.psnr[0], 'psnr')} dB published."
    gap = number(psnr - row.psnr[0], "psnr", signed=True)
    text = f"{number(psnr, 'psnr')} dB here, {number(row.psnr[0], 'psnr')} dB published on DIV2K ({gap} dB)."
    return f"{text} {why_they_differ(row, kept, ceiling)}"


def why_they_differ(row: Published, kept: float | None, ceiling: Ceiling | None) -> str:
    """The reason alone: what is documented, what was computed here, and what is inferred from the two."""
    if ceiling is None:
        return "No test images are kept, so what the published range allows on them is not known."
    images = f"the {ceiling.count} test images kept" if ceiling.count > 1 else "the one test image kept"
    best = f"{number(ceiling.psnr, 'psnr')} dB"
    text = (
        "The published decoders end in a sigmoid and their targets are normalised. Computed here, if answers "
        f"are denormalised before they are scored: {100 * ceiling.unreachable:.0f} % of the values of {images} "
        f"are out of their reach, and a perfect decoder would have scored {best}."
    )
    if row is FUSION:
        above = "above" if row.psnr[0] > ceiling.psnr else "not above"
        return f"{text} The published fusion's {number(row.psnr[0], 'psnr')} dB are {above} that" + (
            ": an inference is that it was scored in another way than the single rows."
            if above == "above"
            else "."
        )
    if kept is None:
        return text
    if kept > ceiling.psnr:
        return (
            f"{text} Ours is above that on them, where no training could have taken the published decoders."
        )
    return f"{text} Ours is not above that on them, so their range alone does not explain the difference."


MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
BATCH = 8


@dataclass(frozen=True)
class Ceiling:
    """The best score under the published pipeline, over `count` images.

    `psnr` and `psnr_std` are over images; `psnr_of_mean_error` is the PSNR of the squared error averaged
    over all images first. `batch_std` is the deviation of batch means (the published way of reporting it),
    None for fewer than two whole batches. `unreachable` is the share of values outside the decoder's range.
    """

    count: int
    psnr: float
    psnr_std: float | None
    psnr_of_mean_error: float
    batch_std: float | None
    unreachable: float


def published_ceiling(images: Iterable[np.ndarray | str | Path]) -> Ceiling:
    """What a perfect decoder would have scored under the published pipeline on these very images.

    Documented: decoders end in a sigmoid, their targets are images normalised with ImageNet's mean and std,
    and metrics are computed on denormalised images clamped to [0, 1]. Taken together, an image x in [0, 1]
    becomes the target n = (x - mean) / std per channel, of about -2.1 to 2.6; the decoder answers y in (0, 1);
    as an image (v * std + mean) its answer lies between mean and mean + std: red 0.485 to 0.714, green 0.456
    to 0.680, blue 0.406 to 0.631. Nearest to x in there, value by value, is x clipped to that range, hence
    no decoder's PSNR exceeds

        10 log10(1 / mean((clip(x, mean, mean + std) - x)^2)).

    Computed here on photographs, three quarters to four fifths of the values lie outside, and the bound is 14
    to 15 dB as a mean over images, about 14 dB as the PSNR of the squared error averaged over all of them;
    the best published single rows score 14.3 to 14.5 dB. The published fusion (17.57 dB) lies above; that it
    was scored in another way is an inference.

    Args:
        images: paths of RGB images, or arrays `(3, height, width)` in [0, 1].

    Raises:
        AfterimageError: no images; an image that cannot be read; an array of another shape or range.
    """
    errors, outside = [], []
    low, high = MEAN[:, None, None], (MEAN + STD)[:, None, None]
    for image in images:
        x = _pixels(image)
        errors.append(float(((x.clip(low, high) - x) ** 2).mean()))
        outside.append(float(((x < low) | (x > high)).mean()))
    if not errors:
        raise AfterimageError("the published pipeline's ceiling needs at least one image")
    # An image wholly within reach would be perfect; one grey level in one value keeps its PSNR finite.
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
        raise AfterimageError(f"an image must have the shape (3, height, width), got {x.shape}")
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise AfterimageError("an image's values must lie in [0, 1]")
    return x


def originals(runs: Iterable[Run]) -> dict[str, Path]:
    """The test images kept in these run folders, by id."""
    found: dict[str, Path] = {}
    for run in runs:
        for name, original, _ in run.images:
            found.setdefault(name, original)
    return {name: found[name] for name in sorted(found)}
