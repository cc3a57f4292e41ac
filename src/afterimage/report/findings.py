"""Findings of a study as a report shows them: a verdict, its rule, sentences and tables of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap

from afterimage.config import counted
from afterimage.evaluation.intervals import NAME, RESAMPLES
from afterimage.report.format import (
    ahead,
    difference,
    estimate_text,
    minus,
    p_value,
    ratio,
    score,
    told_apart,
)
from afterimage.report.sides import BothSides, Hypothesis, Sides
from afterimage.report.statistics.analysis import Analysis, Efficiency
from afterimage.report.statistics.hypotheses import UNTESTABLE, Architectures, Depth, Resolution, no_partial
from afterimage.report.statistics.rows import without_random_controls
from afterimage.report.statistics.tests import Comparison
from afterimage.runs.results import METRICS

NONE = "–"


@dataclass(frozen=True)
class Numbers:
    """A table of text cells. They contain names from run folders: escape them for output."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Finding:
    """One finding. `verdict` and `rule` are empty where something is measured but nothing decided."""

    title: str
    verdict: str = ""
    rule: str = ""
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Numbers, ...] = ()
    wide: bool = False  # takes the full width of the page; its tables are never folded


def find(analysis: Analysis, both: BothSides | None = None) -> list[Finding]:
    """Return findings on H1, H2, H3, degradation, costs, decoders and fusions, as far as there are data.

    Wherever single layers were decoded, all three hypotheses are included: one that cannot be tested says
    why. With `both`, each is judged for the measured bounds too.
    """
    if not any(row.sources for row in analysis.rows):
        return [Finding("No decoder to judge", paragraphs=(_overview(analysis),)), *_left_out(analysis)]
    metric = analysis.scores[0].metric
    extra = {"H3": tuple(_disagreements(analysis.architectures))}
    findings = [
        _hypothesis(
            getattr(analysis, name), numbers, extra.get(hypothesis, ()), Sides.of(name, analysis, both)
        )
        for hypothesis, name, numbers in (
            ("H1", "depth", _depth),
            ("H2", "resolution", _resolution),
            ("H3", "architectures", _architectures),
        )
        if getattr(analysis, name)
    ]
    if not findings:
        findings.append(
            Finding(
                "H1, H2 and H3 are not testable",
                UNTESTABLE,
                paragraphs=("Every row fuses several sources: no single layer to compare.",),
            )
        )
    findings += [*_degradation(analysis), *_costs(analysis, metric), *_decoders(analysis, metric)]
    if analysis.fusions:
        against = tuple(map(_against, analysis.fusions))
        findings.append(Finding("Fusions against their best member", paragraphs=against))
    return findings + _left_out(analysis)


def _left_out(analysis: Analysis) -> list[Finding]:
    notes = tuple(f"{note}." for note in analysis.notes)
    return [Finding("Left out", paragraphs=notes)] if notes else []


def how_to_read(analysis: Analysis) -> str:
    """Return the sentences before the findings."""
    text = _overview(analysis)
    if marks := dict.fromkeys(filter(None, (row.setting.control for row in analysis.rows))):
        text += f" Settings marked {' or '.join(marks)} are controls on untrained encoders: no verdict rests on them."
    return text


def _hypothesis(
    results: Sequence[Hypothesis], numbers: Callable[[Sequence[Hypothesis]], Iterable[Numbers]],
    extra: tuple[str, ...], side: Sides,
) -> Finding:  # fmt: skip
    first = results[0]
    main = [r for r in results if r.metric == first.metric and r.verdict != UNTESTABLE]
    paragraphs = []
    for result in main:
        told = f"{result.setting[0].upper()}{result.setting[1:]}: {result.verdict}, {result.reason}."
        more = _correlation(result) if isinstance(result, Resolution) else []
        paragraphs.append(" ".join([told, *more]))
    paragraphs += [*side.sentences, *extra, *_by_other_metrics(results), *_not_testable(results)]
    tables = tuple(table for table in (*starmap(Numbers, side.tables), *numbers(main)) if table.rows)
    verdict, of_bound = _overall(main), [r for r in side.bound if r.metric == first.metric]
    if main and of_bound and (other := _overall(of_bound)) != verdict:
        verdict = f"{verdict} for decoders, {other} for the measured bound"
    return Finding(
        f"{first.hypothesis}: {first.claim}",
        verdict,
        first.rule if main else "",
        tuple(paragraphs),
        tables,
    )


def _overall(results: Sequence[Hypothesis]) -> str:
    """Return one verdict, or each with its decoders. Random controls count only if there is nothing else."""
    counted = without_random_controls(results)
    settings: dict[str, list[str]] = {}
    for result in counted or results:
        settings.setdefault(result.verdict, []).append(result.setting)
    if not settings:
        return UNTESTABLE
    told = "; ".join(f"{verdict} with {', '.join(names)}" for verdict, names in settings.items())
    told = told if len(settings) > 1 else next(iter(settings))
    marks = dict.fromkeys(r.setting.control for r in results)
    return told if counted else f"{told} ({' and '.join(marks)} only)"


def _depth(results: Sequence[Depth]) -> Iterable[Numbers]:
    encoders, steps = [], []
    for r in results:
        for e in r.encoders:
            tau = f"{minus(f'{e.tau:.2f}', 2)} ({p_value(e.tau_p)})"
            monotone = f"{e.monotone} of {e.tau_within.count}"
            encoders.append((r.setting, e.encoder, e.verdict, tau, estimate_text(e.tau_within), monotone))
            for i, step in enumerate(e.steps):
                names = f"{e.layers[i]} → {e.layers[i + 1]}"
                steps.append((r.setting, e.encoder, names, *_difference(step)))
    header = (
        "decoder",
        "encoder",
        "verdict",
        "Kendall's tau (exact p)",
        "tau within an image, mean",
        "images that fall at every step",
    )
    yield Numbers("Each encoder", header, tuple(encoders))
    yield Numbers(
        "Each step, paired by image", ("decoder", "encoder", "step", *_heads(results)), tuple(steps)
    )


def _resolution(results: Sequence[Resolution]) -> Iterable[Numbers]:
    rows = [
        (r.setting, f"{p.height}×{p.width}", p.comparison.a, p.comparison.b, *_difference(p.comparison))
        for r in results
        for p in r.pairs
    ]
    yield Numbers(
        "Layers of equal resolution", ("decoder", "resolution", "A", "B", *_heads(results)), tuple(rows)
    )


def _architectures(results: Sequence[Architectures]) -> Iterable[Numbers]:
    rows, won = [], []
    for r in results:
        for p in r.pairs:
            c = p.comparison
            sizes = f"{c.parameters_a:,} / {c.parameters_b:,}" + (" (equal)" if c.matched_capacity else "")
            wins = f"{c.wins_a} / {c.wins_b} of {c.difference.count}"
            place = (r.setting, f"{p.height}×{p.width}", c.a, c.b)
            rows.append((*place, *_difference(c), wins, sizes, minus(f"{c.agreement:.2f}", 2)))
            won.append((*place, ", ".join(c.won_a[:5]) or NONE, ", ".join(c.won_b[:5]) or NONE))
    header = ("decoder", "resolution", "A", "B", *_heads(results))
    header += ("images won (A / B)", "decoder parameters (A / B)", "agreement")
    yield Numbers("First layers of equal resolution", header, tuple(rows))
    yield Numbers("Images won most clearly", ("decoder", "resolution", "A", "B", "by A", "by B"), tuple(won))


def _heads(results: Sequence[Hypothesis]) -> tuple[str, str]:
    metric = results[0].metric if results else "psnr"
    return f"{METRICS[metric].title} difference [95 % interval]", "p (Holm)"


def _difference(c: Comparison) -> tuple[str, str]:
    negligible = " (negligible)" if not c.better and "negligible" in told_apart(c) else ""
    return difference(c) + negligible, p_value(c.p_holm).removeprefix("p ").removeprefix("= ")


def _degradation(analysis: Analysis) -> Iterable[Finding]:
    results = analysis.degradation
    if not results:
        return
    rows = []
    for d in results:
        low, high = sorted((d.percent.low, d.percent.high))
        percent, low, high = (minus(f"{v:+.1f}", 1) for v in (d.percent.estimate, low, high))
        rows.append(
            (d.setting, d.encoder, METRICS[d.metric].title, f"{d.best} ({score(d.drop.mean_b, d.metric)})",
             f"{d.worst} ({score(d.drop.mean_a, d.metric)})", difference(d.drop), f"{percent} % [{low}, {high}]",
             f"{ahead(d.runner_up)} {d.runner_up.b}")
        )  # fmt: skip
    header = (
        "decoder",
        "encoder",
        "metric",
        "best layer",
        "worst layer",
        "difference",
        "per cent",
        "the best layer is",
    )
    sentences = []
    counted = without_random_controls(results)
    for metric in dict.fromkeys(d.metric for d in counted):
        change = sorted(abs(d.percent.estimate) for d in counted if d.metric == metric)
        span = f"{change[0]:.0f}" if len(change) == 1 else f"{change[0]:.0f} to {change[-1]:.0f}"
        sentences.append(f"{METRICS[metric].title} changes by {span} %")
    text = f"From the best to the worst layer of an encoder, {'; '.join(sentences)}." if sentences else ""
    yield Finding(
        "How far decoders fall from the best layer to the worst",
        paragraphs=(text,) if text else (),
        tables=(Numbers("Best and worst layers", header, tuple(rows)),),
    )


def _costs(analysis: Analysis, metric: str) -> Iterable[Finding]:
    costs = [e for e in analysis.efficiency if e.metric == metric]
    baseline = next((e.baseline for e in costs if e.gain is not None), None)
    if baseline is None:
        return
    rows = [
        (e.name, e.setting, NONE if e.gain is None else score(e.gain, metric),
         *(NONE if v is None else ratio(v) for v in (e.per_minute, e.per_million_parameters, e.per_thousand_values)))
        for e in costs
    ]  # fmt: skip
    above = "above the mean colour" if baseline else "in all"
    header = (
        "features",
        "decoder",
        f"{METRICS[metric].title} {above}",
        "per minute of training",
        "per million parameters",
    )
    table = Numbers("Every row", (*header, "per thousand feature values"), tuple(rows))
    yield Finding("What quality costs", paragraphs=tuple(_best_buys(costs)), tables=(table,))


def _decoders(analysis: Analysis, metric: str) -> Iterable[Finding]:
    rankings = [d for d in analysis.decoders if d.metric == metric]
    if not rankings:
        return
    rows = []
    for ranking in rankings:
        # The first pairs compare the best with each other setting, in this order.
        best, *others = (
            f"{name} ({score(mean, metric)})"
            for name, mean in zip(ranking.settings, ranking.means, strict=True)
        )
        for other, c in zip(others, ranking.pairs, strict=False):
            rows.append((ranking.name, best, other, *_difference(c)))
    led = Counter(ranking.settings[0] for ranking in rankings)
    told = ", ".join(f"{setting} on {count}" for setting, count in led.most_common())
    header = (
        "features",
        "best",
        "against",
        f"{METRICS[metric].title} difference [95 % interval]",
        "p (Holm)",
    )
    yield Finding(
        "Decoders on the same features",
        paragraphs=(f"Best mean {METRICS[metric].title} on {len(rankings)} layers or fusions: {told}.",),
        tables=(Numbers("The best against each other", header, tuple(rows)),),
    )


def _correlation(result: Resolution) -> list[str]:
    """Describe how quality depends on the number of locations, and how much resolution accounts for."""
    if result.correlation is None:
        return []
    text = (
        f"Over {result.layers} layers, quality and the number of locations have a rank correlation of "
        f"{estimate_text(result.correlation)} ({p_value(result.correlation_p or 0.0)})"
    )
    if result.partial is not None:
        text += (
            f", and of {estimate_text(result.partial)} given channels ({p_value(result.partial_p or 0.0)})"
        )
    elif (why := no_partial(result.layers)) not in result.reason:
        text += f"; {why}"
    if result.share is not None:
        values = (result.share.estimate, result.share.low, result.share.high)
        share = [minus(f"{100 * max(v, 0):.0f}", 0) for v in values]
        text += (
            f". Resolution accounts for {share[0]} % [{share[1]}, {share[2]}] of the variance between layers "
            "(epsilon squared)"
        )
    return [text + "."]


def _against(c: Comparison) -> str:
    """Describe a comparison in one sentence."""
    outcome = {"a": "better than", "b": "worse than"}.get(c.better) or ahead(c)
    return (
        f"{c.a[0].upper()}{c.a[1:]} is {outcome} {c.b} in {METRICS[c.metric].title}: {difference(c)} "
        f"({p_value(c.p_holm)}, better on {c.wins_a} of {c.difference.count} images)."
    )


def _overview(analysis: Analysis) -> str:
    """Describe what was compared, on how many images, and how to read the numbers."""
    decoded = [row for row in analysis.rows if row.sources]
    if not decoded:
        return "No finished decoder with scores of 2 images or more: nothing to compare."
    counts = sorted({score.mean.count for score in analysis.scores})
    images = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seeds = max(len(row.runs) for row in decoded)
    averaged = "scores are averaged over seeds first" if seeds > 1 else "each row has one seed"
    return (
        f"{counted(len(decoded), 'row')} on {images} test images. All intervals are {NAME}s (bias-corrected and "
        f"accelerated bootstrap over images, {RESAMPLES:,} resamples); differences are paired by image. "
        f"They say what other test images would change, not what other seeds would: {averaged}."
    )


def _by_other_metrics(results: Sequence[Depth | Resolution | Architectures]) -> list[str]:
    """Return the verdicts by SSIM and LPIPS in one sentence."""
    verdicts: dict[str, dict[str, list[str]]] = {}
    for r in results:
        if r.verdict != UNTESTABLE and r.metric != results[0].metric:
            verdicts.setdefault(METRICS[r.metric].title, {}).setdefault(r.verdict, []).append(r.setting)
    told = [
        f"{metric}: " + ", ".join(f"{verdict} ({'; '.join(s)})" for verdict, s in by_verdict.items())
        for metric, by_verdict in verdicts.items()
    ]
    return [f"{results[0].hypothesis} by the other metrics: {'. '.join(told)}."] if told else []


def _not_testable(results: Sequence[Depth | Resolution | Architectures]) -> list[str]:
    """Return a sentence for each reason why settings are not testable."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result.verdict == UNTESTABLE and result.metric == results[0].metric:
            reasons.setdefault(result.reason, []).append(result.setting)
    return [
        f"{results[0].hypothesis} is not testable with {', '.join(settings)}: {reason}."
        for reason, settings in reasons.items()
    ]


def _disagreements(results: Sequence[Architectures]) -> list[str]:
    """Describe pairs of which one metric prefers one side and another metric the other."""
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


def _best_buys(rows: list[Efficiency]) -> list[str]:
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
            told.append(f"per {cost} {value} from {best.name} ({best.setting})")
    if not told:
        return []
    above = " above the mean colour" if any(row.baseline for row in rows) else ""
    return [f"Most {METRICS[rows[0].metric].title}{above}: {'; '.join(told)}."]
