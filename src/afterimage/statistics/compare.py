"""Two rows on the same pictures: the paired difference, its interval and test, and who wins which picture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from afterimage.config import AfterimageError
from afterimage.statistics.bootstrap import CONFIDENCE, RESAMPLES, Interval, mean_interval
from afterimage.statistics.ranks import holm, spearman
from afterimage.statistics.rows import HIGHER_IS_BETTER, NEGLIGIBLE, Row, matrix

ALPHA = 1 - CONFIDENCE
CAPACITY = 0.05  # decoders within 5 % of each other's parameters count as equally large
_LISTED = 10


@dataclass(frozen=True)
class Comparison:
    """`a` against `b` on the pictures that both have.

    `difference` is the mean of a - b in the metric's own unit (so below zero is better for LPIPS). `p` is
    the paired t test's (Student 1908), `p_holm` its value corrected over the comparison's family.
    `agreement` is the rank correlation of the two over pictures: near 1, they find the same pictures hard.
    `won_a` and `won_b` are the pictures won by the widest margins, at most ten, widest first.
    """

    metric: str
    a: str
    b: str
    difference: Interval
    mean_a: float
    mean_b: float
    p: float
    p_holm: float
    wins_a: int
    wins_b: int
    agreement: float
    won_a: tuple[str, ...]
    won_b: tuple[str, ...]
    parameters_a: int
    parameters_b: int

    @property
    def negligible(self) -> bool:
        """Whether the whole interval lies within the margin that the study calls negligible."""
        return self.difference.within(NEGLIGIBLE[self.metric])

    @property
    def certain(self) -> bool:
        """Whether there is a difference at all, by the corrected test and by the interval."""
        return self.p_holm < ALPHA and self.difference.excludes_zero

    @property
    def better(self) -> str | None:
        """`a` or `b` where test and interval tell them apart by more than a negligible difference."""
        d = self.difference.estimate
        if not self.certain or abs(d) <= NEGLIGIBLE[self.metric]:
            return None
        return "a" if (d > 0) == HIGHER_IS_BETTER[self.metric] else "b"

    @property
    def matched_capacity(self) -> bool:
        large = max(self.parameters_a, self.parameters_b)
        return large > 0 and abs(self.parameters_a - self.parameters_b) <= CAPACITY * large

    @property
    def explained_by_capacity(self) -> bool:
        """Whether the better side (if any) has the larger decoder, so that its size may be what helps."""
        if self.better is None:
            return False
        gap = self.parameters_a - self.parameters_b
        return not self.matched_capacity and (gap > 0 if self.better == "a" else gap < 0)


def compare(
    a: Row,
    b: Row,
    metric: str,
    *,
    names: tuple[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two rows by `metric` over the pictures that both have scores for.

    `p_holm` starts out as `p`; `corrected` sets it once the family is known.

    Raises:
        AfterimageError: fewer than two common pictures.
    """
    ids, scores = matrix([a, b], metric)
    if len(ids) < 2:
        raise AfterimageError(f"{a.name} and {b.name} share {len(ids)} pictures with {metric}; 2 are needed")
    difference = scores[:, 0] - scores[:, 1]
    interval = mean_interval(difference, resamples=resamples, seed=seed)
    p = 1.0
    if interval.low < interval.high:
        t = interval.estimate / (difference.std(ddof=1) / np.sqrt(len(ids)))
        p = float(2 * special.stdtr(len(ids) - 1, -abs(t)))
    elif interval.estimate != 0:
        p = 0.0
    gain = difference if HIGHER_IS_BETTER[metric] else -difference
    order = np.argsort(-gain, kind="stable")
    name_a, name_b = names or (a.name, b.name)
    return Comparison(
        metric=metric,
        a=name_a,
        b=name_b,
        difference=interval,
        mean_a=float(scores[:, 0].mean()),
        mean_b=float(scores[:, 1].mean()),
        p=p,
        p_holm=p,
        wins_a=int((gain > 0).sum()),
        wins_b=int((gain < 0).sum()),
        agreement=float(spearman(scores[:, 0], scores[:, 1])),
        won_a=tuple(ids[i] for i in order[:_LISTED] if gain[i] > 0),
        won_b=tuple(ids[i] for i in order[::-1][:_LISTED] if gain[i] < 0),
        parameters_a=a.parameters,
        parameters_b=b.parameters,
    )


def corrected(family: list[Comparison]) -> list[Comparison]:
    """The same comparisons with `p_holm` corrected over all of them (Holm 1979)."""
    adjusted = holm([c.p for c in family])
    return [replace(c, p_holm=float(p)) for c, p in zip(family, adjusted, strict=True)]
