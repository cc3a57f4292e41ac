"""Confidence intervals: of means over images, and of shares of images."""

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
CONFIDENCE = 0.95
FEW = 10
"""Below so many images resamples hold too few different values, and an interval is never shorter than Student's."""
_CHUNK = 4_000_000  # resampled values held at a time: 32 MB


def _draw(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """How often each of `count` images is drawn in each of `rows` resamples: `(rows, count)`."""
    drawn = random.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)


@lru_cache(maxsize=4)
def _drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    return _draw(np.random.default_rng(seed), resamples, count)


def _chunks(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    if count * resamples <= _CHUNK:
        yield _drawn(count, resamples, seed)
        return
    random, rows = np.random.default_rng(seed), max(1, _CHUNK // count)
    for start in range(0, resamples, rows):
        yield _draw(random, min(rows, resamples - start), count)


def resampled_means(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means over images in each bootstrap resample.

    The same seed draws the same images whatever is measured on them, so that columns stay paired.

    Args:
        values: `(images,)` or `(images, columns)`.

    Returns:
        `(resamples,)` or `(resamples, columns)`.
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
    """BCa interval of a mean over images; of a mean difference when given paired differences.

    Bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals"). `expand` widens the
    levels as Student's t does (Hesterberg 2015, "What teachers should know about the bootstrap"): without it,
    intervals over fewer than about 30 images are too short. No mean of resamples leaves the values' range, so
    below `FEW` images the interval also takes in Student's t interval. With `expand` off, this is scipy's
    `method="BCa"`.

    Args:
        values: `(images,)`, finite.

    Raises:
        AfterimageError: fewer than two images, or values that are not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise AfterimageError(f"an interval needs the scores of at least 2 images, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise AfterimageError("an interval needs finite scores")
    # Exact sums: the order of the images must not move the interval, not by a rounding that breaks a tie either.
    count, centre = len(values), math.fsum(values) / len(values)
    deviations = values - centre
    scale = math.fsum(deviations**2)
    if scale <= (1e-12 * max(1.0, abs(centre))) ** 2 * count:
        return Interval(centre, centre, centre, count, confidence)

    # Exchanging the two sides must only mirror it.
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
    """The level of one tail that makes an interval over so many values as long as Student's t does."""
    # With two values the level underflows to zero, whose normal quantile is infinite.
    return max(1e-12, special.ndtr(np.sqrt(count / (count - 1)) * special.stdtrit(count - 1, level)))


def percentile_interval(estimate: float, resampled: np.ndarray, count: int, confidence: float) -> Interval:
    """Percentile interval (Efron 1979) of any statistic of `count` images from its bootstrap values `(resamples,)`.

    Its levels are widened as those of `mean_interval`; over fewer than about 10 images it is still too short.
    """
    level = _expanded((1 - confidence) / 2, count)
    low, high = np.quantile(resampled, [level, 1 - level])
    return Interval(float(estimate), float(low), float(high), count, confidence)


def share_interval(found: np.ndarray) -> Interval:
    """The share of `True` with its 95 % interval (Clopper & Pearson 1934)."""
    count, total = int(np.sum(found)), len(found)
    ends = stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    return Interval(count / total, float(ends.low), float(ends.high), total)


def interval_dict(interval: Interval) -> dict[str, Any]:
    return {
        "estimate": float(interval.estimate),
        "low": float(interval.low),
        "high": float(interval.high),
        "count": interval.count,
    }
