"""Test of H1: quality falls monotonically with depth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from afterimage.evaluation.intervals import Interval, mean_interval
from afterimage.report.statistics.rows import Row, Setting, matrix
from afterimage.report.statistics.tests import Comparison, compare, corrected, kendall_within
from afterimage.runs.results import METRICS

SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTABLE = "supported", "contradicted", "undecided", "not testable"


MARGIN = (
    f"(for PSNR, and is larger than the {METRICS['psnr'].negligible:g} dB that the study calls negligible)"
)
RULE = (
    "A step counts where its paired difference differs from zero: t test, Holm-corrected over all steps of "
    f"all encoders, p < 0.05, and a 95 % interval without zero {MARGIN}. Supported: every step of every "
    "encoder counts as a fall. "
    "Contradicted: some step counts as a rise. Undecided: otherwise."
)


@dataclass(frozen=True)
class Answer:
    """Answer to one hypothesis; subclasses define its name `hypothesis` and its `claim`.

    Attributes:
        metric: name of the metric
        setting: way of decoding
        verdict: `SUPPORTED`, `CONTRADICTED`, `UNDECIDED` or `UNTESTABLE`
        rule: the rule that the verdict follows
        reason: why, in words
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
        encoder: name of the encoder
        layers: names of its layers
        means: mean score of each layer
        steps: comparisons of layer i + 1 with layer i
        tau: Kendall's tau between depth and the layers' mean quality
        tau_p: its exact p-value, which cannot be small for few layers: 1/12 at best for four
        tau_within: mean over images of tau within an image
        monotone: number of images whose quality falls at every step
        verdict: the verdict on this encoder
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
class Depth(Answer):
    """Answer to H1 for one metric and one setting.

    Attributes:
        encoders: answers for each encoder with two or more layers
    """

    encoders: tuple[DepthOfEncoder, ...]
    hypothesis: str = "H1"
    claim: str = "quality falls monotonically with depth"


def falls_with_depth(rows: list[Row], metric: str) -> Depth:
    """Test H1 on every step from layer to layer of every encoder, as one family of tests.

    Args:
        rows: one or more rows of one setting with one source each
        metric: name of the metric
    """
    encoders: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.order):
        encoders.setdefault(row.encoder, []).append(row)
    encoders = {name: layers for name, layers in encoders.items() if len(layers) > 1}
    if not encoders:
        reason = "needs two or more layers of one encoder, decoded alike"
        return Depth(metric, rows[0].setting, UNTESTABLE, RULE, reason, ())

    steps = corrected(
        [compare(deep, shallow, metric) for layers in encoders.values() for shallow, deep in pairwise(layers)]
    )
    results = []
    for name, layers in encoders.items():
        own, steps = steps[: len(layers) - 1], steps[len(layers) - 1 :]
        results.append(_encoder(name, layers, own, metric))
    verdicts = {r.verdict for r in results}
    verdict = next((v for v in (CONTRADICTED, UNDECIDED) if v in verdicts), SUPPORTED)
    parts = [f"{v} for {', '.join(r.encoder for r in results if r.verdict == v)}" for v in sorted(verdicts)]
    reason = "; ".join(parts)
    if len(verdicts) == 1:
        reason = f"for {', '.join(r.encoder for r in results)}" + (" alike" if len(results) > 1 else "")
    return Depth(metric, rows[0].setting, verdict, RULE, reason, tuple(results))


def _encoder(name: str, layers: list[Row], steps: list[Comparison], metric: str) -> DepthOfEncoder:
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
        means=tuple(float(m) for m in scores.mean(axis=0)),
        steps=tuple(steps),
        tau=float(np.nan_to_num(tau)),
        tau_p=1.0 if np.isnan(tau_p) else float(tau_p),
        tau_within=mean_interval(kendall_within(quality)),
        monotone=int((np.diff(quality, axis=1) < 0).all(axis=1).sum()),
        verdict=verdict,
    )
