"""How numbers are printed: digits by metric, a true minus sign, intervals in brackets."""

from __future__ import annotations

from afterimage.statistics.bootstrap import Interval
from afterimage.statistics.compare import Comparison
from afterimage.statistics.rows import NEGLIGIBLE

NAMES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS"}
UNITS = {"psnr": " dB", "ssim": "", "lpips": ""}
_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """A score with the digits and the minus sign of print; the unit is left to the caller."""
    digits = _DIGITS[metric]
    return minus(f"{value:{'+' if signed else ''}.{digits}f}", digits)


def minus(text: str, digits: int) -> str:
    zero = f"{0:.{digits}f}"
    return zero if text.lstrip("+-") == zero else text.replace("-", "−")


def ratio(value: float) -> str:
    """Three digits, and no power of ten."""
    return minus(f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}", 3)


def score(value: float, metric: str) -> str:
    return number(value, metric) + UNITS[metric]


def span(interval: Interval, metric: str, *, signed: bool = True) -> str:
    low, high = (number(v, metric, signed=signed) for v in (interval.low, interval.high))
    return f"[{low}, {high}]"


def plain(interval: Interval) -> str:
    estimate, low, high = (minus(f"{v:.2f}", 2) for v in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference(c: Comparison) -> str:
    """For example `−1.32 dB [−1.45, −1.20]`."""
    estimate = number(c.difference.estimate, c.metric, signed=True)
    return f"{estimate}{UNITS[c.metric]} {span(c.difference, c.metric)}"


def ahead(c: Comparison) -> str:
    """How `a`, which has the better mean, stands to `b`: for example `ahead of`."""
    if c.better == "a":
        return "ahead of"
    return "negligibly different from" if c.certain else "not told apart from"


def told_apart(c: Comparison) -> str:
    """Empty where the comparison has a better side, else why it has none."""
    if c.better:
        return ""
    if c.certain:
        return f", no more than {NEGLIGIBLE[c.metric]:g}{UNITS[c.metric]} and so negligible"
    return f", not told apart ({p_value(c.p_holm)})"
