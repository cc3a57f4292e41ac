"""95 % confidence intervals over images: BCa bootstrap for statistics of mean scores, exact intervals for shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from afterimage.config import AfterimageError
from afterimage.runs.results import Interval

INTERVAL_NAME = "95 % BCa interval"
"""Name of the interval in captions; all intervals of a report are of this kind."""
RESAMPLES = 10_000
"""Bootstrap resamples: the ends of a 95 % interval then have a standard error below 1 % of its length."""
CONFIDENCE = 0.95
"""Confidence level of all intervals."""
MIN_BOOTSTRAP_IMAGES = 10
"""Number of images below which resamples hold too few distinct values; intervals of means then include Student's t."""
_CHUNK = 4_000_000
"""Number of resampled values held at a time (32 MB)."""


def _draw(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Draw bootstrap resamples: the number of times that each of `count` images occurs in each, `(rows, count)`."""
    drawn = random.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


@lru_cache(maxsize=4)
def _drawn(count: int, resamples: int) -> np.ndarray:
    """Draw all resamples. They are cached because a report needs the same ones for many columns of scores."""
    return _draw(np.random.default_rng(0), resamples, count)


def _chunks(count: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield the resamples in chunks of at most `_CHUNK` values."""
    if count * resamples <= _CHUNK:
        yield _drawn(count, resamples)
        return
    random, rows = np.random.default_rng(0), max(1, _CHUNK // count)
    for start in range(0, resamples, rows):
        yield _draw(random, min(rows, resamples - start), count)


def interval(statistic: Callable[[np.ndarray], np.ndarray], scores: np.ndarray) -> Interval:
    """Compute the BCa bootstrap interval of a statistic of mean scores over images.

    BCa means bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals"). Images are drawn
    with all their scores, so that pairs stay together, and the draws are the same in every call. The levels are widened
    as Student's t widens a normal interval (Hesterberg 2015, "What teachers should know about the bootstrap"), because
    bootstrap intervals of fewer than about 30 images are too short.

    `scipy.stats.bootstrap(method="BCa")` with the widened level gives the same interval. It is not used because it
    returns NaN if no left-out image changes the statistic (equal scores, most rank correlations of layers), draws anew
    for every comparison, and takes time quadratic in the number of images.

    Args:
        statistic: computes `(...)` from mean scores `(..., columns)`
        scores: scores of each image `(images, columns)`, finite

    Returns:
        the interval; a single point if the statistic is the same in all resamples

    Raises:
        AfterimageError: there are fewer than two images, or scores are not finite
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or len(scores) < 2:
        raise AfterimageError(f"an interval needs the scores of at least 2 images, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise AfterimageError("an interval needs finite scores")
    count = len(scores)
    estimate = float(statistic(scores.mean(axis=0)))
    means = np.concatenate([drawn @ scores / count for drawn in _chunks(count, RESAMPLES)])
    resampled = statistic(means)
    rounding = 1e-12 * max(1.0, abs(estimate))
    if np.ptp(resampled) <= rounding:
        return Interval(estimate, estimate, estimate, count, CONFIDENCE)

    below = ((resampled < estimate - rounding).mean() + (resampled <= estimate + rounding).mean()) / 2
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 0.5 / RESAMPLES), 1 - 0.5 / RESAMPLES))
    without_one = statistic((scores.sum(axis=0) - scores) / (count - 1))
    influence = without_one.mean() - without_one
    scale = (influence**2).sum() ** 1.5
    acceleration = (influence**3).sum() / (6 * scale) if scale > 0 else 0.0
    tail = normal.inv_cdf(_level(count))
    corrected = (normal.cdf(bias + z / (1 - acceleration * z)) for z in (bias + tail, bias - tail))
    low, high = np.quantile(resampled, list(corrected))
    return Interval(estimate, float(low), float(high), count, CONFIDENCE)


def _level(count: int) -> float:
    """Return the level of one tail at which a normal interval of `count` values is as long as Student's t interval."""
    # The level of two values would underflow to zero, whose normal quantile is infinite.
    return max(1e-12, NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student(count)))


def _student(count: int) -> float:
    """Return the half length of Student's t interval in standard errors."""
    from scipy.special import stdtrit  # imported here, so that reports without intervals need no scipy

    return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))


def mean_interval(values: np.ndarray, limits: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """Compute the BCa interval of a mean over images, or of a mean difference from paired differences.

    The mean of a resample never leaves the range of the values, and the range of two values contains the true mean only
    half of the time. The interval of fewer than `MIN_BOOTSTRAP_IMAGES` images therefore includes Student's t interval,
    as far as a mean can lie there.

    Args:
        values: scores or differences `(images,)`, finite
        limits: lowest and highest value that is possible

    Raises:
        AfterimageError: there are fewer than two images, or values are not finite
    """
    values = np.asarray(values, dtype=float)
    found = interval(lambda means: means[..., 0], values[..., None])
    if len(values) >= MIN_BOOTSTRAP_IMAGES or found.low == found.high:
        return found
    half = float(_student(len(values)) * values.std(ddof=1) / math.sqrt(len(values)))
    low = min(found.low, max(found.estimate - half, limits[0]))
    high = max(found.high, min(found.estimate + half, limits[1]))
    return Interval(found.estimate, low, high, found.count, CONFIDENCE)


def share_interval(outcomes: np.ndarray) -> Interval:
    """Compute the share of `True` among `outcomes` with its exact 95 % interval (Clopper and Pearson 1934)."""
    from scipy import stats

    count, total = int(np.sum(outcomes)), len(outcomes)
    ends = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return Interval(count / total, float(ends.low), float(ends.high), total)


def interval_dict(interval: Interval) -> dict[str, Any]:
    """Return an interval as plain JSON values."""
    return {
        "estimate": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "count": interval.count,
    }
