"""Rank statistics and the correction for many tests, vectorised over resamples."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import stats

_PERMUTATIONS = 10_000


def holm(p_values: np.ndarray | list[float]) -> np.ndarray:
    """Adjusted p-values that keep the chance of any false positive in the family below the level.

    The step-down of Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def kendall_within(quality: np.ndarray) -> np.ndarray:
    """Kendall's tau-a (1938) of each row's values with the columns' order: `(rows, layers)` -> `(rows,)`."""
    first, second = np.triu_indices(quality.shape[1], 1)
    return np.sign(quality[:, second] - quality[:, first]).mean(axis=1)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), scale, out=np.zeros(np.shape(scale)), where=scale > 1e-12)


def spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation (1904) along the last axis; the partial one where `given` is a covariate.

    The partial correlation is that of the ranks (Kendall 1942): of what is left of both after their ranks are
    regressed on the covariate's ranks. Constant input, or nothing left of it, gives 0.

    Args:
        x, given: `(layers,)`.
        y: `(..., layers)`.
    """
    x, y = stats.rankdata(x), stats.rankdata(y, axis=-1)
    if given is not None:
        keep = residual_maker(stats.rankdata(given))
        x, y = keep @ x, y @ keep
    return _correlation(x, y)


def residual_maker(covariate: np.ndarray) -> np.ndarray:
    """The symmetric `(layers, layers)` matrix that removes a mean and a slope on the covariate."""
    design = np.stack([np.ones_like(covariate, dtype=float), covariate - np.mean(covariate)], axis=1)
    return np.eye(len(covariate)) - design @ np.linalg.pinv(design)


def separable(x: np.ndarray, given: np.ndarray) -> bool:
    """Whether the ranks of `x` hold anything that the ranks of `given` do not."""
    return bool(abs(spearman(x, given)) < 1 - 1e-9)


def spearman_p(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None, *, seed: int = 0) -> float:
    """Two-sided permutation p-value of `spearman(x, y, given)` over layers.

    Exact up to seven layers; beyond, 10,000 random permutations and the observed one (Phipson and Smyth
    2010). With a covariate, residual ranks are permuted and regressed again (Freedman and Lane 1983).
    """
    observed = abs(spearman(x, y, given))
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    count, exact = len(ranks_y), math.factorial(len(ranks_y)) <= _PERMUTATIONS
    if exact:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        orders = np.random.default_rng(seed).permuted(np.tile(np.arange(count), (_PERMUTATIONS, 1)), axis=1)
    keep = np.eye(count) - 1 / count if given is None else residual_maker(stats.rankdata(given))
    values = _correlation(keep @ ranks_x, (keep @ ranks_y)[orders] @ keep)
    extreme = int((np.abs(values) >= observed - 1e-9).sum())
    return extreme / len(orders) if exact else (extreme + 1) / (len(orders) + 1)


def epsilon_squared(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The share of the variance between layers that their group accounts for, corrected for chance.

    1 - (mean square within groups) / (total mean square): Kelley (1935), the adjusted R squared of a one-way
    layout. 1: layers of one group are equal; 0 (or below): no more alike than layers of different groups.

    Args:
        values: `(..., layers)`.
        groups: `(layers,)`; at least one group holds two layers.
    """
    _, index = np.unique(groups, return_inverse=True)
    member = np.eye(index.max() + 1)[index]
    centred = values - (values @ member / member.sum(axis=0)) @ member.T
    within = (centred**2).sum(axis=-1) / (len(groups) - member.shape[1])
    total = values.var(axis=-1, ddof=1)
    return np.where(total > 0, 1 - within / np.where(total > 0, total, 1), 0.0)
