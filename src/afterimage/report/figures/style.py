r"""Style of all figures: print sizes, colour-blind safe colours, fonts, output that repeats byte for byte.

Text is cut to a width in columns; characters that no font has are written as `\u4e2d`.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from afterimage.report.format import capitalised, single_line
from afterimage.report.rows import Row, lpips_nets, mean_over_images
from afterimage.report.tables import fusion_legend, heading, score_columns
from afterimage.runs.results import Interval

DPI = 200
INK, MUTED = "#222222", "#6b6b6b"
# Names are printed literally: a `$` must not start a formula. Text in SVG becomes outlines, so that it looks
# the same without the font.
RC = {
    "font.size": 8, "text.parse_math": False, "text.color": INK,
    "axes.labelsize": 8, "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.labelcolor": INK,
    "axes.edgecolor": MUTED, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": "#ececec", "grid.linewidth": 0.7,
    "lines.linewidth": 1.4, "lines.markersize": 4, "legend.frameon": False, "legend.fontsize": 7.5,
    "svg.hashsalt": "afterimage", "svg.fonttype": "path", "savefig.dpi": DPI, "figure.dpi": 100,
    "image.composite_image": False,  # an SVG would merge a grid's images at screen resolution
    "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06,
}  # fmt: skip
# Colours of Okabe and Ito (2008) for decoders and of Tol (2021) for encoders keep the two apart.
DECODER_STYLES = {
    "linear": ("#000000", "o"), "transposed": ("#56B4E9", "s"), "attention": ("#0072B2", "^"),
    "wavelet": ("#009E73", "D"), "frequency": ("#CC79A7", "v"), "residual": ("#D55E00", "P"),
}  # fmt: skip
SPARE_COLORS = ["#E69F00", "#882255", "#999999", "#999933", *(color for color, _ in DECODER_STYLES.values())]
SPARE_MARKERS = "X<>hdp*8"
ENCODER_COLORS = ["#332288", "#DDAA33", "#117733", "#CC6677", "#33BBEE", "#882255", "#777777"]
ENCODER_MARKERS = "ospD^vPX*<>h"


@dataclass(frozen=True)
class Style:
    """Colour and marker of a line."""

    color: str
    marker: str

    def line(self, control: str = "") -> dict[str, Any]:
        """Return the look of a line; a random control has hollow markers and is broken or dotted."""
        fill = "white" if control else self.color
        return {"color": self.color, "marker": self.marker, "mfc": fill, "ls": dashes(control)}


@dataclass(frozen=True)
class Drawing:
    """A finished figure, None once it is written; `name` is the stem of its files.

    `folded` shows it folded, as one of many alike.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None
    folded: bool = False


def error_bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return distances from estimates to the ends of intervals, in the form of matplotlib's `errorbar`."""
    below = [max(0.0, i.estimate - i.low) for i in intervals]
    return [below, [max(0.0, i.high - i.estimate) for i in intervals]]


@contextmanager
def style() -> Iterator[None]:
    """Apply matplotlib's defaults and ours inside the block, ignoring the user's matplotlibrc."""
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC | {"font.family": families()})
        fonts.setLevel(logging.ERROR)  # it warns of fonts for some scripts that have no bold
        try:
            yield
        finally:
            fonts.setLevel(level)


def render(figure: Figure) -> tuple[bytes, bytes]:
    """Return a figure as PNG and SVG, without dates or versions, so that equal rows give equal files."""
    with style():
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(
            png, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"compress_level": 4}
        )
        figure.set_layout_engine("none")  # the SVG reuses the PNG's layout, which halves the time
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def decoder_styles(rows: Iterable[Row]) -> dict[str, Style]:
    """Return a style for each decoder label; that of the project's decoders is the same in every report."""
    decoders = {row.decoder_label: row.decoder for row in sorted(rows, key=lambda r: r.decoder_order)}
    styles: dict[str, Style] = {}
    for label, decoder in decoders.items():
        look = DECODER_STYLES.get(decoder)
        if look and Style(*look) not in styles.values():
            styles[label] = Style(*look)
    taken = {style.color for style in styles.values()}
    colors = sorted(SPARE_COLORS, key=lambda color: color in taken)
    spare = zip(itertools.cycle(colors), itertools.cycle(SPARE_MARKERS), strict=False)
    return {label: styles[label] if label in styles else Style(*next(spare)) for label in decoders}


def encoder_styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a colour and marker for each encoder."""
    looks = zip(names, itertools.cycle(ENCODER_COLORS), itertools.cycle(ENCODER_MARKERS), strict=False)
    return {name: Style(color, marker) for name, color, marker in looks}


def with_control(name: str, control: str) -> str:
    """Write a name, followed by that of a random control if it is one."""
    return f"{name}, {control}" if control else name


def metrics_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the panels for which these rows have scores, as `(metric, LPIPS network)`."""
    return score_columns(lpips_nets(rows))


def has_score(row: Row, metric: str, net: str) -> bool:
    """Return True if a row was measured by a metric, LPIPS with this network."""
    return row.scores[metric] is not None and (metric != "lpips" or row.lpips.net == net)


def metric_label(metric: str, net: str) -> str:
    """Write a metric as the label of an axis."""
    return heading(metric, drawable(net, 16))


def mean_over_seeds(rows: Sequence[Row], metric: str) -> Interval | None:
    """Average runs that differ only in their seed, then compute the mean over images with its interval.

    Only images that all runs scored count; None where there are none."""
    if len(rows) == 1:
        return rows[0].intervals[metric]
    values = [row.values(metric) for row in rows]
    common = sorted(key for key in values[0] if all(key in v for v in values))
    means = [math.fsum(v[key] for v in values) / len(values) for key in common]
    return mean_over_images(means, metric) if common else None


def lpips_note(rows: Sequence[Row]) -> str:
    """Write a caption's note on rows without LPIPS; empty if there are none."""
    missing = sum(r.scores["lpips"] is None for r in rows)
    if not missing:
        return ""
    who = "any row" if missing == len(rows) else f"{missing} of {len(rows)} rows"
    return f" LPIPS is not available for {who}."


def dashes(control: str) -> str:
    """Return the line style of `Row.control`: solid for trained weights, dashed or dotted for controls."""
    return ":" if control.startswith("RANDOM-INIT") else "--" if control else "-"


def controls_note(rows: Sequence[Row]) -> str:
    """Write a caption's note on random controls; empty if there are none."""
    lines = {"--": "broken", ":": "dotted"}
    controls = sorted({row.control for row in rows if row.is_random})
    told = ", ".join(f"{control} ({lines[dashes(control)]} lines)" for control in controls)
    return f" Open markers: {told}." if told else ""


def fusion_note(rows: Sequence[Row]) -> str:
    """Write a caption's note on the letters that stand for fusions; empty if there are none."""
    return "".join(f" {capitalised(line)}." for line in fusion_legend(rows))


def legend_entry(label: str, **look: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], label=label, **look)


def legend(figure: Figure, handles: Sequence[Artist], *, columns: int) -> None:
    """Set one legend below the whole figure, in up to `columns` columns, as many as fit its width."""
    for count in range(columns, 0, -1):
        made = figure.legend(handles=handles, loc="outside lower center", ncols=count)
        if count == 1 or made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()


def grid_lines(axes: Axes, axis: str = "y") -> None:
    """Draw grid lines across an axis, and short ticks."""
    axes.grid(axis=axis)
    axes.tick_params(length=2.5)


def log_x(
    axes: Axes,
    text: Callable[[float], str] = "{:g}".format,
    *,
    subs: Sequence[int] = (1, 2, 5),
    most: int = 12,
) -> None:
    """Give a panel a logarithmic x axis of up to `most` ticks, at `subs` times the powers of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=most))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


BASE = "DejaVu Sans"
"""Font of every figure, bundled with matplotlib."""
FALLBACK_FONTS = (
    "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans Devanagari", "Noto Sans Thai",
    "Arial Unicode MS", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Unifont",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS that are used, if installed, for characters missing in the base font."""


@cache
def families() -> list[str]:
    """Return the fonts to draw text in; each character is drawn in the first font that contains it."""
    installed = set(font_manager.get_font_names())
    return [BASE, *(name for name in FALLBACK_FONTS if name in installed)]


@cache
def _characters() -> frozenset[str]:
    files = (font_manager.findfont(name) for name in families())
    return frozenset(chr(code) for file in files for code in FT2Font(file).get_charmap())


def drawable(text: object, limit: int = 0) -> str:
    """Return text as `single_line` does, with characters that no font contains written as escapes.

    Args:
        text: the text
        limit: largest width in columns (a CJK character takes two), cut in the middle; 0 for no limit
    """
    units = [c if c in _characters() else _escape(c) for c in single_line(text)]
    return "".join(units if not limit or columns("".join(units)) <= limit else _cut(units, limit))


def columns(text: str) -> int:
    """Return the width of text in columns: 2 for a wide (CJK) character, 1 for any other."""
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def fit_columns(units: Sequence[str], width: int) -> Sequence[str]:
    """Return the longest beginning that fits into `width` columns."""
    return units[: sum(end <= width for end in itertools.accumulate(map(columns, units)))]


def _cut(units: list[str], limit: int) -> list[str]:
    """Cut text in the middle, as `single_line` does, without splitting escapes."""
    tail = fit_columns(units[::-1], (limit - 1) // 2)[::-1]
    return [*fit_columns(units, limit - 1 - columns("".join(tail))), "…", *tail]


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode() if ord(character) > 127 else character
