"""Findings of a study: its hypotheses, rankings and costs, and the comparison with the published figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from afterimage.config import AfterimageError, format_count
from afterimage.evaluation.intervals import INTERVAL_NAME, RESAMPLES
from afterimage.report.bounds import Bound, comparison_rows
from afterimage.report.format import (
    MISSING,
    Finding,
    TextTable,
    capitalised,
    extent,
    format_score_with_unit,
    markdown,
    markdown_finding,
    markdown_grid,
    p_value,
    ratio,
    with_minus_sign,
)
from afterimage.report.hypotheses import ahead, difference, difference_cells, hypothesis_finding, tied
from afterimage.report.published import published_finding
from afterimage.report.rows import Row, group_by
from afterimage.report.statistics.analysis import Analysis, Efficiency, analyse
from afterimage.report.statistics.hypotheses import UNTESTABLE
from afterimage.report.statistics.paired_tests import Comparison
from afterimage.report.statistics.rows import without_random_controls
from afterimage.runs.results import METRICS


@dataclass(frozen=True)
class StudyFindings:
    """Everything that a report says beyond its rows.

    Attributes:
        lead: text before the findings
        findings: the findings; empty where they could not be computed
        published: comparison with the published figures; None where no row repeats a published one
        json: content of findings.json
        problems: sentences on what could not be computed, and why
    """

    lead: str
    findings: tuple[Finding, ...]
    published: Finding | None
    json: str
    problems: tuple[str, ...]


def compute_findings(rows: Sequence[Row], bounds: Sequence[Bound] = ()) -> StudyFindings:
    """Compute the findings and the comparison with the published figures.

    Args:
        rows: finished runs
        bounds: their measured bounds

    Returns:
        the findings; where a part raises an `AfterimageError`, its message is among the problems
    """
    problems, lead, findings, published = [], "", (), None
    values = {"problems": problems}
    try:
        analysis = analyse(rows)
        sides = [analyse(side) for side in comparison_rows(bounds)] if bounds else []
        lead, findings = how_to_read(analysis), tuple(build_findings(analysis, sides))
        values = analysis.as_dict()
        names = ("decoders_beside_bound", "measured_bound")
        values |= {name: side.as_dict() for name, side in zip(names, sides, strict=False)}
    except AfterimageError as error:
        problems.append(f"The findings could not be computed: {error}")
    try:
        published = published_finding(rows)
    except AfterimageError as error:
        problems.append(f"The comparison with the published figures could not be computed: {error}")
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    return StudyFindings(lead, findings, published, text + "\n", tuple(problems))


def markdown_findings(study: StudyFindings) -> list[str]:
    """Write the section of findings as blocks: a table of the verdicts, then each finding with its tables."""
    blocks = [f"> **{markdown(problem)}**" for problem in study.problems]
    if not study.findings:
        return blocks
    blocks.append(markdown(study.lead))
    verdicts = [(markdown(f.title), f"**{markdown(f.verdict)}**") for f in study.findings if f.verdict]
    if verdicts:
        blocks.append(markdown_grid(("hypothesis", "verdict"), verdicts))
    return blocks + [block for finding in study.findings for block in markdown_finding(finding, "###")]


def build_findings(analysis: Analysis, sides: Sequence[Analysis] = ()) -> list[Finding]:
    """Return findings on H1, H2, H3, degradation, costs, decoders and fusions, as far as there are data.

    If single layers were decoded, all three hypotheses are included; one that cannot be tested says why. With
    `sides` (analyses of decoders and of their bounds), each is judged for the measured bounds too.
    """
    left_out = tuple(f"{note}." for note in analysis.notes)
    last = [Finding("Left out", paragraphs=left_out)] if left_out else []
    if not any(row.sources for row in analysis.rows):
        return [Finding("No decoder to judge", paragraphs=(_overview(analysis),)), *last]
    metric = analysis.scores[0].metric
    if analysis.depth:
        names = ("depth", "resolution", "architectures")
        findings = [hypothesis_finding(name, analysis, sides) for name in names]
    else:
        reason = "Every row fuses several sources: no single layer to compare."
        findings = [Finding("H1, H2 and H3 are not testable", UNTESTABLE, paragraphs=(reason,))]
    findings += [*_degradation(analysis), *_costs(analysis, metric), *_decoders(analysis, metric)]
    if analysis.fusions:
        against = tuple(map(_against, analysis.fusions))
        findings.append(Finding("Fusions against their best member", paragraphs=against))
    return findings + last


def how_to_read(analysis: Analysis) -> str:
    """Return the sentences before the findings."""
    text = _overview(analysis)
    if marks := dict.fromkeys(filter(None, (row.setting.control for row in analysis.rows))):
        text += f" Settings marked {' or '.join(marks)} are controls on untrained encoders: no verdict rests on them."
    return text


def _overview(analysis: Analysis) -> str:
    """Describe what was compared, on how many images, and how to read the numbers."""
    decoded = [row for row in analysis.rows if row.sources]
    if not decoded:
        return "No finished decoder with scores of 2 images or more: nothing to compare."
    images = extent(score.mean.count for score in analysis.scores)
    seeds = max(len(row.runs) for row in decoded)
    averaged = "scores are averaged over seeds first" if seeds > 1 else "each row has one seed"
    return (
        f"{format_count(len(decoded), 'row')} on {images} test images. All intervals are "
        f"{INTERVAL_NAME}s (bias-corrected and "
        f"accelerated bootstrap over images, {RESAMPLES:,} resamples); differences are paired by image. "
        f"They say what other test images would change, not what other seeds would: {averaged}."
    )


def _degradation(analysis: Analysis) -> Iterable[Finding]:
    if not analysis.degradation:
        return
    rows = []
    for d in analysis.degradation:
        low, high = sorted((d.percent.low, d.percent.high))
        percent, low, high = (with_minus_sign(f"{v:+.1f}", 1) for v in (d.percent.estimate, low, high))
        best, worst = (
            f"{d.best} ({format_score_with_unit(d.drop.mean_b, d.metric)})",
            f"{d.worst} ({format_score_with_unit(d.drop.mean_a, d.metric)})",
        )
        change, second = f"{percent} % [{low}, {high}]", f"{ahead(d.runner_up)} {d.runner_up.b}"
        title = METRICS[d.metric].title
        rows.append((d.setting, d.encoder, title, best, worst, difference(d.drop), change, second))
    where = ("decoder", "encoder", "metric", "best layer", "worst layer")
    header = (*where, "difference", "per cent", "the best layer is")
    sentences = []
    for metric, own in group_by(without_random_controls(analysis.degradation), lambda d: d.metric).items():
        change = extent((abs(d.percent.estimate) for d in own), "{:.0f}".format)
        sentences.append(f"{METRICS[metric].title} changes by {change} %")
    text = f"From the best to the worst layer of an encoder, {'; '.join(sentences)}."
    yield Finding(
        "How far decoders fall from the best layer to the worst",
        paragraphs=(text,) if sentences else (),
        tables=(TextTable("Best and worst layers", header, tuple(rows)),),
    )


COSTS = {
    "per_minute": "minute of training",
    "per_million_parameters": "million decoder parameters",
    "per_thousand_values": "thousand feature values",
}
"""Costs to which quality is related, by the field of `Efficiency`."""


def _costs(analysis: Analysis, metric: str) -> Iterable[Finding]:
    costs = [e for e in analysis.efficiency if e.metric == metric]
    baseline = next((e.baseline for e in costs if e.gain is not None), None)
    if baseline is None:
        return
    rows = []
    for e in costs:
        ratios = (getattr(e, field) for field in COSTS)
        gains = (MISSING if value is None else ratio(value) for value in ratios)
        rows.append(
            (e.name, e.setting, MISSING if e.gain is None else format_score_with_unit(e.gain, metric), *gains)
        )
    above = "above the mean colour" if baseline else "in all"
    heads = ("per minute of training", "per million parameters", "per thousand feature values")
    header = ("features", "decoder", f"{METRICS[metric].title} {above}", *heads)
    yield Finding(
        "What quality costs",
        paragraphs=tuple(_most_efficient(costs)),
        tables=(TextTable("Every row", header, tuple(rows)),),
    )


def _most_efficient(rows: Sequence[Efficiency]) -> Iterable[str]:
    told = []
    for field, cost in COSTS.items():
        known = [row for row in without_random_controls(rows) or rows if getattr(row, field) is not None]
        if len(known) > 1:
            most = ratio(max(getattr(row, field) for row in known))
            best = [f"{row.name} ({row.setting})" for row in known if ratio(getattr(row, field)) == most]
            told.append(f"per {cost} {most}{METRICS[known[0].metric].unit} from {' and '.join(best)}")
    if told:
        above = " above the mean colour" if any(row.baseline for row in rows) else ""
        yield f"Most {METRICS[rows[0].metric].title}{above}: {'; '.join(told)}."


def _decoders(analysis: Analysis, metric: str) -> Iterable[Finding]:
    rankings = [d for d in analysis.decoders if d.metric == metric]
    if not rankings:
        return
    title, rows, led = METRICS[metric].title, [], Counter()
    for ranking in rankings:
        # The first pairs compare the best with each other setting, in this order.
        scores = (format_score_with_unit(mean, metric) for mean in ranking.means)
        best, *others = map("{} ({})".format, ranking.settings, scores)
        first = list(zip(others, ranking.pairs, strict=False))
        for other, c in first:
            rows.append((ranking.name, best, other, *difference_cells(c)))
        led[ranking.settings[0], *(c.b for _, c in first if tied(c))] += 1
    told = ", ".join(
        f"{' and '.join(settings)}{' tied' if len(settings) > 1 else ''} on {count}"
        for settings, count in led.most_common()
    )
    header = ("features", "best", "against", f"{title} difference [95 % interval]", "p (Holm)")
    yield Finding(
        "Decoders on the same features",
        paragraphs=(f"Best mean {title} on {len(rankings)} layers or fusions: {told}.",),
        tables=(TextTable("The best against each other", header, tuple(rows)),),
    )


def _against(c: Comparison) -> str:
    """Describe a comparison in one sentence."""
    outcome = {"a": "better than", "b": "worse than"}.get(c.better) or ahead(c)
    return (
        f"{capitalised(c.a)} is {outcome} {c.b} in {METRICS[c.metric].title}: {difference(c)} "
        f"({p_value(c.p_holm)}, better on {c.wins_a} of {c.difference.count} images)."
    )
