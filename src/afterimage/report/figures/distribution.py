"""Distributions of scores: every test image in every row, not only the means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afterimage.report.figures.style import (
    INK,
    MUTED,
    Drawing,
    dashes,
    decoder_styles,
    drawable,
    has_score,
    lpips_note,
    metric_label,
    metrics_of,
    with_control,
)
from afterimage.report.rows import Row, Rows, group_by, short_encoders

ROW_INCHES = 0.2
GOLDEN = 0.618034


def distributions(rows: Rows) -> list[Drawing]:
    """Draw a box and dots for each row of two images or more; an empty list where there is none."""
    shown = [row for row in rows.all if len(row.per_image) > 1]
    if not shown:
        return []
    colors = {name: look.color for name, look in decoder_styles(rows.decoders).items()}
    metrics, names = metrics_of(shown), short_encoders(rows.decoders)
    # A group's heading has a line of its own above its rows.
    places, headings, place = [], [], 0.0
    for (encoder, control), members in group_by(shown, lambda r: (r.encoder, r.control)).items():
        headings.append((place, with_control(names.get(encoder, "baselines"), control), control))
        places += [(place + i, row) for i, row in enumerate(members, 1)]
        place += len(members) + 1.3
    figure = Figure((2.0 + 2.3 * len(metrics), 0.7 + ROW_INCHES * (place + 0.5)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        for y, row in places:
            values = list(row.values(metric).values()) if has_score(row, metric, net) else []
            if values:
                _box(axes, y, values, colors.get(row.decoder_label, MUTED), row.control)
        axes.set_xlabel(metric_label(metric, net))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(place - 0.6, -0.7)
    has_seeds = len({row.seed for row in shown if not row.is_baseline}) > 1
    panels[0].set_yticks([y for y, _ in places], [_label(row, has_seeds) for _, row in places])
    for y, text, control in headings:
        panels[0].annotate(
            drawable(text), (0, y), (-4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            va="center", weight="bold", fontsize=7.5, color="#b00020" if control else INK,
        )  # fmt: skip
    caption = (
        "Every dot is a test image; the box holds the middle half with the median, whiskers reach the "
        f"farthest image within 1.5 box lengths.{lpips_note(shown)}"
    )
    return [Drawing("distributions", "Image by image", caption, figure)]


def _label(row: Row, has_seeds: bool) -> str:
    if row.is_baseline:
        return drawable(row.label, 34)
    seed = f", seed {row.seed}" if has_seeds else ""
    return drawable(f"{row.layer} · {row.decoder_label}{seed}", 44)


def _box(axes: Axes, y: float, values: Sequence[float], color: str, control: str) -> None:
    # Multiples of the golden ratio spread dots up and down: evenly, and the same in every report.
    shift = (np.arange(len(values)) * GOLDEN % 1 - 0.5) * 0.62
    axes.scatter(values, y + shift, s=3.5, color=color, alpha=0.35, lw=0, zorder=2, rasterized=True)
    line = {"color": color, "lw": 1.0}
    axes.boxplot(
        [list(values)], positions=[y], orientation="horizontal", widths=0.62, showfliers=False,
        manage_ticks=False, boxprops=line | {"ls": dashes(control)}, whiskerprops=line,
        capprops=line, medianprops=line | {"lw": 2.0}, zorder=3,
    )  # fmt: skip
