"""Figures of the published study beside ours, with the reasons for the difference.

The study is Blazanovic and Khan (2025), "Input Image Reconstruction from CNN Features", measured on DIV2K.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afterimage.report.format import Finding, TextTable, format_score
from afterimage.report.rows import Row, group_by
from afterimage.runs.files import read_image
from afterimage.runs.results import METRICS

RESNET, VGG, VIT = "resnet34.tv_in1k", "vgg16.tv_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k"


@dataclass(frozen=True)
class PublishedRow:
    """One published row; None where a number was not published.

    Deviations are over batch means, not over images. `decoder` is this package's name of the decoder,
    `parameters` its exact number of parameters; the printed, rounded ones differ for VGG16.
    """

    sources: tuple[str, ...]
    decoder: str
    parameters: int | None
    psnr: tuple[float, float | None]
    ssim: tuple[float, float | None]
    lpips: tuple[float, float] | None


SINGLE = (  # of one layer, by the attention decoder
    (f"{RESNET}:layer1", 250_147, (14.32, 0.94), (0.474, 0.045), (0.455, 0.031)),
    (f"{RESNET}:layer2", 974_563, (14.04, 0.86), (0.390, 0.042), (0.555, 0.029)),
    (f"{RESNET}:layer3", 3_865_187, (13.12, 0.71), (0.283, 0.045), (0.782, 0.025)),
    (f"{RESNET}:layer4", 15_413_603, (12.72, 0.63), (0.272, 0.046), (0.867, 0.023)),
    (f"{VGG}:block1", 233_667, (14.45, 2.27), (0.530, 0.121), (0.398, 0.109)),
    (f"{VGG}:block2", 958_083, (14.34, 0.94), (0.495, 0.045), (0.432, 0.031)),
    (f"{VGG}:block3", 3_848_707, (14.01, 0.85), (0.405, 0.044), (0.536, 0.031)),
    (f"{VGG}:block4", 15_397_123, (13.40, 0.69), (0.305, 0.048), (0.709, 0.038)),
    (f"{VGG}:block5", 15_413_603, (12.68, 0.59), (0.273, 0.047), (0.880, 0.030)),
    (f"{VIT}:block0", 34_621_827, (14.29, 0.93), (0.454, 0.045), (0.509, 0.033)),
    (f"{VIT}:block1", 34_621_827, (14.01, 0.87), (0.377, 0.043), (0.611, 0.027)),
    (f"{VIT}:block5", 34_621_827, (13.89, 0.82), (0.346, 0.044), (0.654, 0.027)),
    (f"{VIT}:block8", 34_621_827, (13.33, 0.71), (0.289, 0.047), (0.790, 0.031)),
    (f"{VIT}:block11", 34_621_827, (12.85, 0.65), (0.278, 0.046), (0.861, 0.026)),
)
_VIT_SMALL, _PVT = "vit_small_patch16_224.augreg_in21k_ft_in1k:block1", "pvt_v2_b2.in1k:stage1"
FUSED = (f"{RESNET}:layer1", f"{VGG}:block1", _VIT_SMALL, _PVT)
FUSION = PublishedRow(FUSED, "transposed", None, (17.57, None), (0.586, None), None)
PUBLISHED = (*(PublishedRow((source,), "attention", *facts) for source, *facts in SINGLE), FUSION)


def find_published(sources: Iterable[str], decoder: str) -> PublishedRow | None:
    """Return the published row for these sources (pinned tags, aliases of layers) and this decoder."""
    key = set(sources)
    return next((row for row in PUBLISHED if row.decoder == decoder and set(row.sources) == key), None)


def published_finding(rows: Iterable[Row]) -> Finding | None:
    """Compare rows with the published ones that they repeat; None where there are none. See `pair_with_published`."""
    found = pair_with_published(rows)
    if not found:
        return None
    table, reasons = [], group_by(found, lambda each: each[-1])
    for theirs, ours, ceiling, _ in found:
        scores = [_pair(getattr(theirs, metric), ours[metric], metric) for metric in METRICS]
        reach = f"{format_score(ceiling.psnr, 'psnr')} dB" if ceiling else "unknown"
        table.append((" + ".join(theirs.sources), theirs.decoder, *scores, reach))
    scores = ("PSNR published → here", "SSIM", "LPIPS (alex)")
    header = ("features", "decoder", *scores, "best within the published range")
    paragraphs = [
        "Blazanovic and Khan (2025) on DIV2K; their deviations are over batch means. The last column is "
        "computed here: what a perfect decoder with the published pipeline's range would score on the test "
        "images that these run folders keep.",
    ]
    for why, own in reasons.items():
        names = ", ".join(" + ".join(theirs.sources) for theirs, *_ in own)
        paragraphs.append(why if len(reasons) == 1 else f"{names}: {why}")
    paragraphs.append(
        "Images, epochs and hardware may differ as well: the rows' configurations say what was done here."
    )
    return Finding(
        "Beside the published figures",
        paragraphs=tuple(paragraphs),
        tables=(TextTable("Published and here", header, tuple(table)),),
        wide=True,
    )


def _pair(theirs: tuple[float, float | None] | None, ours: float | None, metric: str) -> str:
    published = "not published"
    if theirs is not None:
        mean, spread = theirs
        published = format_score(mean, metric) + (
            "" if spread is None else f" ± {format_score(spread, metric)}"
        )
    return f"{published} → {'unavailable' if ours is None else format_score(ours, metric)}"


def pair_with_published(
    rows: Iterable[Row],
) -> list[tuple[PublishedRow, dict[str, float | None], Ceiling | None, str]]:
    """Pair every row that repeats a published row with that row.

    A row repeats another if sources, decoder and number of parameters agree (for the fusion: its name and
    size) and its weights are pretrained. The data need not be DIV2K.

    Returns:
        for each pair the published row; our mean scores, without LPIPS where it was measured with another network
        than the published AlexNet; the ceiling on the kept test images, None where there are none; and sentences that
        say why the two may differ

    Raises:
        AfterimageError: a kept image cannot be read
    """
    results = []
    for same in group_by(rows, lambda row: row.data.test_digest).values():
        images = dict(sorted({i: original for row in same for i, original, _ in row.run.images}.items()))
        ceiling = published_ceiling(map(_pixels, images.values())) if images else None
        for row in same:
            if theirs := _counterpart(row):
                kept = [value for identity, value in row.values("psnr").items() if identity in images]
                ours = {metric: score and score.mean for metric, score in row.scores.items()}
                ours |= {} if row.lpips.net == "alex" else {"lpips": None}
                why = why_they_differ(theirs, statistics.fmean(kept) if kept else None, ceiling)
                results.append((theirs, ours, ceiling, why))
    return results


def _counterpart(row: Row) -> PublishedRow | None:
    if row.kind != "decoder" or row.is_random:
        return None
    theirs = find_published(row.sources, row.decoder)
    if theirs is FUSION:
        return theirs if row.fusion and (row.fusion.name, row.fusion.size) == ("attention", 28) else None
    return theirs if theirs and theirs.parameters == row.parameters else None


def why_they_differ(row: PublishedRow, kept: float | None, ceiling: Ceiling | None) -> str:
    """Explain why a published score and ours differ: documented facts, numbers computed here, inferences.

    `kept` is our mean PSNR over the kept test images, `ceiling` theirs; None where there are none.
    """
    if ceiling is None:
        return "No test images are kept, so what the published range allows on them is not known."
    images = f"the {ceiling.count} test images kept" if ceiling.count > 1 else "the one test image kept"
    best = f"{format_score(ceiling.psnr, 'psnr')} dB"
    text = (
        "The published decoders end in a sigmoid and their targets are normalised. Computed here, if answers "
        f"are denormalised before they are scored: {100 * ceiling.unreachable:.0f} % of the values of {images} "
        f"are out of their reach, and a perfect decoder would have scored {best}."
    )
    if row is FUSION:
        text += f" The published fusion's {format_score(row.psnr[0], 'psnr')} dB are "
        if row.psnr[0] <= ceiling.psnr:
            return f"{text}not above that."
        return f"{text}above that: an inference is that it was scored in another way than the single rows."
    if kept is None:
        return text
    if kept > ceiling.psnr:
        return f"{text} Ours scores more on them, which no training of the published decoders could have reached."
    return f"{text} Ours does not score more on them, so their range alone does not explain the difference."


MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Ceiling:
    """Best score under the published pipeline: mean PSNR in dB over `count` images, and the share out of reach."""

    count: int
    psnr: float
    unreachable: float


def published_ceiling(images: Iterable[np.ndarray]) -> Ceiling:
    """Compute the score of a perfect decoder under the published pipeline on these images.

    Documented: decoders end in a sigmoid, their targets are images normalised with ImageNet's mean and std,
    and metrics are computed on denormalised images clamped to [0, 1]. Taken together, an image x in [0, 1]
    becomes the target n = (x - mean) / std per channel, of about -2.1 to 2.6; the decoder answers y in (0, 1);
    as an image (v * std + mean) its answer lies between mean and mean + std: red 0.485 to 0.714, green 0.456
    to 0.680, blue 0.406 to 0.631. The nearest image in that range is x clipped to it, hence no decoder's
    PSNR exceeds

        10 log10(1 / mean((clip(x, mean, mean + std) - x)^2)).

    Computed here on photographs, three quarters to four fifths of the values lie outside, and the bound is 14
    to 15 dB as a mean over images, about 14 dB as the PSNR of the squared error averaged over all of them;
    the best published rows of one layer score 14.3 to 14.5 dB. The published fusion (17.57 dB) lies above;
    that it was scored in another way is an inference.

    Args:
        images: arrays `(3, height, width)` in [0, 1], at least one
    """
    errors, outside = [], []
    low, high = MEAN[:, None, None], (MEAN + STD)[:, None, None]
    for x in images:
        errors.append(float(((x.clip(low, high) - x) ** 2).mean()))
        outside.append(float(((x < low) | (x > high)).mean()))
    # An image within the range has no error; an error of one grey level in one value keeps its PSNR finite.
    psnr = -10 * np.log10(np.maximum(errors, 1e-10))
    return Ceiling(len(errors), float(psnr.mean()), float(np.mean(outside)))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path).convert("RGB"), dtype=float).transpose(2, 0, 1) / 255
