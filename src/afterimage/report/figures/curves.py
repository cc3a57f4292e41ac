"""Curves: the loss on validation images by epoch of a training, and PSNR by pass of an inversion's search."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from afterimage.config import AfterimageError, RunConfig, format_count
from afterimage.report.bounds import CURVE, OVERRUN_DB, features_label, mean_curve, with_curve
from afterimage.report.figures.labels import margin_labels, wrap
from afterimage.report.figures.style import (
    ENCODER_COLORS,
    MUTED,
    Drawing,
    drawable,
    grid_lines,
    legend,
    legend_entry,
    with_control,
)
from afterimage.report.rows import Row, Rows, group_by, short_encoders

DASHES = ["-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1, 1.2))]
PANELS = 12  # per figure
TITLE = 26  # characters per line of a panel's title
Epochs = list[dict[str, Any]]
Trained = tuple[Row, Epochs]
Panel = tuple[str, str, str, str]
# Ratio of successive learning rates below which there is a drop; smooth schedules have none.
DROP = 0.9
LEAST = 1.0  # dB from bottom to top of a panel


def training_curves(rows: Rows) -> list[Drawing]:
    """Draw a panel for each encoder and decoder, with a line for each layer.

    More than `PANELS` are split into a figure for each encoder. Empty if no row was trained by epochs.
    """
    found = [(row, _history(row)) for row in rows.decoders]
    trained = [(row, epochs) for row, epochs in found if len(epochs) > 1]
    if not trained:
        return []
    trained.sort(key=lambda pair: (*pair[0].order[:3], pair[0].decoder_order, pair[0].order))
    panels = group_by(
        trained, lambda pair: (pair[0].encoder, pair[0].control, pair[0].decoder_label, _loss(pair[0]))
    )
    caption, names = _caption(trained, len(rows.decoders)), short_encoders(rows.decoders)
    if len(panels) <= PANELS:
        return [Drawing("training-curves", "Training", caption, _figure(panels, names))]
    drawings = []
    for i, (encoder, own) in enumerate(group_by(panels, lambda panel: panel[0]).items(), 1):
        figure = _figure({panel: panels[panel] for panel in own}, names)
        drawings.append(Drawing(f"training-curves-{i}", f"Training: {names[encoder]}", caption, figure))
    return drawings


def _figure(groups: dict[Panel, list[Trained]], names: dict[str, str]) -> Figure:
    places, down, across = _places(list(groups))
    figure = Figure((max(4.4, 0.4 + 2.7 * across), max(3.0, 0.6 + 2.1 * down)), layout="constrained")
    ends, alike = {}, {}
    for place, ((encoder, control, decoder, loss), members) in zip(places, groups.items(), strict=True):
        axes = figure.add_subplot(down, across, place)
        ends[axes] = _draw(axes, members, loss == "mse")
        who = with_control(names[encoder], control)
        extra = "" if loss == "mse" else f"\nloss: {wrap(drawable(loss, 40), TITLE)}"
        axes.set_title(f"{wrap(drawable(who), TITLE)}\n{wrap(drawable(decoder, 72), TITLE)}{extra}")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        axes.set_ylabel("validation PSNR (dB) ↑" if loss == "mse" else "validation loss ↓")
        if loss == "mse":
            alike.setdefault(encoder, []).append(axes)
    for own in alike.values():
        _share_heights(own)
    legend(figure, _handles([member for members in groups.values() for member in members]), columns=2)
    figure.draw_without_rendering()
    for axes, labels in ends.items():
        margin_labels(axes, labels)
    return figure


def _places(groups: Sequence[Panel]) -> tuple[list[int], int, int]:
    """Return each panel's number from 1, row by row, and the grid's size; each encoder begins a new row."""
    counts = Counter((encoder, control) for encoder, control, *_ in groups)
    most = max(counts.values())
    across = most if most <= 4 else 3
    places, start = [], 1
    for count in counts.values():
        places += range(start, start + count)
        start += -(-count // across) * across
    return places, (start - 1) // across, across


def _history(row: Row) -> Epochs:
    """Return epochs with finite numbers and a loss above 0; none if damaged, which the caption counts."""

    def usable(epoch: dict[str, Any]) -> bool:
        cells = [epoch.get(name) for name in ("epoch", "learning_rate", "validation_loss")]
        return all(isinstance(c, int | float) and math.isfinite(c) for c in cells) and cells[-1] > 0

    try:
        return [epoch for epoch in row.run.history if usable(epoch)]
    except AfterimageError:
        return []


def _loss(row: Row) -> str:
    return row.config.recipe.loss if isinstance(row.config, RunConfig) else "unknown"


def _draw(axes: Axes, members: Sequence[Trained], is_mse: bool) -> list[tuple[float, str, str]]:
    """Draw the lines; return height, text and colour of the labels at their ends."""
    layers = group_by(members, lambda pair: pair[0].layer)
    ends = []
    for i, (layer, histories) in enumerate(layers.items()):
        shade = 0.75 * i / max(1, len(layers) - 1)
        color = matplotlib.colors.to_hex(matplotlib.colormaps["cividis"](shade))
        for row, epochs in histories:
            points = [(float(e["epoch"]), float(e["validation_loss"])) for e in epochs]
            kept = _kept(row, points)
            if kept not in points:  # training began with this closed form
                points.insert(0, kept)
            if is_mse:
                points, (kept,) = ([(x, -10 * math.log10(loss)) for x, loss in p] for p in (points, [kept]))
            axes.plot(*zip(*points, strict=True), color=color, ls=DASHES[i % len(DASHES)], lw=1.2)
            # Counted from the end, as a start may precede the epochs.
            drops = [points[d - len(epochs)] for d in _drops(epochs)]
            x, y = [x for x, _ in drops], [y for _, y in drops]
            axes.plot(x, y, "v", color=color, ms=4.5, mec="white", mew=0.5)
            axes.plot(*kept, "o", mfc="white", mec=color, ms=4.5)
        ends.append((points[-1][1], drawable(layer, 18), color))
    grid_lines(axes)
    return ends


def _kept(row: Row, points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return epoch and validation loss of the kept weights; the history has no entry for epoch 0."""
    known = row.training
    if known and known.best_epoch == 0 and known.best_validation_loss and known.best_validation_loss > 0:
        return 0.0, known.best_validation_loss
    found = [point for point in points if known and point[0] == known.best_epoch]
    return found[0] if found else min(points, key=lambda point: point[1])


def _drops(epochs: Epochs) -> list[int]:
    """Return indices of epochs with a clearly lower learning rate than the one before; none if many."""
    pairs = enumerate(itertools.pairwise(e["learning_rate"] for e in epochs), 1)
    drops = [i for i, (before, after) in pairs if after < DROP * before]
    return drops if len(drops) <= max(1, len(epochs) // 3) else []


def _share_heights(panels: Sequence[Axes]) -> None:
    """Give panels one range, of `LEAST` or more so that a flat line is not magnified to its noise."""
    limits = [axes.get_ylim() for axes in panels]
    low, high = min(limit[0] for limit in limits), max(limit[1] for limit in limits)
    margin = max(0.03 * (high - low), (LEAST - (high - low)) / 2)
    for axes in panels:
        axes.set_ylim(low - margin, high + margin)


def _handles(members: Sequence[Trained]) -> list[Any]:
    starts = any(row.training and row.training.best_epoch == 0 for row, _ in members)
    kept = f"epoch that is kept{' (0: the closed form, before the first)' if starts else ''}"
    handles = [legend_entry(kept, color=MUTED, marker="o", mfc="white", ls="none")]
    if any(_drops(epochs) for _, epochs in members):
        handles.append(legend_entry("learning rate lowered", color=MUTED, marker="v", ls="none"))
    return handles


def _caption(trained: Sequence[Trained], count: int) -> str:
    text = (
        "Validation loss by epoch, a panel for each encoder and decoder, a line a layer (dark: shallow, "
        "light: deep)."
    )
    if any(_loss(row) == "mse" for row, _ in trained):
        text += (
            " As PSNR of the mean squared error, which is lower than the table's mean of the images' PSNR; panels of "
            "one encoder share their range."
        )
    missing = count - len(trained)
    return text + (
        f" {missing} of {count} rows have no epochs to show (closed form, or no history)." if missing else ""
    )


def saturation(rows: Rows) -> list[Drawing]:
    """Draw the mean PSNR of inversions over passes: a line for each run, dashed if it started from grey.

    Empty where no inversion kept the curve of a search; the caption counts searches without one.
    """
    inversions = with_curve(rows.inversions)
    lost = sum(row.config.estimate is None for row in rows.inversions) - len(inversions)
    if not inversions:
        return []
    figure = Figure((6.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    sources = dict.fromkeys(map(features_label, inversions))
    colors = dict(zip(sources, itertools.cycle(ENCODER_COLORS), strict=False))
    ends = []
    for row in inversions:
        curve = mean_curve(row.run)
        steps, means = zip(*curve, strict=True)
        color = colors[features_label(row)]
        axes.plot(steps, means, color=color, ls="-" if row.inversion.start else "--")
        ends.append((means[-1], f"{means[-1]:.1f}", color))
        passes, peak = max(curve, key=itemgetter(1))
        if peak - means[-1] >= OVERRUN_DB:
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
    grid_lines(axes)
    handles = [legend_entry(drawable(name, 60), color=color) for name, color in colors.items()]
    starts = (("-", "from a decoder"), ("--", "from grey"))
    legend(figure, handles + [legend_entry(label, color=MUTED, ls=ls) for ls, label in starts], columns=2)
    figure.draw_without_rendering()
    axes.set_ylim(axes.get_ylim())
    margin_labels(axes, ends, size=8.0)
    caption = (
        "PSNR of the image whose features fit best so far, mean over test images, against passes through the encoder: "
        "a lower bound on what the features keep."
    )
    if lost:
        caption += f" {format_count(lost, 'search', 'searches')} without {CURVE} left out."
    return [Drawing("saturation", "Where inversion saturates", caption, figure)]
