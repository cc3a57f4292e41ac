"""Test of H2: spatial resolution dominates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from afterimage.evaluation.intervals import Interval, interval
from afterimage.report.statistics.depth import CONTRADICTED, SUPPORTED, UNDECIDED, UNTESTABLE, Answer
from afterimage.report.statistics.rows import Row, matrix
from afterimage.report.statistics.tests import (
    ALPHA,
    Comparison,
    compare,
    corrected,
    epsilon_squared,
    holm,
    separable,
    spearman,
    spearman_p,
)
from afterimage.runs.results import METRICS

RULE = (
    "Supported: over layers, the rank correlations of quality with the number of locations, plain and given "
    "channels, are both positive (permutation test, Holm-corrected, p < 0.05), and resolution accounts for "
    "more than half of the variance between layers (the whole 95 % interval of epsilon squared lies above "
    "0.5). Contradicted: that interval lies below 0.5, or the plain correlation is negative (same test). "
    "Undecided: otherwise."
)


@dataclass(frozen=True)
class MatchedPair:
    """Two layers of the same resolution; with `same_encoder` they differ in depth alone."""

    height: int
    width: int
    same_encoder: bool
    comparison: Comparison


@dataclass(frozen=True)
class Resolution(Answer):
    """Answer to H2 for one metric and one setting.

    Intervals resample images with the layers fixed. P-values permute layers; they are only a guide, since
    layers of one encoder are not independent.

    Attributes:
        layers: number of layers
        correlation: rank correlation over layers of quality (more is better for every metric) and locations
        correlation_p: its p-value
        partial: the same given channels; None for four layers or where channels and locations rank layers
            alike
        partial_p: its p-value
        share: share of the variance between layers that resolution accounts for (epsilon squared); None where no two
            layers share a resolution
        pairs: comparisons of every two layers of one resolution
    """

    layers: int = 0
    correlation: Interval | None = None
    correlation_p: float | None = None
    partial: Interval | None = None
    partial_p: float | None = None
    share: Interval | None = None
    pairs: tuple[MatchedPair, ...] = ()
    hypothesis: str = "H2"
    claim: str = "spatial resolution dominates"


def no_partial(layers: int) -> str:
    """Return why there is no correlation given channels over this number of layers."""
    if layers == 4:
        return "four layers are too few for a correlation given channels"
    return "channels and locations cannot be told apart over these layers"


def resolution_dominates(rows: list[Row], metric: str) -> Resolution:
    """Test H2.

    Args:
        rows: one or more rows of one setting with one source each
        metric: name of the metric
    """
    locations = np.array([row.locations for row in rows], dtype=float)
    if len(rows) < 4 or len(set(locations)) < 2:
        reason = "needs four or more layers of two or more resolutions, decoded alike"
        return Resolution(metric, rows[0].setting, UNTESTABLE, RULE, reason, len(rows))

    channels = np.array([row.channels for row in rows], dtype=float)
    _, scores = matrix(rows, metric)
    quality = METRICS[metric].sign * scores
    means = quality.mean(axis=0)
    correlation = interval(lambda means: spearman(locations, means), quality)
    p = [spearman_p(locations, means)]
    partial = None
    if separable(locations, channels) and len(rows) > 4:
        partial = interval(lambda means: spearman(locations, means, channels), quality)
        p.append(spearman_p(locations, means, channels))
    p = [float(v) for v in holm(p)]

    sizes = np.array([row.height * 100_000 + row.width for row in rows])
    share, pairs = None, ()
    if len(set(sizes)) < len(sizes):
        share = interval(lambda means: epsilon_squared(means, sizes), quality)
        pairs = _pairs(rows, metric)
    verdict, reason = _judge(correlation, p, partial, share, len(rows))
    return Resolution(
        metric=metric,
        setting=rows[0].setting,
        verdict=verdict,
        rule=RULE,
        reason=reason,
        layers=len(rows),
        correlation=correlation,
        correlation_p=p[0],
        partial=partial,
        partial_p=p[1] if partial else None,
        share=share,
        pairs=pairs,
    )


def _pairs(rows: list[Row], metric: str) -> tuple[MatchedPair, ...]:
    """Compare every two layers of one resolution, finest first, as one family of tests."""
    matched = [(a, b) for a, b in combinations(rows, 2) if (a.height, a.width) == (b.height, b.width)]
    matched.sort(key=lambda pair: -pair[0].locations)
    family = corrected([compare(a, b, metric) for a, b in matched])
    return tuple(
        MatchedPair(a.height, a.width, a.encoder == b.encoder, comparison)
        for (a, b), comparison in zip(matched, family, strict=True)
    )


def _judge(
    correlation: Interval, p: list[float], partial: Interval | None, share: Interval | None, layers: int
) -> tuple[str, str]:
    if correlation.estimate < 0 and p[0] < ALPHA:
        return CONTRADICTED, "quality falls as locations grow"
    if share is not None and share.high < 0.5:
        return CONTRADICTED, "resolution accounts for less than half of the variance between layers"
    missing = []
    if not (correlation.estimate > 0 and p[0] < ALPHA):
        missing.append("the rank correlation with locations is not established over these layers")
    if partial is None:
        missing.append(no_partial(layers))
    elif not (partial.estimate > 0 and p[1] < ALPHA):
        missing.append("the correlation given channels is not established over these layers")
    if share is None:
        missing.append("no two layers share a resolution")
    elif share.low <= 0.5:
        missing.append("the share of variance that resolution accounts for is not clearly above one half")
    return (UNDECIDED, "; ".join(missing)) if missing else (SUPPORTED, "all three conditions hold")
