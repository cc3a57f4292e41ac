"""Tests of the study's hypotheses: H1 on depth, H2 on spatial resolution, H3 on architectures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, islice, pairwise

import numpy as np
from scipy import stats

from afterimage.evaluation.intervals import Interval, interval, mean_interval
from afterimage.report.rows import group_by
from afterimage.report.statistics.paired_tests import (
    ALPHA,
    Comparison,
    compare,
    epsilon_squared,
    holm,
    holm_correct,
    kendall_within,
    separable,
    spearman,
    spearman_p,
)
from afterimage.report.statistics.rows import PooledRow, Setting, matrix
from afterimage.runs.results import METRICS

SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTABLE = "supported", "contradicted", "undecided", "not testable"
MARGIN = (
    f"(for PSNR, and is larger than the {METRICS['psnr'].negligible:g} dB that the study calls negligible)"
)
DEPTH_RULE = (
    "A step counts where its paired difference differs from zero: t test, Holm-corrected over all steps of "
    f"all encoders, p < 0.05, and a 95 % interval without zero {MARGIN}. Supported: every step of every "
    "encoder counts as a fall. "
    "Contradicted: some step counts as a rise. Undecided: otherwise."
)


@dataclass(frozen=True)
class Hypothesis:
    """Answer to one hypothesis; subclasses define its name `hypothesis` and its `claim`.

    `verdict` is `SUPPORTED`, `CONTRADICTED`, `UNDECIDED` or `UNTESTABLE`, by `rule`; `reason` says why, in words.
    """

    metric: str
    setting: Setting
    verdict: str
    rule: str
    reason: str


@dataclass(frozen=True)
class DepthOfEncoder:
    """Answer to H1 for one encoder, its layers in execution order.

    Attributes:
        means: mean score of each layer
        steps: comparisons of layer i + 1 with layer i
        tau: Kendall's tau between depth and the layers' mean quality
        tau_p: its exact p-value, which cannot be small for few layers: 1/12 at best for four
        tau_within: mean over images of tau within an image
        monotone: number of images whose quality falls at every step
    """

    encoder: str
    layers: tuple[str, ...]
    means: tuple[float, ...]
    steps: tuple[Comparison, ...]
    tau: float
    tau_p: float
    tau_within: Interval
    monotone: int
    verdict: str


@dataclass(frozen=True)
class Depth(Hypothesis):
    """Answer to H1 for one metric and one setting, from every encoder with two or more layers."""

    encoders: tuple[DepthOfEncoder, ...]
    hypothesis: str = "H1"
    claim: str = "quality falls monotonically with depth"


def falls_with_depth(rows: list[PooledRow], metric: str) -> Depth:
    """Test H1 on every step from layer to layer of every encoder, as one family of tests.

    `rows` are one or more, of one setting, with one source each.
    """
    encoders = group_by(sorted(rows, key=lambda r: r.order), lambda r: r.encoder)
    encoders = {name: layers for name, layers in encoders.items() if len(layers) > 1}
    if not encoders:
        reason = "needs two or more layers of one encoder, decoded alike"
        return Depth(metric, rows[0].setting, UNTESTABLE, DEPTH_RULE, reason, ())

    steps = holm_correct(
        [compare(deep, shallow, metric) for layers in encoders.values() for shallow, deep in pairwise(layers)]
    )
    ordered = iter(steps)
    results = [
        _encoder(name, layers, list(islice(ordered, len(layers) - 1)), metric)
        for name, layers in encoders.items()
    ]
    names = {
        v: ", ".join(r.encoder for r in results if r.verdict == v)
        for v in sorted({r.verdict for r in results})
    }
    verdict = next((v for v in (CONTRADICTED, UNDECIDED) if v in names), SUPPORTED)
    reason = "; ".join(f"{v} for {encoders}" for v, encoders in names.items())
    if len(names) == 1:
        reason = f"for {names[verdict]}" + (" alike" if len(results) > 1 else "")
    return Depth(metric, rows[0].setting, verdict, DEPTH_RULE, reason, tuple(results))


def _encoder(name: str, layers: list[PooledRow], steps: list[Comparison], metric: str) -> DepthOfEncoder:
    _, scores = matrix(layers, metric)
    quality = METRICS[metric].sign * scores
    tau, tau_p = stats.kendalltau(np.arange(len(layers)), quality.mean(axis=0))
    verdict = UNDECIDED
    if any(step.better == "a" for step in steps):
        verdict = CONTRADICTED
    elif all(step.better == "b" for step in steps):
        verdict = SUPPORTED
    return DepthOfEncoder(
        encoder=name,
        layers=tuple(row.layer for row in layers),
        means=tuple(scores.mean(axis=0).tolist()),
        steps=tuple(steps),
        tau=float(np.nan_to_num(tau)),
        tau_p=float(np.nan_to_num(tau_p, nan=1.0)),
        tau_within=mean_interval(kendall_within(quality), (-1.0, 1.0)),
        monotone=int((np.diff(quality, axis=1) < 0).all(axis=1).sum()),
        verdict=verdict,
    )


RESOLUTION_RULE = (
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
class Resolution(Hypothesis):
    """Answer to H2 for one metric and one setting.

    Intervals resample images with the layers fixed. P-values permute layers; they are only a guide, since
    layers of one encoder are not independent.

    Attributes:
        layers: number of layers
        correlation: rank correlation over layers of quality (more is better for every metric) and locations
        partial: the same given channels; None for four layers or where channels and locations rank layers
            alike
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


def resolution_dominates(rows: list[PooledRow], metric: str) -> Resolution:
    """Test H2. `rows` are one or more, of one setting, with one source each."""
    locations = np.array([row.locations for row in rows], dtype=float)
    if len(rows) < 4 or len(set(locations)) < 2:
        reason = "needs four or more layers of two or more resolutions, decoded alike"
        return Resolution(metric, rows[0].setting, UNTESTABLE, RESOLUTION_RULE, reason, len(rows))

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
    partial_p = p[1] if partial else None
    return Resolution(
        metric, rows[0].setting, verdict, RESOLUTION_RULE, reason, len(rows), correlation, p[0], partial,
        partial_p, share, pairs,
    )  # fmt: skip


def _pairs(rows: list[PooledRow], metric: str) -> tuple[MatchedPair, ...]:
    """Compare every two layers of one resolution, finest first, as one family of tests."""
    matched = [(a, b) for a, b in combinations(rows, 2) if (a.height, a.width) == (b.height, b.width)]
    matched.sort(key=lambda pair: -pair[0].locations)
    family = holm_correct([compare(a, b, metric) for a, b in matched])
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


ARCHITECTURES_RULE = (
    "At each resolution, the first layer of every encoder is compared with every other's. A pair differs "
    "where its paired difference is not zero: t test, Holm-corrected over all pairs, p < 0.05, and a "
    f"95 % interval without zero {MARGIN}. Supported: some pair differs and decoder size cannot explain it "
    "(sizes within 5 %, or the "
    "better side's decoder is the smaller). Contradicted (by PSNR only, for want of a margin for the others): "
    f"every pair's 95 % interval lies within {METRICS['psnr'].negligible:g} dB of zero. Undecided: otherwise."
)


@dataclass(frozen=True)
class Architectures(Hypothesis):
    """Answer to H3 for one metric and one setting, from each two encoders' first layers at each resolution.

    The choice of layers ignores scores, so that no encoder gains from having many layers of one size.
    """

    pairs: tuple[MatchedPair, ...] = ()
    hypothesis: str = "H3"
    claim: str = "different architectures keep different things"


def architectures_differ(rows: list[PooledRow], metric: str) -> Architectures:
    """Test H3 on every pair of encoders at every resolution, as one family of tests.

    `rows` are one or more, of one setting, with one source each.
    """
    first: dict[tuple[int, int], dict[str, PooledRow]] = {}
    for row in sorted(rows, key=lambda r: r.order):
        first.setdefault((row.height, row.width), {}).setdefault(row.encoder, row)
    matched = [
        (size, a, b)
        for size, encoders in sorted(first.items(), key=lambda item: -item[0][0] * item[0][1])
        for a, b in combinations(sorted(encoders.values(), key=lambda r: r.encoder), 2)
    ]
    if not matched:
        reason = "needs layers of one resolution from two or more encoders, decoded alike"
        return Architectures(metric, rows[0].setting, UNTESTABLE, ARCHITECTURES_RULE, reason)

    family = holm_correct([compare(a, b, metric) for _, a, b in matched])
    apart = [c for c in family if c.better]
    clear = [c for c in apart if not c.explained_by_capacity]
    equal = sum(c.matched_capacity for c in family)
    reason = (
        f"{len(apart)} of {len(family)} pairs of equal resolution differ, {len(clear)} of them beyond what "
        f"decoder size can explain; {equal} of the pairs have decoders of equal size"
    )
    if clear:
        verdict = SUPPORTED
    elif METRICS[metric].negligible and all(c.negligible for c in family):
        verdict = CONTRADICTED
    else:
        verdict = UNDECIDED
    pairs = tuple(MatchedPair(*size, False, c) for (size, _, _), c in zip(matched, family, strict=True))
    return Architectures(metric, rows[0].setting, verdict, ARCHITECTURES_RULE, reason, pairs)
