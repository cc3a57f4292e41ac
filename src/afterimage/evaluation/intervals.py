"""Confidence intervals of means over images and of shares of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special, stats

from afterimage.config import AfterimageError
from afterimage.runs.results import Interval

RESAMPLES = 10_000
"""Bootstrap resamples: the ends of a 95 % interval then have a standard error below 1 % of its length."""
CONFIDENCE = 0.95
"""Confidence level of all intervals."""
FEW = 10
"""Number of images below which resamples hold too few distinct values; intervals then also include Student's."""
_CHUNK = 4_000_000  # resampled values held at a time: 32 MB
"""Resampled values held at a time: 32 MB."""


def _draw(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Draw bootstrap resamples: how often each of `count` images occurs in each of them, `(rows, count)`."""
    drawn = random.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


@lru_cache(maxsize=4)
def _drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    """Draw all resamples; cached, as a report needs the same ones for many columns of scores."""
    return _draw(np.random.default_rng(seed), resamples, count)


def _chunks(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the resamples in chunks of at most `_CHUNK` values."""
    if count * resamples <= _CHUNK:
        yield _drawn(count, resamples, seed)
        return
    random, rows = np.random.default_rng(seed), max(1, _CHUNK // count)
    for start in range(0, resamples, rows):
        yield _draw(random, min(rows, resamples - start), count)


def resampled_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Compute the mean over images in each bootstrap resample.

    The same seed draws the same images for every set of scores, so that scores stay paired.

    Args:
        values: scores `(images,)` or `(images, columns)`
        resamples: number of resamples
        seed: seed of the resamples

    Returns:
        `(resamples,)` or `(resamples, columns)`
    """
    count = len(values)
    return np.concatenate([drawn @ values / count for drawn in _chunks(count, resamples, seed)])


def mean_interval(
    values: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    expand: bool = True,
) -> Interval:
    """Compute the BCa bootstrap interval of a mean over images, or of a mean difference from paired differences.

    BCa means bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals"). Without `expand` the
    result equals scipy's `method="BCa"`, which is too short for fewer than about 30 images. `expand` widens the levels
    as Student's t does (Hesterberg 2015, "What teachers should know about the bootstrap"). As no mean of resamples lies
    outside the range of the values, the interval of fewer than `FEW` images also includes Student's t interval.

    Args:
        values: scores or differences `(images,)`, finite
        confidence: confidence level, in (0, 1)
        resamples: number of bootstrap resamples
        seed: seed of the resamples
        expand: whether to widen the interval for small samples

    Raises:
        AfterimageError: there are fewer than two images, or values are not finite
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise AfterimageError(f"an interval needs the scores of at least 2 images, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise AfterimageError("an interval needs finite scores")
    # Exact sums, so that the order of the images cannot move the interval, not even through a tie broken by rounding.
    count, centre = len(values), math.fsum(values) / len(values)
    deviations = values - centre
    scale = math.fsum(deviations**2)
    if scale <= (1e-12 * max(1.0, abs(centre))) ** 2 * count:
        return Interval(centre, centre, centre, count, confidence)

    # Mirror negative means, so that exchanging the two sides of a difference only mirrors the interval.
    sign = -1.0 if centre < 0 else 1.0
    centre, deviations = sign * centre, sign * deviations
    means = resampled_means(np.sort(sign * values), resamples=resamples, seed=seed)
    level = (1 - confidence) / 2
    margin = 0.0
    if expand:
        if count < FEW:
            margin = -float(special.stdtrit(count - 1, level)) * math.sqrt(scale / (count - 1) / count)
        level = _expanded(level, count)
    below = ((means < centre).mean() + (means <= centre).mean()) / 2
    bias = special.ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    acceleration = math.fsum(deviations**3) / (6 * scale**1.5)
    z = bias + special.ndtri(np.array([level, 1 - level]))
    low, high = np.quantile(means, special.ndtr(bias + z / (1 - acceleration * z)))
    if margin:
        low, high = min(low, centre - margin), max(high, centre + margin)
    ends = sorted((sign * float(low), sign * float(high)))
    return Interval(sign * centre, *ends, count, confidence)


def _expanded(level: float, count: int) -> float:
    """Return the level of one tail that makes a normal interval over `count` values as long as Student's t interval."""
    # With two values the level underflows to zero, whose normal quantile is infinite.
    return max(1e-12, special.ndtr(np.sqrt(count / (count - 1)) * special.stdtrit(count - 1, level)))


def percentile_interval(estimate: float, resampled: np.ndarray, count: int, confidence: float) -> Interval:
    """Compute the percentile interval (Efron 1979) of any statistic from its bootstrap values.

    Levels are widened as in `mean_interval`; below about 10 images the interval is still too short.

    Args:
        estimate: the statistic of the images
        resampled: its bootstrap values `(resamples,)`
        count: number of images
        confidence: confidence level, in (0, 1)
    """
    level = _expanded((1 - confidence) / 2, count)
    low, high = np.quantile(resampled, [level, 1 - level])
    return Interval(float(estimate), float(low), float(high), count, confidence)


def share_interval(found: np.ndarray) -> Interval:
    """Compute the share of `True` in `found` with its exact 95 % interval (Clopper and Pearson 1934)."""
    count, total = int(np.sum(found)), len(found)
    ends = stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    return Interval(count / total, float(ends.low), float(ends.high), total)


def interval_dict(interval: Interval) -> dict[str, Any]:
    """Return an interval as plain JSON values."""
    return {
        "estimate": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "count": interval.count,
    }
