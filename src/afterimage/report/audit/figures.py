"""Privacy-utility curve: scores of the strongest attacker against what the network keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from afterimage.config.audit import LimitsConfig
from afterimage.evaluation.intervals import NAME
from afterimage.report.audit.verdict import SSIM_SEEN, UTILITY, Leak, Option
from afterimage.report.figures.fonts import drawable
from afterimage.report.figures.style import MUTED, Drawing, encoder_styles, grid_y, legend

PANEL = (3.4, 2.7)
MARKERS = "osD^vPX*<>h"
MEASURES = {"identification": "images identified", "ssim": "SSIM of the reconstruction"}


def privacy_utility(options: Sequence[Option], limits: LimitsConfig, subject: str) -> Drawing | None:
    """Draw a panel for each measure of leakage, with a point for each layer and defence.

    The x axis shows what the network keeps, or the bytes sent where that is known for no option.

    Args:
        options: layers behind defences
        limits: limits to draw as lines
        subject: name of the audited network

    Returns:
        the figure; None where there is nothing to draw
    """
    kinds = {option.cost["kind"] for option in options} - {None}
    shown = [option for option in options if not kinds or option.cost["kind"] is not None]
    if not shown:
        return None
    layers = encoder_styles(list(dict.fromkeys(option.layer for option in shown)))
    defences = dict.fromkeys(option.defence for option in shown)
    markers = dict(zip(defences, itertools.cycle(MARKERS), strict=False))
    figure = Figure(
        (PANEL[0] * 2, PANEL[1] + 0.4 + 0.16 * (len(layers) + len(markers))), layout="constrained"
    )
    panels = figure.subplots(1, 2)
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for option in shown:
            _point(
                axes, option, getattr(option, measure), layers[option.layer].color, markers[option.defence]
            )
        limit = limits.max_ssim if measure == "ssim" else limits.max_identification
        if limit is not None:
            axes.axhline(limit, color="#a5232f", lw=0.9, ls=(0, (4, 3)), zorder=0)
        if measure == "identification":
            axes.axhline(shown[0].chance, color=MUTED, lw=0.7, ls=":", zorder=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(f"{label} (less is safer)")
        axes.set_xlabel(_across(kinds))
        if not kinds:
            axes.set_xscale("log")
            axes.margins(x=0.1)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g} kB"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        grid_y(axes)
    handles = [Line2D([], [], color=s.color, lw=3, label=drawable(name, 30)) for name, s in layers.items()]
    handles += [
        Line2D([], [], color=MUTED, marker=m, mfc="none", ls="none", label=drawable(name, 30))
        for name, m in markers.items()
    ]
    legend(figure, handles, columns=4)
    caption = (
        f"{subject}: what the strongest attacker measured gets from each layer (colour) behind each defence (marker), "
        f"against {_across(kinds)}. Bars are {NAME}s of means and exact ones of shares; the dotted line is chance"
        + (", the dashed line the limit" if limits else "")
        + "."
        + _seen(shown)
        + _missing(options, shown)
    )
    return Drawing("privacy-utility", "Privacy and utility", caption, figure)


def _point(axes: Axes, option: Option, leak: Leak, color: str, marker: str) -> None:
    score = option.cost["score"]
    x, across = (option.cost["bytes"], None) if score is None else (score["estimate"], _bar(**score))
    axes.errorbar(
        [x], [leak.estimate], xerr=across, yerr=_bar(leak.estimate, leak.low, leak.high),
        color=color, marker=marker, ms=5.5, mfc="none", mew=1.1, elinewidth=0.7, capsize=0,
    )  # fmt: skip


def _bar(estimate: float, low: float, high: float, count: int = 0) -> list[list[float]]:
    return [[max(0.0, estimate - low)], [max(0.0, high - estimate)]]


def _across(kinds: set[str]) -> str:
    if not kinds:
        return "bytes sent an image (log scale)"
    return " or ".join(UTILITY[kind] for kind in sorted(kinds))


def _seen(shown: Sequence[Option]) -> str:
    layers = dict.fromkeys(option.layer for option in shown if option.ssim.by == SSIM_SEEN)
    return f" SSIM is that of the part that is seen for {', '.join(layers)}." if layers else ""


def _missing(options: Sequence[Option], shown: Sequence[Option]) -> str:
    missing = dict.fromkeys(option.layer for option in options if option not in shown)
    return f" What the network keeps is not known for {', '.join(missing)}." if missing else ""
