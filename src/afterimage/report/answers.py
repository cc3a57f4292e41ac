"""Answers of a report beyond its rows: the findings and the comparison with the published figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from afterimage.config import AfterimageError
from afterimage.report.bounds import Bound, to_compare
from afterimage.report.findings import Finding, Numbers, find, how_to_read
from afterimage.report.format import markdown, markdown_grid, number
from afterimage.report.published import Beside, beside_published
from afterimage.report.rows import Row
from afterimage.report.sides import BothSides
from afterimage.report.statistics.analysis import analyse
from afterimage.runs.results import METRICS

LONG = 12  # rows; longer tables are folded, except those of a wide finding


@dataclass(frozen=True)
class Answers:
    """Everything that a report says beyond its rows.

    Attributes:
        lead: text before the findings
        findings: the findings; empty where they could not be computed
        beside: comparison with the published figures; None where no row repeats a published one
        json: content of findings.json
        problems: sentences on what could not be computed, and why
    """

    lead: str
    findings: tuple[Finding, ...]
    beside: Finding | None
    json: str
    problems: tuple[str, ...]


def answer(rows: Sequence[Row], bounds: Sequence[Bound] = ()) -> Answers:
    """Compute the findings and the comparison with the published figures.

    Args:
        rows: finished runs
        bounds: their measured bounds

    Returns:
        the answers; where a part raises an `AfterimageError`, its message is among the problems
    """
    problems, lead, findings, beside = [], "", (), None
    try:
        analysis = analyse(rows)
        both = BothSides(*map(analyse, to_compare(bounds))) if bounds else None
        lead, findings = how_to_read(analysis), tuple(find(analysis, both))
        values = analysis.as_dict() | (both.as_dict() if both else {})
    except AfterimageError as error:
        problems.append(f"The findings could not be computed: {error}")
    try:
        published = beside_published(rows)
        beside = _beside(published) if published else None
    except AfterimageError as error:
        problems.append(f"The comparison with the published figures could not be computed: {error}")
    text = json.dumps(
        values if findings else {"problems": problems}, indent=1, ensure_ascii=False, allow_nan=False
    )
    return Answers(lead, findings, beside, text + "\n", tuple(problems))


def _beside(rows: Sequence[Beside]) -> Finding:
    table = []
    for b in rows:
        features = " + ".join(b.published.sources)
        scores = [_pair(getattr(b.published, metric), b.ours[metric], metric) for metric in METRICS]
        reach = f"{number(b.ceiling.psnr, 'psnr')} dB" if b.ceiling else "unknown"
        table.append((features, b.published.decoder, *scores, reach))
    header = (
        "features",
        "decoder",
        "PSNR published → here",
        "SSIM",
        "LPIPS (alex)",
        "best within the published range",
    )
    reasons: dict[str, list[str]] = {}
    for b in rows:
        reasons.setdefault(b.why, []).append(" + ".join(b.published.sources))
    paragraphs = [
        "Blazanovic and Khan (2025) on DIV2K; their deviations are over batch means. The last column is "
        "computed here: what a perfect decoder with the published pipeline's range would score on the test "
        "images that these run folders keep.",
        *(why if len(reasons) == 1 else f"{', '.join(names)}: {why}" for why, names in reasons.items()),
        "Images, epochs and hardware may differ as well: the rows' configurations say what was done here.",
    ]
    return Finding(
        "Beside the published figures",
        paragraphs=tuple(paragraphs),
        tables=(Numbers("Published and here", header, tuple(table)),),
        wide=True,
    )


def _pair(theirs: tuple[float, float | None] | None, ours: float | None, metric: str) -> str:
    published = "not published"
    if theirs is not None:
        mean, spread = theirs
        published = number(mean, metric) + ("" if spread is None else f" ± {number(spread, metric)}")
    return f"{published} → {'unavailable' if ours is None else number(ours, metric)}"


def markdown_findings(answers: Answers) -> list[str]:
    """Write the section of findings as blocks: a table of the verdicts, then each finding with its tables."""
    blocks = [f"> **{markdown(problem)}**" for problem in answers.problems]
    if not answers.findings:
        return blocks
    blocks.append(markdown(answers.lead))
    judged = [f for f in answers.findings if f.verdict]
    if judged:
        rows = [(markdown(f.title), f"**{markdown(f.verdict)}**") for f in judged]
        blocks.append(markdown_grid(("hypothesis", "verdict"), rows))
    for finding in answers.findings:
        blocks += [f"### {markdown(finding.title)}", *markdown_finding(finding)]
    return blocks


def markdown_finding(finding: Finding) -> list[str]:
    """Write one finding as blocks: its verdict, sentences, tables and rule."""
    blocks = []
    if finding.verdict:
        blocks.append(f"**Verdict: {markdown(finding.verdict)}.**")
    blocks += map(markdown, finding.paragraphs)
    for table in finding.tables:
        blocks.append(_table(table, is_open=finding.wide))
    if finding.rule:
        blocks.append(f"*Rule. {markdown(finding.rule)}*")
    return blocks


def _table(table: Numbers, *, is_open: bool) -> str:
    text = markdown_grid([*map(markdown, table.header)], (map(markdown, row) for row in table.rows))
    title = markdown(table.title)
    if is_open or len(table.rows) <= LONG:
        return f"{title}:\n\n{text}"
    summary = f"{title} ({len(table.rows)} rows)"
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"
