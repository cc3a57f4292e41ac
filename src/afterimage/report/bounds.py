"""Measured bounds: decoders paired with the images that inversions found from their reconstructions."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afterimage.config import RunConfig
from afterimage.report.rows import Row, Rows, group_by
from afterimage.runs.files import read_csv
from afterimage.runs.results import METRICS, InversionFacts
from afterimage.runs.run import Run


@dataclass(frozen=True)
class Bound:
    """Measured bound of some features, beside the decoder that it started from, on the same test images.

    In all three rows `inversion.feature_loss` is the distance of the images' features from the originals'.

    Attributes:
        decoder: the decoder, scored on these images alone; without scores by image where its run is not among
            the rows; None where `refined` started from grey
        estimate: the best estimate: the images of least expected error
        refined: the most consistent images: those whose features fit best
    """

    decoder: Row | None
    estimate: Row | None
    refined: Row | None

    @property
    def reference(self) -> Row:
        """The row `refined`, or `estimate` if there is none; all rows have the same features, weights and images."""
        return next(row for row in (self.refined, self.estimate) if row)

    @property
    def count(self) -> int:
        """Number of test images."""
        return len(self.reference.per_image)

    @property
    def decoder_label(self) -> str:
        """Name of the decoder with its variant; empty where the search started from grey."""
        known = self.decoder and isinstance(self.decoder.config, RunConfig)
        return self.decoder.decoder_label if known else self.reference.inversion.start_decoder

    @property
    def rows_by_name(self) -> dict[str, Row]:
        """Existing rows by the name of their kind, such as `best estimate`."""
        consistent = "most consistent" if self.decoder else "most consistent, from grey"
        names = (f"decoder {self.decoder_label}", "best estimate", consistent)
        rows = zip(names, (self.decoder, self.estimate, self.refined), strict=True)
        return {name: row for name, row in rows if row}

    def best(self, metric: str) -> Row:
        """Return the row that bounds a metric: for LPIPS the most consistent image, else the best estimate.

        Where only one of the two exists, it bounds every metric.
        """
        first, second = (self.refined, self.estimate) if metric == "lpips" else (self.estimate, self.refined)
        return first or second or self.reference

    def gap_to_decoder(self, metric: str) -> dict[str, float]:
        """Return the bound's score minus the decoder's by image; empty where either is unknown by image."""
        decoder, bound = self.decoder.values(metric) if self.decoder else {}, self.best(metric).values(metric)
        return {name: bound[name] - value for name, value in decoder.items() if name in bound}


def bounds_of(rows: Rows) -> tuple[Bound, ...]:
    """Group inversions of equal features, start, test images and LPIPS network into bounds, in row order."""
    decoders = {(row.run.name, row.training.decoder_sha256): row for row in rows.decoders if row.training}

    def key(row: Row) -> tuple[Any, ...]:
        return row.sources, row.weights_label, row.inversion.start, row.data.test_digest, row.lpips.net

    bounds = []
    for group in group_by(rows.inversions, key).values():
        estimates = [row for row in group if row.config.estimate is not None]
        refined = [row for row in group if row.config.estimate is None]
        estimate = max(estimates, key=lambda row: row.scores["psnr"].mean, default=None)
        consistent = min(refined, key=lambda row: row.inversion.feature_loss, default=None)
        facts = (consistent or estimate).inversion
        decoder = None
        if facts.decoder_alone:
            decoder = _alone(consistent or estimate, decoders.get((facts.start, facts.start_sha256)))
        bounds.append(Bound(decoder, estimate, consistent))
    return tuple(bounds)


def main_bounds(bounds: Sequence[Bound]) -> tuple[Bound, ...]:
    """Return each decoder's bound on the most images, for figures and verdicts; not bounds from grey."""
    widest: dict[tuple[str, str], Bound] = {}
    for bound in bounds:
        key = (bound.reference.inversion.start, bound.reference.weights_label)
        if bound.decoder and (key not in widest or bound.count > widest[key].count):
            widest[key] = bound
    return tuple(widest.values())


def by_decoder(bounds: Sequence[Bound]) -> dict[str, list[Bound]]:
    """Group the main bounds by decoder: most bounds first, among equals the highest mean PSNR first."""
    groups = group_by(main_bounds(bounds), lambda bound: bound.decoder_label)

    def rank(item: tuple[str, list[Bound]]) -> tuple[int, float]:
        return -len(item[1]), -statistics.fmean(bound.decoder.scores["psnr"].mean for bound in item[1])

    return dict(sorted(groups.items(), key=rank))


def comparison_rows(bounds: Sequence[Bound]) -> tuple[list[Row], list[Row]]:
    """Return decoders on the images of their bounds, and the same rows with the bounds' scores."""
    decoders = [bound for bound in main_bounds(bounds) if bound.decoder.per_image]
    bound_rows = []
    for bound in decoders:
        columns = {metric: bound.best(metric).values(metric) for metric in METRICS}
        images = tuple(
            {"id": image["id"], **{metric: values.get(image["id"]) for metric, values in columns.items()}}
            for image in bound.reference.per_image
        )
        scores = {metric: bound.best(metric).scores[metric] for metric in METRICS}
        bound_rows.append(dataclasses.replace(bound.decoder, per_image=images, scores=scores))
    return [bound.decoder for bound in decoders], bound_rows


PSNR_TOLERANCE = 0.05
"""Tolerance in dB between two measurements of the same mean PSNR, wide enough for bfloat16."""


def _alone(found: Row, run: Row | None) -> Row:
    """Return the decoder that an inversion started from, measured on the inversion's images.

    Scores by image are left out unless the images are those of `run`, the decoder's row, or the first of them, and the
    mean PSNR is the same.
    """
    alone, facts, rows = found.inversion.decoder_alone, found.inversion, ()
    # A run with other weights is not the decoder that was used.
    run = run if run and run.weights_label == found.weights_label else None
    if run and _same_images(found, run):
        rows = run.per_image[: len(found.per_image)]
        if abs(statistics.fmean(row["psnr"] for row in rows) - alone.scores["psnr"].mean) > PSNR_TOLERANCE:
            rows = ()
        elif run.lpips.net != found.lpips.net:
            rows = tuple({**row, "lpips": None} for row in rows)
    measured = {"data": found.data, "lpips": found.lpips, "scores": alone.scores, "per_image": rows}
    measured["inversion"] = InversionFacts(0, alone.seconds, alone.feature_loss)
    elsewhere = dataclasses.replace(found, run=Run(found.run.path.with_name(facts.start)))
    return dataclasses.replace(run or elsewhere, **measured)


def _same_images(found: Row, run: Row) -> bool:
    """Return True if the images of an inversion are all those that its decoder was scored on, or the first of them."""
    ids, known = ([image["id"] for image in row.per_image] for row in (found, run))
    return ids == known[: len(ids)] and (
        len(ids) < len(known) or found.data.test_digest == run.data.test_digest
    )


OVERRUN_DB = 0.1
"""Fall in dB below its peak PSNR from which an inversion counts as run for too long."""
CURVE = "curve.csv"
"""File of a search's scores by image and pass."""


def features_label(row: Row) -> str:
    """Return an inversion's sources, with the label of its weights where they are not pretrained."""
    return named_features(row.features_text, row.weights_label)


def named_features(sources: str, weights: str) -> str:
    return sources if weights == "pretrained" else f"{sources} ({weights.upper()} weights)"


def with_curve(inversions: Sequence[Row]) -> list[Row]:
    """Return the inversions that come from a search pass by pass and kept its curve: no best estimates."""
    return [row for row in inversions if row.config.estimate is None and row.run.file(CURVE).exists()]


def curve(folder: Run) -> list[dict[str, Any]]:
    """Return a row for each image and pass of a search, `step` 0 being the start; empty if none was kept."""
    path = folder.file(CURVE)
    return read_csv(path) if path.exists() else []


def mean_curve(folder: Run) -> list[tuple[int, float]]:
    """Return pairs of a number of passes and the mean PSNR over an inversion's images after them; see `curve`."""
    passes = group_by(curve(folder), lambda row: row["step"])
    return [(step, statistics.fmean(row["psnr"] for row in own)) for step, own in sorted(passes.items())]
