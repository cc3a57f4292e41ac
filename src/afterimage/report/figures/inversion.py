"""Saturation of inversions: PSNR against passes through the encoder and back."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from afterimage.config import counted
from afterimage.report.bounds import CURVE, PAST, features_of, highest, mean_curve, searched
from afterimage.report.figures.fonts import drawable
from afterimage.report.figures.labels import margin_labels
from afterimage.report.figures.style import ENCODER_COLORS, MUTED, Drawing, grid_y, legend, style
from afterimage.report.rows import Row, Rows


def saturation(rows: Rows) -> list[Drawing]:
    """Draw the curves of all searches among the rows; an empty list where none is kept."""
    drawing = draw_saturation(rows.inversions)
    return [drawing] if drawing else []


def draw_saturation(inversions: Sequence[Row]) -> Drawing | None:
    """Draw the mean PSNR of inversions over passes: a line for each run, dashed if it started from grey.

    None where no inversion kept the curve of a search; the caption counts searches without one.
    """
    lost = sum(row.config.estimate is None for row in inversions)
    inversions = searched(inversions)
    lost -= len(inversions)
    if not inversions:
        return None
    with style():
        figure = Figure((6.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        sources = list(dict.fromkeys(map(features_of, inversions)))
        colors = {name: ENCODER_COLORS[i % len(ENCODER_COLORS)] for i, name in enumerate(sources)}
        ends = []
        for row in inversions:
            curve = mean_curve(row.run)
            steps, means = zip(*curve, strict=True)
            color = colors[features_of(row)]
            axes.plot(steps, means, color=color, ls="-" if row.inversion.start else "--")
            ends.append((means[-1], f"{means[-1]:.1f}", color))
            passes, peak = highest(curve)
            if peak - means[-1] >= PAST:
                axes.plot(passes, peak, "o", ms=4, color=color)
                axes.annotate(
                    f"{peak:.1f} after {passes}", (passes, peak), (0, 5),
                    textcoords="offset points", ha="center", fontsize=8.0, color=MUTED,
                )  # fmt: skip
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, max(1, *(line.get_xdata()[-1] for line in axes.lines)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("passes through the encoder and back (0: the start)")
        axes.set_ylabel("PSNR (dB) ↑")
        grid_y(axes)
        handles = [Line2D([], [], color=color, label=drawable(name, 60)) for name, color in colors.items()]
        handles += [
            Line2D([], [], color=MUTED, ls=ls, label=label)
            for ls, label in (("-", "from a decoder"), ("--", "from grey"))
        ]
        legend(figure, handles, columns=2)
        figure.draw_without_rendering()
        axes.set_ylim(axes.get_ylim())
        margin_labels(axes, ends, size=8.0)
    caption = (
        "PSNR of the image whose features fit best so far, mean over test images, against passes through the encoder: "
        "a lower bound on what the features keep."
    )
    if lost:
        caption += f" {counted(lost, 'search', 'searches')} without {CURVE} left out."
    return Drawing("saturation", "Where inversion saturates", caption, figure)
