"""Labels that do not overlap: spread along a margin, or beside their point where there is room."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression

from afterimage.report.figures.style import MUTED, columns, fit_columns


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted positions as little as needed to lie `gap` apart, inside `[low, high]` if they fit."""
    if not positions:
        return []
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    offsets = gap * np.arange(len(positions))
    # Positions are at least `gap` apart exactly if they do not decrease after these offsets are subtracted.
    starts = isotonic_regression(np.array(positions) - offsets).x
    return (starts.clip(low, high - offsets[-1]) + offsets).tolist()


def margin_labels(axes: Axes, values: Sequence[tuple[float, str, str]], *, size: float = 6.5) -> None:
    """Label heights, `(value, name, colour)`, in the right margin, each joined to its height by a line.

    The figure must have been laid out, as the distance of labels depends on the panel's height.
    """
    values = sorted(values)
    height = axes.get_window_extent().height
    gap = size * 1.25 * axes.figure.dpi / 72 / height
    to_axes = axes.transData + axes.transAxes.inverted()
    actual = [min(1.0, max(0.0, float(to_axes.transform((0, value))[1]))) for value, _, _ in values]
    for (_, name, color), y, place in zip(values, actual, spread(actual, gap, 0.0, 1.0), strict=True):
        axes.annotate(
            name, (1, y), (14, (place - y) * height * 72 / axes.figure.dpi), xycoords="axes fraction",
            textcoords="offset points", va="center", fontsize=size, color=MUTED, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def point_labels(axes: Axes, points: Sequence[tuple[float, float, str]], *, size: float = 6.5) -> None:
    """Label points, `(x, y, name)`, at the first of eight places in the axes without labels and lines.

    The figure must have been laid out. A name that fits nowhere is left out: its neighbours on the line show
    where it belongs.
    """
    inside = axes.get_window_extent()
    bars = [bar for bars in axes.collections for bar in bars.get_segments()]  # error bars
    lines = [line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"]
    markers = [[point] for line in axes.lines for point in line.get_xydata()]
    taken = [box for part in bars + lines + markers for box in _boxes(axes.transData.transform(part))]
    for x, y, name in points:
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=size, color=MUTED
            )
            box = text.get_window_extent()
            within = (
                inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            )
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _boxes(corners: Float[np.ndarray, "points 2"]) -> Iterator[Bbox]:
    """Yield small boxes along a polyline in pixels, close enough that no label fits between them."""
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        steps = max(1, int(max(abs(next_x - x), abs(next_y - y)) / 6))
        for t in np.linspace(0, 1, steps + 1):
            yield Bbox.from_bounds(x + t * (next_x - x) - 2.5, y + t * (next_y - y) - 2.5, 5, 5)
    for x, y in corners:
        yield Bbox.from_bounds(x - 4, y - 4, 8, 8)


def wrap(name: str, width: int) -> str:
    """Break a name after its own separators into the fewest lines of `width` columns, of similar length.

    A piece without separators that is longer than a line is cut.
    """
    whole = re.findall(r"[^_.\- ]*[_.\- ]|[^_.\- ]+", name)
    pieces = [part for piece in whole for part in _split_piece(piece, width)]
    lines = _fill(pieces, width)
    narrower = (_fill(pieces, w) for w in range(-(-columns(name) // len(lines)), width))
    return "\n".join(line.strip() for line in next((n for n in narrower if len(n) == len(lines)), lines))


def _split_piece(piece: str, width: int) -> Iterator[str]:
    """Yield parts of a piece that are at most `width` columns wide."""
    while piece:
        part = fit_columns(piece, width) or piece[0]
        yield part
        piece = piece[len(part) :]


def _fill(pieces: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for piece in pieces:
        if lines[-1] and columns(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return lines


_PLACES = [
    (5, 3, "left", "bottom"), (5, -3, "left", "top"), (-5, 3, "right", "bottom"), (-5, -3, "right", "top"),
    (0, 6, "center", "bottom"), (0, -6, "center", "top"), (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
]  # fmt: skip
