"""Rank correlations and paired comparisons, with p-values."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats

from afterimage.config import AfterimageError
from afterimage.evaluation.intervals import CONFIDENCE, Interval, mean_interval
from afterimage.report.statistics.rows import PooledRow, matrix
from afterimage.runs.results import METRICS

_PERMUTATIONS = 10_000


def holm(p_values: np.ndarray | list[float]) -> np.ndarray:
    """Adjust p-values to limit the chance of any false positive in the family to the chosen level.

    This is the step-down of Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def kendall_within(quality: np.ndarray) -> np.ndarray:
    """Compute Kendall's tau-a (1938) of each row with the order of the columns, `(rows, layers)` -> `(rows,)`."""
    first, second = np.triu_indices(quality.shape[1], 1)
    return np.sign(quality[:, second] - quality[:, first]).mean(axis=1)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), scale, out=np.zeros(np.shape(scale)), where=scale > 1e-12)


def spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> np.ndarray:
    """Compute Spearman's rank correlation (1904) along the last axis, partial where `given` is a covariate.

    The partial correlation (Kendall 1942) is that of the residuals after the ranks of both are regressed on
    the covariate's ranks. Constant input or residuals give 0.

    Args:
        x: values `(layers,)`
        y: values `(..., layers)`
        given: covariate `(layers,)`

    Returns:
        the correlation `(...)`, in [-1, 1]
    """
    x, y = stats.rankdata(x), stats.rankdata(y, axis=-1)
    if given is not None:
        keep = residual_maker(stats.rankdata(given))
        x, y = keep @ x, y @ keep
    return _correlation(x, y)


def residual_maker(covariate: np.ndarray) -> np.ndarray:
    """Build the symmetric matrix `(layers, layers)` that removes a mean and a slope on the covariate."""
    design = np.stack([np.ones_like(covariate, dtype=float), covariate - np.mean(covariate)], axis=1)
    return np.eye(len(covariate)) - design @ np.linalg.pinv(design)


def separable(x: np.ndarray, given: np.ndarray) -> bool:
    """Return True if the ranks of `x` are not a linear function of the ranks of `given`."""
    return bool(abs(spearman(x, given)) < 1 - 1e-9)


def spearman_p(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    """Compute the two-sided permutation p-value of `spearman(x, y, given)` over layers.

    It is exact up to seven layers, else from 10,000 random permutations and the observed one (Phipson and
    Smyth 2010). With a covariate, residual ranks are permuted and regressed again (Freedman and Lane 1983).
    """
    observed = abs(spearman(x, y, given))
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    count, exact = len(ranks_y), math.factorial(len(ranks_y)) <= _PERMUTATIONS
    if exact:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(count), (_PERMUTATIONS, 1)), axis=1)
    keep = np.eye(count) - 1 / count if given is None else residual_maker(stats.rankdata(given))
    values = _correlation(keep @ ranks_x, (keep @ ranks_y)[orders] @ keep)
    extreme = int((np.abs(values) >= observed - 1e-9).sum())
    return extreme / len(orders) if exact else (extreme + 1) / (len(orders) + 1)


def epsilon_squared(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Compute the share of the variance between layers that their group accounts for, corrected for chance.

    The share is 1 - (mean square within groups) / (total mean square), the adjusted R squared of a one-way
    layout (Kelley 1935). At 1, layers of one group are equal; at 0 or below, no more alike than layers of
    different groups.

    Args:
        values: values `(..., layers)`
        groups: group of each layer `(layers,)`; at least one holds two layers

    Returns:
        the share `(...)`, at most 1
    """
    _, index = np.unique(groups, return_inverse=True)
    member = np.eye(index.max() + 1)[index]
    centred = values - (values @ member / member.sum(axis=0)) @ member.T
    within = (centred**2).sum(axis=-1) / (len(groups) - member.shape[1])
    total = values.var(axis=-1, ddof=1)
    return np.where(total > 0, 1 - within / np.where(total > 0, total, 1), 0.0)


ALPHA = 1 - CONFIDENCE
CAPACITY = 0.05  # relative difference of parameters up to which decoders count as equally large
_LISTED = 10


@dataclass(frozen=True)
class Comparison:
    """Comparison of `a` with `b` on the images that both have.

    Attributes:
        difference: mean of a - b in the metric's own unit; for LPIPS below zero means that a is better
        p: p-value of the paired t test (Student 1908)
        p_holm: p-value corrected over the comparison's family
        wins_a: number of images on which a is better
        agreement: rank correlation of the two over images; near 1, the same images are hard for both
        won_a: ids of the images that a wins by the widest margins, at most ten, widest first
        parameters_a: parameters of the decoder of a
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
        """True if the whole interval lies within the margin that the study calls negligible."""
        return self.difference.within(METRICS[self.metric].negligible)

    @property
    def certain(self) -> bool:
        """True if both the corrected test and the interval show a difference."""
        return self.p_holm < ALPHA and self.difference.excludes_zero

    @property
    def better(self) -> str | None:
        """The side, `a` or `b`, that is better by test and interval and not negligibly; else None."""
        d = self.difference.estimate
        if not self.certain or abs(d) <= METRICS[self.metric].negligible:
            return None
        return "a" if (d > 0) == METRICS[self.metric].higher_is_better else "b"

    @property
    def matched_capacity(self) -> bool:
        """True if the decoders' parameters differ by at most 5 %."""
        large = max(self.parameters_a, self.parameters_b)
        return large > 0 and abs(self.parameters_a - self.parameters_b) <= CAPACITY * large

    @property
    def explained_by_capacity(self) -> bool:
        """True if the better side has the larger decoder, whose size may explain the difference."""
        if self.better is None:
            return False
        gap = self.parameters_a - self.parameters_b
        return not self.matched_capacity and (gap > 0 if self.better == "a" else gap < 0)


def compare(a: PooledRow, b: PooledRow, metric: str, *, names: tuple[str, str] | None = None) -> Comparison:
    """Compare two rows, under their own names or these, over the images that both have scores for.

    Returns:
        the comparison, whose `p_holm` is `p` until `holm_correct` sets it once the family is known

    Raises:
        AfterimageError: the rows share fewer than two images
    """
    ids, scores = matrix([a, b], metric)
    if len(ids) < 2:
        raise AfterimageError(f"{a.name} and {b.name} share {len(ids)} images with {metric}; 2 are needed")
    difference = scores[:, 0] - scores[:, 1]
    interval = mean_interval(difference)
    p = 1.0
    if interval.low < interval.high:
        t = interval.estimate / (difference.std(ddof=1) / np.sqrt(len(ids)))
        p = float(2 * special.stdtr(len(ids) - 1, -abs(t)))
    elif interval.estimate != 0:
        p = 0.0
    gain = METRICS[metric].sign * difference
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


def holm_correct(family: list[Comparison]) -> list[Comparison]:
    """Correct the p-values of a family of comparisons (Holm 1979)."""
    adjusted = holm([c.p for c in family])
    return [replace(c, p_holm=float(p)) for c, p in zip(family, adjusted, strict=True)]
