"""Controls of run folders in words and tables. See `afterimage.analysis.controls.run`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from afterimage.config import AfterimageError
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.format import (
    MISSING,
    Finding,
    TextTable,
    extent,
    format_score,
    interval_text,
    with_minus_sign,
)
from afterimage.report.rows import Row, group_by, mean_over_images
from afterimage.runs.controls import ABLATIONS, PLANES, REGIONS, CodecPoint, PlaneError, read_part
from afterimage.runs.results import Interval

DETAIL = 0.125
"""Frequency in cycles a pixel (periods of 8 pixels) above which luma counts as detail."""


@dataclass(frozen=True)
class Part:
    """One part of a row's controls: its facts, of the type that `CONTROL_TYPES` names, and its rows by image."""

    row: Row
    facts: Any
    images: Sequence[Mapping[str, Any]]

    def mean(self, column: str) -> Interval:
        """Compute the mean of a column over images, with its interval."""
        return mean_over_images([float(image[column]) for image in self.images])


def read_parts(rows: Iterable[Row], part: str) -> tuple[list[Part], list[str]]:
    """Read one part of every row that has it.

    Returns:
        the parts, and messages on files that cannot be read
    """
    found, problems = [], []
    for row in rows:
        if row.run.file(f"{part}.json").exists():
            try:
                found.append(Part(row, *read_part(row.run, part)))
            except AfterimageError as damage:
                problems.append(str(damage))
    return found, problems


def control_findings(rows: Sequence[Row]) -> list[Finding]:
    """Return findings on the controls of these rows; none where no run folder contains any."""
    findings = []
    for part, (title, make) in FINDING_BUILDERS.items():
        found, problems = read_parts(rows, part)
        if found or problems:
            paragraphs, tables = make(found) if found else ((), ())
            findings.append(
                Finding(title, paragraphs=(*problems, *paragraphs), tables=tuple(tables), wide=True)
            )
    return findings


def decoder(row: Row) -> str:
    """Write the decoder of a row, with the name of its random control if it is one."""
    return row.decoder_label + (f" ({row.control})" if row.is_random else "")


def share_lost(part: Part, plane: str) -> list[tuple[float, float]]:
    """Return `(cycles a pixel, error power over image power)` for each band that has image power."""
    spectrum = part.facts.spectra[plane]
    triples = zip(part.facts.frequencies, spectrum.error, spectrum.image, strict=True)
    return [(f, e / p) for f, e, p in triples if e is not None and p]


def curve_of(part: Part, codec: str) -> list[CodecPoint]:
    """Return the points of one codec, sorted by size."""
    curve = [c for c in part.facts.codecs if c.codec == codec]
    return sorted(curve, key=lambda c: c.bits_per_pixel)


def images(parts: Sequence[Part]) -> str:
    """Write the number of test images of all rows, such as `4 to 6 test images`."""
    return f"{extent(part.facts.images for part in parts)} test images"


def coders(parts: Sequence[Part]) -> str:
    """Return the names of all rows' coders."""
    return " or ".join(dict.fromkeys(part.facts.coder for part in parts))


def _ablation_tables(parts: Sequence[Part]) -> tuple[list[str], list[TextTable]]:
    header = ("features", "decoder", "own features", *ABLATIONS.values(), "re-encoded", "another image")
    table = []
    for p in parts:
        scores = (interval_text(p.mean(f"{control}_psnr"), "psnr") for control in ("own", *ABLATIONS))
        distances = (p.facts.distances.reencoded, p.facts.distances.random_pair)
        cells = (*scores, *(f"{distance:.3f}" for distance in distances))
        table.append((p.row.features_text, decoder(p.row), *cells))
    paragraphs = [
        "Features that are not the image's go through its trained decoder, and what comes out is scored against "
        "the image: what is left is the decoder's prior. Another image's features are those of the next test "
        "image; shuffled ones have their locations in random order; mean ones hold each channel's mean over "
        f"training images everywhere. PSNR in dB, mean over {images(parts)} with its "
        f"{INTERVAL_NAME}. A column that comes near the first is what the decoder knew without the image.",
        "Re-encoded: the distance of the reconstruction's features from the image's, over the norm of these; "
        "beside it the distance of another image's features. Near 0 the reconstruction is one that the layer "
        "takes for the image; near the other it has little to do with it.",
    ]
    tables = [TextTable("Controls", header, tuple(table))]
    return paragraphs, [*tables, *_against_random([p.row for p in parts])]


def _against_random(rows: Sequence[Row]) -> Iterable[TextTable]:
    """Compare pretrained rows with the same rows on random weights, in a table for each random control."""
    trained, random = ([row for row in rows if row.is_random == is_random] for is_random in (False, True))
    pairs = [(a, b) for a, b in product(trained, random) if _differ_only_in(a, b, "weights")]
    for label, found in sorted(group_by(pairs, lambda pair: pair[1].weights_label).items()):
        lines = []
        for pair in found:
            means = (format_score(row.scores["psnr"].mean, "psnr") for row in pair)
            names = (pair[0].features_text, pair[0].decoder_label)
            lines.append((*names, *means, _difference(*pair, "psnr")))
        heads = ("pretrained (dB)", f"{label.upper()} weights (dB)", "what training added (dB)")
        title = f"The same architecture with {label} weights"
        yield TextTable(title, ("features", "decoder", *heads), tuple(lines))


def _differ_only_in(a: Row, b: Row, *but: str) -> bool:
    """Return True if two rows have the same settings except for these and those of LPIPS."""

    def rest(row: Row) -> dict[str, Any]:
        settings = {k: v for k, v in row.settings.items() if k not in (*but, "lpips")}
        if "loss" in but:
            settings["recipe"] = {k: v for k, v in settings.get("recipe", {}).items() if k != "loss"}
        return settings

    return rest(a) == rest(b)


def _difference(a: Row, b: Row, metric: str) -> str:
    """Write the mean over images of `a` minus `b`, with its interval."""
    one, other = a.values(metric), b.values(metric)
    gaps = [one[key] - other[key] for key in sorted(one) if key in other]
    return interval_text(mean_over_images(gaps), metric, signed=True)


def _error_breakdown_tables(parts: Sequence[Part]) -> tuple[list[str], list[TextTable]]:
    rules = parts[0].facts.regions
    regions = {kind: [getattr(p.facts.regions, kind).share for p in parts] for kind in REGIONS}
    shares = ", ".join(f"{kind} {extent(found, '{:.0%}'.format)}" for kind, found in regions.items())
    header = (
        "features", "decoder", *(f"{label} (dB)" for label in PLANES.values()),
        *(f"{plane} variance lost" for plane in PLANES.values()),
        *(f"{kind} (dB)" for kind in REGIONS), "half of luma lost from (cycles a pixel)",
    )  # fmt: skip
    table = []
    for p in parts:
        half = next((f"{f:.3f}" for f, share in share_lost(p, "luma") if share >= 0.5), "above 0.5")
        planes = [interval_text(p.mean(f"psnr_{plane}"), "psnr") for plane in PLANES]
        lost = [_share(p.facts.planes[plane]) for plane in PLANES]
        kinds = [_decibels(getattr(p.facts.regions, kind).mse) for kind in REGIONS]
        table.append((p.row.features_text, decoder(p.row), *planes, *lost, *kinds, half))
    paragraphs = [
        f"Luma, Cb and Cr are JPEG's (BT.601, full range), mean PSNR over images with its {INTERVAL_NAME}; "
        "the variance lost is the squared error over the plane's own variance within images (above 100 %: worse "
        "than its mean). "
        f"Regions are judged on the original's luma in {rules.window} × {rules.window} pixels: flat where its "
        f"standard deviation is below {rules.flat_below:g}, else edge where the structure tensor's coherence is "
        f"{rules.edge_from:g} or more, else texture ({shares} of the pixels); their dB are of the mean squared "
        "error over all pixels of the kind. The last column is the lowest frequency at which the error has half "
        "the image's power or more.",
    ]
    return paragraphs, [TextTable("By colour, region and frequency", header, tuple(table)), *_gap(parts)]


def _share(plane: PlaneError) -> str:
    return f"{plane.error / plane.variance:.1%}" if plane.variance else MISSING


def _decibels(error: float | None) -> str:
    return MISSING if error is None else format_score(-10 * math.log10(max(error, 1e-10)), "psnr")


def _gap(parts: Sequence[Part]) -> Iterable[TextTable]:
    """Compare decoders trained for MSE with the same ones trained with LPIPS, by scores and detail."""
    lines = []
    for mse, other in product(parts, parts):
        losses = [str(p.row.settings.get("recipe", {}).get("loss", "mse")) for p in (mse, other)]
        if losses[0] != "mse" or "lpips" not in losses[1] or not _differ_only_in(mse.row, other.row, "loss"):
            continue
        measured = mse.row.lpips.net == other.row.lpips.net and other.row.scores["lpips"] is not None
        pairs = [" → ".join(texts) for texts in zip(*map(_detail, (mse, other)), strict=True)]
        lines.append((
            mse.row.features_text, mse.row.decoder_label, losses[1], _difference(other.row, mse.row, "psnr"),
            _difference(other.row, mse.row, "lpips") if measured else MISSING, *pairs,
        ))  # fmt: skip
    if lines:
        header = (
            "features", "decoder", "loss", "PSNR less mse's (dB)", "LPIPS less mse's",
            f"power above {DETAIL:g} cycles a pixel, of the image's", "agreement there",
        )  # fmt: skip
        title = "MSE beside a perceptual loss: power that comes back with less agreement is guessed detail"
        yield TextTable(title, header, tuple(lines))


def _detail(part: Part) -> tuple[str, str]:
    """Write luma power above `DETAIL` over the image's, and its correlation with the image."""
    spectrum = part.facts.spectra["luma"]
    high = [i for i, f in enumerate(part.facts.frequencies) if f > DETAIL]
    # Spectra are radial averages: a band's share grows with its circumference.
    own, rebuilt, shared = (
        sum((power[i] or 0) * part.facts.frequencies[i] for i in high)
        for power in (spectrum.image, spectrum.reconstruction, spectrum.shared)
    )
    if not own or not rebuilt:
        return MISSING, MISSING
    return f"{rebuilt / own:.0%}", with_minus_sign(f"{shared / math.sqrt(own * rebuilt):.2f}", 2)


def _rate(parts: Sequence[Part]) -> tuple[list[str], list[TextTable]]:
    header = (
        "features", "decoder", "bits", "bits a pixel", "entropy bound", "PSNR (dB)", "JPEG at that size (dB)",
        "WebP at that size (dB)", "JPEG of that PSNR (bits a pixel)",
    )  # fmt: skip
    table = []
    for p in parts:
        jpeg, webp = curve_of(p, "JPEG"), curve_of(p, "WebP")
        for point in p.facts.points:
            rows = [float(r["psnr"]) for r in p.images if r["bits"] == point.bits]
            size, bound = point.bits_per_pixel, point.entropy_bits_per_pixel
            table.append((
                p.row.features_text, decoder(p.row), f"{point.bits}", f"{size:.2f}",
                MISSING if bound is None else f"{bound:.2f}", interval_text(mean_over_images(rows), "psnr"),
                _codec(jpeg, size), _codec(webp, size), _size(jpeg, point.psnr),
            ))  # fmt: skip
    exact = [c.bits_per_pixel for p in parts for c in p.facts.codecs if c.psnr is None]
    paragraphs = [
        "Each channel is quantised evenly between its 0.1 % and 99.9 % quantiles over "
        f"{extent(p.facts.training_images for p in parts)} training images, a symbol standing for the mean of what it "
        "covers there; "
        "32 bits are the features as they are, uncoded. The decoder was fitted on unquantised features and not "
        f"again. Bits a pixel are real: {coders(parts)} on one symbol a byte, channel after channel. The entropy "
        "bound is that of each channel's symbols over the test images: no code that takes every value by itself "
        "is shorter; bzip2 may be, since it sees neighbours.",
        "JPEG and WebP are whole files of the same images (chroma at half size), interpolated between qualities "
        f"along the logarithm of the size. Lossless WebP takes {extent(exact, '{:.2f}'.format)} bits a pixel: a size "
        "beyond it buys the image itself.",
    ]
    return paragraphs, [TextTable("dB at each size", header, tuple(table))]


def _codec(curve: Sequence[CodecPoint], size: float) -> str:
    """Write a codec's mean PSNR at a mean size in bits a pixel, interpolated along its logarithm."""
    sizes, psnr = [c.bits_per_pixel for c in curve], [c.psnr for c in curve]
    if size < sizes[0]:
        return f"none so small (from {sizes[0]:.2f})"
    if size > sizes[-1]:
        return f"above {format_score(psnr[-1], 'psnr')}"
    return format_score(float(np.interp(np.log(size), np.log(sizes), psnr)), "psnr")


def _size(curve: Sequence[CodecPoint], psnr: float) -> str:
    """Write the mean size in bits a pixel at which a codec has this mean PSNR, interpolated along its logarithm."""
    known = sorted((c.psnr, c.bits_per_pixel) for c in curve)
    if psnr < known[0][0]:
        return f"below {known[0][1]:.2f}"
    if psnr > known[-1][0]:
        return "more than quality 100"
    qualities, sizes = zip(*known, strict=True)
    return f"{np.exp(np.interp(psnr, qualities, np.log(sizes))):.2f}"


FINDING_BUILDERS = {
    "controls": ("Preserved or guessed", _ablation_tables),
    "error_breakdown": ("What is lost", _error_breakdown_tables),
    "rate_distortion": ("What the features cost to store or send", _rate),
}
