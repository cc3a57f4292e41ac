"""Test of H3: different architectures keep different things."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from afterimage.report.statistics.depth import CONTRADICTED, MARGIN, SUPPORTED, UNDECIDED, UNTESTABLE, Answer
from afterimage.report.statistics.resolution import MatchedPair
from afterimage.report.statistics.rows import Row
from afterimage.report.statistics.tests import compare, corrected
from afterimage.runs.results import METRICS

RULE = (
    "At each resolution, the first layer of every encoder is compared with every other's. A pair differs "
    "where its paired difference is not zero: t test, Holm-corrected over all pairs, p < 0.05, and a "
    f"95 % interval without zero {MARGIN}. Supported: some pair differs and decoder size cannot explain it "
    "(sizes within 5 %, or the "
    "better side's decoder is the smaller). Contradicted (by PSNR only, for want of a margin for the others): "
    f"every pair's 95 % interval lies within {METRICS['psnr'].negligible:g} dB of zero. Undecided: otherwise."
)


@dataclass(frozen=True)
class Architectures(Answer):
    """Answer to H3 for one metric and one setting.

    Attributes:
        pairs: comparisons of encoders by their first layer at each resolution; the choice ignores scores, so
            that no encoder gains from having many layers of one size
    """

    pairs: tuple[MatchedPair, ...] = ()
    hypothesis: str = "H3"
    claim: str = "different architectures keep different things"


def architectures_differ(rows: list[Row], metric: str) -> Architectures:
    """Test H3 on every pair of encoders at every resolution, as one family of tests.

    Args:
        rows: one or more rows of one setting with one source each
        metric: name of the metric
    """
    first: dict[tuple[int, int], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda r: r.order):
        first.setdefault((row.height, row.width), {}).setdefault(row.encoder, row)
    matched = [
        (size, a, b)
        for size, encoders in sorted(first.items(), key=lambda item: -item[0][0] * item[0][1])
        for a, b in combinations(sorted(encoders.values(), key=lambda r: r.encoder), 2)
    ]
    if not matched:
        reason = "needs layers of one resolution from two or more encoders, decoded alike"
        return Architectures(metric, rows[0].setting, UNTESTABLE, RULE, reason)

    family = corrected([compare(a, b, metric) for _, a, b in matched])
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
    return Architectures(metric, rows[0].setting, verdict, RULE, reason, pairs)
