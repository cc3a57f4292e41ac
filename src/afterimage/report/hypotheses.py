"""The study's hypotheses in words and tables: verdicts for decoders, and beside them for the measured bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.format import (
    MISSING,
    Finding,
    TextTable,
    capitalised,
    estimate_text,
    format_score,
    interval_ends,
    p_value,
    with_minus_sign,
)
from afterimage.report.rows import group_by
from afterimage.report.statistics.analysis import Analysis
from afterimage.report.statistics.hypotheses import (
    SUPPORTED,
    UNDECIDED,
    UNTESTABLE,
    Architectures,
    Depth,
    Hypothesis,
    Resolution,
    no_partial,
)
from afterimage.report.statistics.paired_tests import Comparison
from afterimage.report.statistics.rows import without_random_controls
from afterimage.runs.results import METRICS


def hypothesis_finding(name: str, analysis: Analysis, sides: Sequence[Analysis] = ()) -> Finding:
    """Return the verdict on the hypothesis that the field `name` of an analysis answers, with its numbers.

    Args:
        name: name of the field
        analysis: analysis of the decoders on all images
        sides: analyses of decoders and of their measured bounds on the same images; empty without bounds
    """
    results: Sequence[Hypothesis] = getattr(analysis, name)
    first = results[0]
    decoders = _tested(results)
    same, bound = map(_tested, (getattr(side, name) for side in sides)) if sides else ([], [])
    # A decoder may lack a metric that its bound has: verdicts from other layers do not compare.
    judged = {key: _layers(found) for key, found in _by_key(bound).items()}
    apart = {key for key, found in _by_key(same).items() if judged.get(key) != _layers(found)}
    comparable, same = ([r for r in side if (r.metric, r.setting) not in apart] for side in (decoders, same))
    main, of_bound = ([r for r in side if r.metric == first.metric] for side in (decoders, bound))
    paragraphs = []
    for result in main:
        told = f"{capitalised(result.setting)}: {result.verdict}, {result.reason}."
        paragraphs.append(" ".join([told, *(_correlation(result) if name == "resolution" else ())]))
    paragraphs += _beside_bound(comparable, same, bound)
    paragraphs += _disagreements(results) if name == "architectures" else ()
    paragraphs += [*_by_other_metrics(decoders, first), *_not_testable(results)]
    heads = (f"{METRICS[first.metric].title} difference [95 % interval]", "p (Holm)")
    numbers = {"depth": _depth, "resolution": _resolution, "architectures": _architectures}[name](main, heads)
    tables = tuple(table for table in (*_bound_tables(decoders, same, bound), *numbers) if table.rows)
    verdict = _overall(main)
    if main and of_bound and (other := _overall(of_bound)) != verdict:
        verdict = f"{verdict} for decoders, {other} for the measured bound"
    rule = first.rule if main else ""
    return Finding(f"{first.hypothesis}: {first.claim}", verdict, rule, tuple(paragraphs), tables)


def _tested(results: Iterable[Hypothesis]) -> list[Hypothesis]:
    return [result for result in results if result.verdict != UNTESTABLE]


def _layers(result: Hypothesis) -> list[Any]:
    """Return what tells from which layers a verdict comes."""
    if isinstance(result, Depth):
        return [(each.encoder, each.layers) for each in result.encoders]
    pairs = [(pair.comparison.a, pair.comparison.b) for pair in result.pairs]
    return [result.layers, *pairs] if isinstance(result, Resolution) else pairs


def _overall(results: Sequence[Hypothesis]) -> str:
    """Return one verdict, or each with its decoders. Random controls count only if there is nothing else."""
    counted = without_random_controls(results)
    verdicts = group_by(counted or results, lambda result: result.verdict)
    if not verdicts:
        return UNTESTABLE
    told = next(iter(verdicts))
    if len(verdicts) > 1:
        told = "; ".join(f"{verdict} with {_settings(own)}" for verdict, own in verdicts.items())
    marks = dict.fromkeys(result.setting.control for result in results)
    return told if counted else f"{told} ({' and '.join(marks)} only)"


def _settings(results: Iterable[Hypothesis], separator: str = ", ") -> str:
    return separator.join(result.setting for result in results)


def _by_other_metrics(tested: Sequence[Hypothesis], first: Hypothesis) -> Iterable[str]:
    """Yield the verdicts by SSIM and LPIPS in one sentence."""
    others = group_by((r for r in tested if r.metric != first.metric), lambda r: METRICS[r.metric].title)
    told = []
    for metric, own in others.items():
        verdicts = group_by(own, lambda result: result.verdict).items()
        told.append(f"{metric}: " + ", ".join(f"{v} ({_settings(found, '; ')})" for v, found in verdicts))
    if told:
        yield f"{first.hypothesis} by the other metrics: {'. '.join(told)}."


def _not_testable(results: Sequence[Hypothesis]) -> Iterable[str]:
    """Yield a sentence for each reason why settings are not testable."""
    first = results[0]
    missing = (r for r in results if r.verdict == UNTESTABLE and r.metric == first.metric)
    for reason, own in group_by(missing, lambda result: result.reason).items():
        yield f"{first.hypothesis} is not testable with {_settings(own)}: {reason}."


def _disagreements(results: Sequence[Architectures]) -> Iterable[str]:
    """Describe pairs of which one metric prefers one side and another metric the other."""
    apart = [(r.setting, p.comparison) for r in results for p in r.pairs if p.comparison.better]
    for (setting, a, b), pairs in group_by(apart, lambda pair: (pair[0], pair[1].a, pair[1].b)).items():
        winners = {METRICS[c.metric].title: getattr(c, c.better) for _, c in pairs}
        if len(set(winners.values())) > 1:
            told = ", ".join(f"{metric} prefers {winner}" for metric, winner in winners.items())
            yield f"{a} against {b} ({setting}): the metrics disagree on which keeps more, {told}."


def _correlation(result: Resolution) -> Iterable[str]:
    """Describe how quality depends on the number of locations, and how much resolution accounts for."""
    text = (
        f"Over {result.layers} layers, quality and the number of locations have a rank correlation of "
        f"{estimate_text(result.correlation)} ({p_value(result.correlation_p)})"
    )
    if result.partial is not None:
        text += f", and of {estimate_text(result.partial)} given channels ({p_value(result.partial_p)})"
    elif (why := no_partial(result.layers)) not in result.reason:
        text += f"; {why}"
    if result.share is not None:
        values = (result.share.estimate, result.share.low, result.share.high)
        share = [with_minus_sign(f"{100 * max(v, 0):.0f}", 0) for v in values]
        text += (
            f". Resolution accounts for {share[0]} % [{share[1]}, {share[2]}] of the variance between layers "
            "(epsilon squared)"
        )
    yield text + "."


def difference(c: Comparison) -> str:
    """Write a difference such as `−1.32 dB [−1.45, −1.20]`."""
    estimate = format_score(c.difference.estimate, c.metric, signed=True)
    return f"{estimate}{METRICS[c.metric].unit} {interval_ends(c.difference, c.metric)}"


def ahead(c: Comparison) -> str:
    """Describe how `a`, the side with the better mean, compares with `b`, for example `ahead of`."""
    if c.better == "a":
        return "ahead of"
    if tied(c):
        return "tied with"
    return "negligibly different from" if c.certain else "not told apart from"


def tied(c: Comparison) -> bool:
    """Return True if neither side is better and the means do not differ in the digits that are printed."""
    return not c.better and format_score(c.difference.estimate, c.metric) == format_score(0.0, c.metric)


def difference_cells(c: Comparison) -> tuple[str, str]:
    """Return the cells of a comparison: its difference, marked if it is negligible or none, and its p-value."""
    mark = " (tie)" if tied(c) else " (negligible)" if c.certain and not c.better else ""
    return difference(c) + mark, p_value(c.p_holm).removeprefix("p ").removeprefix("= ")


def _depth(results: Sequence[Depth], heads: tuple[str, str]) -> Iterable[TextTable]:
    encoders, steps = [], []
    for r in results:
        for e in r.encoders:
            tau = f"{with_minus_sign(f'{e.tau:.2f}', 2)} ({p_value(e.tau_p)})"
            monotone = f"{e.monotone} of {e.tau_within.count}"
            encoders.append((r.setting, e.encoder, e.verdict, tau, estimate_text(e.tau_within), monotone))
            for names, step in zip(pairwise(e.layers), e.steps, strict=True):
                steps.append((r.setting, e.encoder, " → ".join(names), *difference_cells(step)))
    header = ("decoder", "encoder", "verdict", "Kendall's tau (exact p)", "tau within an image, mean")
    yield TextTable("Each encoder", (*header, "images that fall at every step"), tuple(encoders))
    yield TextTable("Each step, paired by image", ("decoder", "encoder", "step", *heads), tuple(steps))


def _resolution(results: Sequence[Resolution], heads: tuple[str, str]) -> Iterable[TextTable]:
    rows = [
        (r.setting, f"{p.height}×{p.width}", p.comparison.a, p.comparison.b, *difference_cells(p.comparison))
        for r in results
        for p in r.pairs
    ]
    yield TextTable("Layers of equal resolution", ("decoder", "resolution", "A", "B", *heads), tuple(rows))


def _architectures(results: Sequence[Architectures], heads: tuple[str, str]) -> Iterable[TextTable]:
    rows, won = [], []
    for r in results:
        for p in r.pairs:
            c = p.comparison
            sizes = f"{c.parameters_a:,} / {c.parameters_b:,}" + (" (equal)" if c.matched_capacity else "")
            wins = f"{c.wins_a} / {c.wins_b} of {c.difference.count}"
            place = (r.setting, f"{p.height}×{p.width}", c.a, c.b)
            rows.append((*place, *difference_cells(c), wins, sizes, with_minus_sign(f"{c.agreement:.2f}", 2)))
            won.append((*place, ", ".join(c.won_a[:5]) or MISSING, ", ".join(c.won_b[:5]) or MISSING))
    where = ("decoder", "resolution", "A", "B")
    header = (*where, *heads, "images won (A / B)", "decoder parameters (A / B)", "agreement")
    yield TextTable("First layers of equal resolution", header, tuple(rows))
    yield TextTable("Images won most clearly", (*where, "by A", "by B"), tuple(won))


def _by_key(results: Iterable[Hypothesis]) -> dict[tuple[str, str], Hypothesis]:
    return {(result.metric, result.setting): result for result in results}


def _beside_bound(
    decoders: Sequence[Hypothesis], same: Sequence[Hypothesis], bound: Sequence[Hypothesis]
) -> Iterable[str]:
    """Compare the verdicts for the bound with those for decoders, on all images and on the bound's (`same`).

    Agreement is stated for the first metric only, except where quality falls with depth for decoders.
    """
    of_decoders, of_same = _by_key(decoders), _by_key(same)
    for key, found in _by_key(bound).items():
        if (decoder := of_decoders.get(key)) is None:
            continue
        what, alike = f"{METRICS[found.metric].title}, {found.setting}", decoder.verdict == found.verdict
        few = (
            found.verdict == UNDECIDED and not alike and key in of_same and of_same[key].verdict == UNDECIDED
        )
        if isinstance(found, Depth) and decoder.verdict == SUPPORTED:
            yield (
                f"Quality falls with depth ({what}): the measured bound does too."
                if alike
                else "The decoder's score falls with depth over all test images; the images of the measured bound "
                f"are too few to tell ({what}): on them it is undecided for the decoder too."
                if few
                else f"The decoder's score falls with depth, the measured bound does not ({what}): "
                f"{found.verdict}, {found.reason}."
            )
        elif not alike:
            yield (
                f"Decoders and bound differ ({what}): {decoder.verdict} for decoders, {found.verdict} for the "
                f"bound{', as for decoders on its few images' if few else ''}, {found.reason}."
            )
        elif found.metric == bound[0].metric:
            yield f"The measured bound says the same ({what}): {found.verdict}, {found.reason}."
    if not bound and any(isinstance(r, Depth) and r.verdict == SUPPORTED for r in decoders):
        yield (
            "These are scores of decoders. Only a measured bound can tell whether the layers lose the detail or the "
            "decoders miss it (study --invert)."
        )


def _bound_tables(
    decoders: Sequence[Hypothesis], same: Sequence[Hypothesis], bound: Sequence[Hypothesis]
) -> Iterable[TextTable]:
    """Tabulate the verdicts of decoders and bound, and for H1 each step of both."""
    rows, steps = [], []
    of_decoders, of_same = _by_key(decoders), _by_key(same)
    for key, found in _by_key(bound).items():
        where = (METRICS[found.metric].title, found.setting)
        verdicts = [side[key].verdict if key in side else MISSING for side in (of_decoders, of_same)]
        rows.append((*where, *verdicts, found.verdict))
        if isinstance(found, Depth) and key in of_same:
            for decoder, encoder in zip(of_same[key].encoders, found.encoders, strict=True):
                each = zip(pairwise(encoder.layers), decoder.steps, encoder.steps, strict=True)
                for names, *pair in each:
                    steps.append((*where, encoder.encoder, " → ".join(names), *map(difference, pair)))
    header = ("metric", "decoder", "decoders, all images", "decoders, the bound's images", "measured bound")
    yield TextTable("Verdicts for decoders and for the measured bound", header, tuple(rows))
    header = (
        "metric",
        "decoder",
        "encoder",
        "step",
        f"decoder's difference [{INTERVAL_NAME}]",
        "the bound's",
    )
    yield TextTable("Each step of both, on the bound's images, paired by image", header, tuple(steps))
