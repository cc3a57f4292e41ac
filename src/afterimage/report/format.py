"""Findings as Markdown, numbers and intervals as text, and escaping of names that come from run folders."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from afterimage.runs.results import METRICS, Interval

MISSING = "–"
"""Text of a cell without a value."""
LONG = 12
"""Number of rows above which Markdown folds a table, except those of a wide finding."""


@dataclass(frozen=True)
class TextTable:
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
    tables: tuple[TextTable, ...] = ()
    wide: bool = False  # takes the full width of the page; its tables are never folded


def markdown_finding(finding: Finding, heading: str = "") -> list[str]:
    """Write one finding as blocks: its verdict, sentences, tables and rule, below a `heading` such as `##`."""
    blocks = [f"{heading} {markdown(finding.title)}"] if heading else []
    blocks += [f"**Verdict: {markdown(finding.verdict)}.**"] if finding.verdict else []
    blocks += map(markdown, finding.paragraphs)
    for table in finding.tables:
        text = markdown_grid([*map(markdown, table.header)], (map(markdown, row) for row in table.rows))
        title = markdown(table.title)
        if finding.wide or len(table.rows) <= LONG:
            blocks.append(f"{title}:\n\n{text}")
        else:
            summary = f"{title} ({len(table.rows)} rows)"
            blocks.append(f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>")
    return blocks + ([f"*Rule. {markdown(finding.rule)}*"] if finding.rule else [])


def capitalised(text: str) -> str:
    """Return text with its first letter in upper case and all others as they are."""
    return text[:1].upper() + text[1:]


def format_score(value: float, metric: str, *, signed: bool = False) -> str:
    """Write a score with its metric's number of digits and a typographic minus sign, without the unit."""
    digits = METRICS[metric].digits
    return with_minus_sign(f"{value:{'+' if signed else ''}.{digits}f}", digits)


def with_minus_sign(text: str, digits: int) -> str:
    """Replace a number's hyphen by a minus sign; a number that is zero to `digits` digits has no sign."""
    zero = f"{0:.{digits}f}"
    return zero if text.lstrip("+-") == zero else text.replace("-", "−")


def extent(values: Iterable[int | float], write: Callable[[Any], str] = str) -> str:
    """Write the smallest and the largest value as `4 to 6`; once where both read alike."""
    values = list(values)
    return " to ".join(dict.fromkeys(map(write, (min(values), max(values)))))


def ratio(value: float) -> str:
    """Write a number with three significant digits, from 100 on as an integer with thousands separators."""
    return with_minus_sign(f"{value:,.0f}" if abs(value) >= 100 else significant(value, 3), 0)


def significant(value: float, digits: int) -> str:
    """Write a number with this many significant digits at most and without a power of ten."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"


def format_score_with_unit(value: float, metric: str) -> str:
    """Write a score with its unit."""
    return format_score(value, metric) + METRICS[metric].unit


def interval_ends(interval: Interval, metric: str, *, signed: bool = True) -> str:
    """Write an interval of a metric without its estimate, such as `[20.11, 22.40]`."""
    low, high = (format_score(v, metric, signed=signed) for v in (interval.low, interval.high))
    return f"[{low}, {high}]"


def interval_text(interval: Interval, metric: str, *, signed: bool = False) -> str:
    """Write an interval of a metric as `21.30 [20.11, 22.40]`; for a single image the estimate alone."""
    estimate = format_score(interval.estimate, metric, signed=signed)
    return estimate if interval.count < 2 else f"{estimate} {interval_ends(interval, metric, signed=signed)}"


def estimate_text(interval: Interval) -> str:
    """Write an estimate of any kind with its interval, to two digits."""
    estimate, low, high = (
        with_minus_sign(f"{v:.2f}", 2) for v in (interval.estimate, interval.low, interval.high)
    )
    return f"{estimate} [{low}, {high}]"


def p_value(p: float) -> str:
    """Write a p-value, small ones as `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


_MARKDOWN = {
    "&": "&amp;", "<": "&lt;", ">": "&gt;",
    **{c: "\\" + c for c in "\\`*_[]|#~$!"},
}  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "'": r"\textquotesingle{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}",
    "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "[": "{[}", "*": "{*}",  # after a line break they would be read as its options
    "–": "--", "—": "---", "…": r"\dots{}",
}  # fmt: skip
_CODE = re.compile(r"[\w.:/+ @=,()\-]+")


def single_line(text: object, limit: int = 0) -> str:
    """Return text as one line without control characters, cut in the middle to `limit` characters if set."""
    spaced = " ".join(str(text).split())
    clean = "".join(c for c in spaced if unicodedata.category(c)[0] != "C")
    if limit and len(clean) > limit:
        tail = (limit - 1) // 2
        clean = f"{clean[: limit - 1 - tail]}…{clean[len(clean) - tail :]}"
    return clean


def markdown(text: object) -> str:
    """Escape text so that GitHub's Markdown shows it literally, inside a table too."""
    return "".join(_MARKDOWN.get(c, c) for c in single_line(text))


def markdown_code(text: object) -> str:
    """Write a code span, or escaped text where a code span cannot hold its characters."""
    clean = single_line(text)
    return f"`{clean}`" if _CODE.fullmatch(clean) else markdown(clean)


def markdown_grid(
    header: Sequence[str], rows: Iterable[Iterable[str]], *, right: Collection[str] = ()
) -> str:
    """Write a GitHub Markdown table of escaped cells; `right` holds the headers of right-aligned columns."""
    rule = ["---:" if name in right else "---" for name in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def markdown_block(text: str, language: str = "text") -> str:
    """Write a fenced block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = ("".join(c for c in line if unicodedata.category(c)[0] != "C") for line in text.splitlines())
    return "\n".join([f"{fence}{language}", *lines, fence])


def latex(text: object) -> str:
    """Escape text so that LaTeX shows it literally (UTF-8 input, `textcomp` symbols)."""
    return "".join(_LATEX.get(c, c) for c in single_line(text))


def spreadsheet(text: object) -> str:
    """Escape a text cell so that no spreadsheet reads it as a formula."""
    clean = single_line(text)
    return f"'{clean}" if clean[:1] in ("=", "+", "-", "@") else clean
