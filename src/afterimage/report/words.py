"""Results in words: paragraphs of plain text, every number from the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from afterimage.report.format import (
    ahead,
    difference,
    estimate_text,
    minus,
    number,
    p_value,
    ratio,
    score,
    span,
    told_apart,
)
from afterimage.report.statistics.analysis import Analysis
from afterimage.report.statistics.architectures import Architectures
from afterimage.report.statistics.depth import UNTESTABLE, Depth, DepthOfEncoder
from afterimage.report.statistics.rankings import DecoderRanking, Degradation, Efficiency, Score
from afterimage.report.statistics.resolution import MatchedPair, Resolution
from afterimage.report.statistics.rows import without_random_controls
from afterimage.report.statistics.tests import Comparison
from afterimage.runs.results import METRICS

_PAIRS_TOLD = 12


@singledispatch
def in_words(result: Any) -> list[str]:
    """Say a result (an `Analysis` or any part of it, or a list of parts) in paragraphs of plain text."""
    raise TypeError(f"no words for {type(result).__name__}")


@in_words.register(list)
@in_words.register(tuple)
def _(results: Sequence[Any]) -> list[str]:
    return [paragraph for result in results for paragraph in in_words(result)]


def _verdict(result: Depth | Resolution | Architectures) -> str:
    head = f"{result.hypothesis}, {result.claim} ({METRICS[result.metric].title}, {result.setting}): {result.verdict}"
    return f"{head}: {result.reason}." if result.verdict == UNTESTABLE else f"{head} ({result.reason})."


@in_words.register
def _(result: Depth) -> list[str]:
    return [f"{_verdict(result)} Rule: {result.rule}", *(_encoder(e, result.metric) for e in result.encoders)]


def _encoder(e: DepthOfEncoder, metric: str) -> str:
    steps = []
    for i, step in enumerate(e.steps):
        steps.append(f"{e.layers[i]} to {e.layers[i + 1]} {difference(step)}{told_apart(step)}")
    return (
        f"{e.encoder}: {e.verdict}. {'; '.join(steps)}. Kendall's tau between depth and mean quality is "
        f"{minus(f'{e.tau:.2f}', 2)} over {len(e.layers)} layers (exact {p_value(e.tau_p)}); within a "
        f"image it is {estimate_text(e.tau_within)} on average, and {e.monotone} of {e.tau_within.count} images "
        "fall at every step."
    )


@in_words.register
def _(result: Resolution) -> list[str]:
    paragraphs = [f"{_verdict(result)} Rule: {result.rule}"]
    if result.correlation is None:
        return paragraphs
    text = (
        f"Over {result.layers} layers, quality and the number of locations have a rank correlation of "
        f"{estimate_text(result.correlation)} ({p_value(result.correlation_p or 0.0)})"
    )
    if result.partial is not None:
        text += (
            f", and of {estimate_text(result.partial)} given channels ({p_value(result.partial_p or 0.0)})"
        )
    else:
        text += "; what channels add cannot be told apart over these layers"
    if result.share is not None:
        share = [
            minus(f"{100 * max(v, 0):.0f}", 0)
            for v in (result.share.estimate, result.share.low, result.share.high)
        ]
        text += (
            f". Resolution accounts for {share[0]} % [{share[1]}, {share[2]}] of the variance between layers "
            "(epsilon squared)"
        )
    paragraphs.append(text + ".")
    across = [pair for pair in result.pairs if not pair.same_encoder]
    if across:
        paragraphs.append(_pairs("Matched resolution, different encoders", across))
    within = [pair for pair in result.pairs if pair.same_encoder]
    if within:
        widest = max(within, key=lambda pair: abs(pair.comparison.difference.estimate))
        c = widest.comparison
        apart = sum(pair.comparison.better is not None for pair in within)
        unexplained = " Resolution cannot explain that." if apart else ""
        paragraphs.append(
            f"Layers of one encoder at one resolution differ in depth: {apart} of {len(within)} such pairs "
            f"differ in quality, most of all {c.a} against {c.b} at {widest.height}x{widest.width}, "
            f"{difference(c)}.{unexplained}"
        )
    return paragraphs


def _pairs(title: str, pairs: list[MatchedPair]) -> str:
    told = pairs[:_PAIRS_TOLD]
    rest = f"; and {len(pairs) - len(told)} more" if len(pairs) > len(told) else ""
    return f"{title}: {'; '.join(_pair(pair) for pair in told)}{rest}."


def _pair(pair: MatchedPair) -> str:
    c = pair.comparison
    return f"{pair.height}x{pair.width} {c.a} against {c.b} {difference(c)}{told_apart(c)}"


@in_words.register
def _(result: Architectures) -> list[str]:
    paragraphs = [f"{_verdict(result)} Rule: {result.rule}"]
    for pair in result.pairs:
        c = pair.comparison
        size = "decoders of equal size"
        if not c.matched_capacity:
            size = f"decoders of {c.parameters_a / 1e6:.2f} M and {c.parameters_b / 1e6:.2f} M parameters"
        tie = c.difference.count - c.wins_a - c.wins_b
        won = f"{c.a} wins {c.wins_a} and {c.b} {c.wins_b}" + (f" ({tie} ties)" if tie else "")
        clearest = "; ".join(
            f"{name} most clearly {', '.join(ids[:3])}"
            for name, ids in ((c.a, c.won_a), (c.b, c.won_b))
            if ids
        )
        paragraphs.append(
            f"{_pair(pair)}; {size}. Of {c.difference.count} images, {won}; "
            f"{clearest or 'none clearly'}. Over images, their scores have a rank "
            f"correlation of {minus(f'{c.agreement:.2f}', 2)}."
        )
    return paragraphs


@in_words.register
def _(result: Degradation) -> list[str]:
    c, percent = result.drop, result.percent
    low, high = sorted((percent.low, percent.high))
    changes = [minus(f"{v:+.1f}", 1) for v in (percent.estimate, low, high)]
    second = result.runner_up
    return [
        f"{result.encoder} ({METRICS[result.metric].title}, {result.setting}): from {result.best} "
        f"({score(c.mean_b, c.metric)}) to {result.worst} ({score(c.mean_a, c.metric)}), {difference(c)}, "
        f"{changes[0]} % [{changes[1]}, {changes[2]}]. Its best layer is {ahead(second)} {second.b}: "
        f"{difference(second)} ({p_value(second.p_holm)})."
    ]


@in_words.register
def _(result: DecoderRanking) -> list[str]:
    pairs = zip(result.settings, result.means, strict=True)
    ranking = ", ".join(f"{name} {score(mean, result.metric)}" for name, mean in pairs)
    first = result.pairs[: len(result.settings) - 1]
    leads = "; ".join(f"against {c.b} {difference(c)}{told_apart(c)}" for c in first)
    return [
        f"{result.name} ({METRICS[result.metric].title}), decoders best first: {ranking}. The first {leads}."
    ]


@in_words.register
def _(result: Comparison) -> list[str]:
    outcome = {"a": "better than", "b": "worse than"}.get(result.better) or ahead(result)
    return [
        f"{result.a} is {outcome} {result.b} in {METRICS[result.metric].title}: {difference(result)} "
        f"({p_value(result.p_holm)}, better on {result.wins_a} of {result.difference.count} images)."
    ]


@in_words.register
def _(result: Score) -> list[str]:
    spread = ""
    if result.seed_spread is not None:
        spread = f"; between {result.seeds} seeds ±{number(result.seed_spread, result.metric)}"
    return [
        f"{result.name} ({result.setting}): {score(result.mean.estimate, result.metric)} "
        f"{span(result.mean, result.metric, signed=False)} over {result.mean.count} images{spread}."
    ]


@in_words.register
def _(result: Efficiency) -> list[str]:
    costs = {
        "minute of training": result.per_minute,
        "million decoder parameters": result.per_million_parameters,
        "thousand feature values": result.per_thousand_values,
    }
    told = [
        f"{ratio(v)}{METRICS[result.metric].unit} per {cost}" for cost, v in costs.items() if v is not None
    ]
    if result.gain is None or not told:
        return []
    above = "above the mean colour" if result.baseline else "in all"
    gain = f"{number(result.gain, result.metric)}{METRICS[result.metric].unit} {above}"
    return [f"{result.name} ({METRICS[result.metric].title}, {result.setting}): {gain}; {', '.join(told)}."]


@in_words.register
def _(analysis: Analysis) -> list[str]:
    """The whole study: PSNR in full, the other metrics by their verdicts; of costs, the best buys."""
    notes = [f"{note}." for note in analysis.notes]
    if not any(row.sources for row in analysis.rows):
        return [overview(analysis), *notes]
    paragraphs = [overview(analysis)]
    for group in (analysis.depth, analysis.resolution, analysis.architectures):
        paragraphs += _hypothesis(group)
    paragraphs += disagreements(analysis.architectures)
    main = analysis.scores[0].metric
    paragraphs += in_words([d for d in analysis.degradation if d.metric == main])
    paragraphs += best_buys([e for e in analysis.efficiency if e.metric == main])
    paragraphs += in_words([d for d in analysis.decoders if d.metric == main])
    paragraphs += in_words(analysis.fusions)
    return paragraphs + notes


def overview(analysis: Analysis) -> str:
    """What was compared, on how many images, and how to read the numbers."""
    decoded = [row for row in analysis.rows if row.sources]
    if not decoded:
        return "No finished decoder with scores of 2 images or more: nothing to compare."
    counts = sorted({score.mean.count for score in analysis.scores})
    images = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seeds = max(len(row.runs) for row in decoded)
    averaged = "scores are averaged over seeds first" if seeds > 1 else "each row has one"
    return (
        f"{len(decoded)} rows on {images} test images. Brackets are 95 % bootstrap intervals over "
        f"images (BCa for means, {analysis.resamples:,} resamples); differences are paired by image. "
        f"They speak of other images, not of other seeds: {averaged}."
    )


def _hypothesis(results: Sequence[Depth | Resolution | Architectures]) -> list[str]:
    """One hypothesis: the rule once, the first metric setting by setting, the other metrics' verdicts."""
    if not results:
        return []
    testable = [r for r in results if r.verdict != UNTESTABLE]
    main = [r for r in testable if r.metric == results[0].metric]
    paragraphs = [f"{results[0].hypothesis}, {results[0].claim}. Rule: {results[0].rule}"]
    for result in main:
        paragraphs += [_verdict(result), *in_words(result)[1:]]
    return paragraphs + by_other_metrics(results) + not_testable(results)


def by_other_metrics(results: Sequence[Depth | Resolution | Architectures]) -> list[str]:
    """The verdicts by SSIM and LPIPS, in a sentence."""
    verdicts: dict[str, dict[str, list[str]]] = {}
    for r in results:
        if r.verdict != UNTESTABLE and r.metric != results[0].metric:
            verdicts.setdefault(METRICS[r.metric].title, {}).setdefault(r.verdict, []).append(r.setting)
    told = [
        f"{metric}: " + ", ".join(f"{verdict} ({'; '.join(s)})" for verdict, s in by_verdict.items())
        for metric, by_verdict in verdicts.items()
    ]
    return [f"{results[0].hypothesis} by the other metrics: {'. '.join(told)}."] if told else []


def not_testable(results: Sequence[Depth | Resolution | Architectures]) -> list[str]:
    """The settings that cannot answer, by what they lack."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result.verdict == UNTESTABLE and result.metric == results[0].metric:
            reasons.setdefault(result.reason, []).append(result.setting)
    return [
        f"{results[0].hypothesis} is not testable with {', '.join(settings)}: {reason}."
        for reason, settings in reasons.items()
    ]


def disagreements(results: Sequence[Architectures]) -> list[str]:
    """Pairs where one metric prefers one side and another the other: neither simply keeps more."""
    sides: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in results:
        for pair in result.pairs:
            c = pair.comparison
            if c.better:
                winner = c.a if c.better == "a" else c.b
                sides.setdefault((result.setting, c.a, c.b), {})[METRICS[result.metric].title] = winner
    return [
        f"{a} against {b} ({setting}): the metrics disagree on which keeps more, "
        + ", ".join(f"{metric} prefers {winner}" for metric, winner in by_metric.items())
        + "."
        for (setting, a, b), by_metric in sides.items()
        if len(set(by_metric.values())) > 1
    ]


def best_buys(rows: list[Efficiency]) -> list[str]:
    told = []
    for field, cost in (
        ("per_minute", "minute of training"),
        ("per_million_parameters", "million decoder parameters"),
        ("per_thousand_values", "thousand feature values"),
    ):
        known = [row for row in without_random_controls(rows) or rows if getattr(row, field) is not None]
        if len(known) > 1:
            best = max(known, key=lambda row: getattr(row, field))
            value = f"{ratio(getattr(best, field))}{METRICS[best.metric].unit}"
            told.append(f"per {cost} from {best.name} ({best.setting}), {value}")
    if not told:
        return []
    above = " above the mean colour" if any(row.baseline for row in rows) else ""
    return [f"Most {METRICS[rows[0].metric].title}{above} {'; '.join(told)}."]
