"""Figures of controls: what is guessed, what is lost by frequency, kind of region and place, and rate-distortion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from afterimage.config import split_source
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.controls import Part, coders, curve_of, decoder, images, read_parts, share_lost
from afterimage.report.figures.style import (
    INK,
    MUTED,
    Drawing,
    drawable,
    error_bars,
    grid_lines,
    legend,
    legend_entry,
)
from afterimage.report.format import significant
from afterimage.report.rows import Row, Rows, group_by, mean_over_images, short_encoders
from afterimage.runs.controls import ABLATIONS, PLANES, REGIONS

CONTROL_LOOKS = {
    "own": ("#000000", "o"), "another": ("#D55E00", "s"), "shuffled": ("#56B4E9", "D"),
    "mean": ("#009E73", "^"), "zero": ("#CC79A7", "v"), "colour": (MUTED, "|"),
}  # fmt: skip
ERROR_LOOKS = {
    "luma": ("#000000", "o"), "cb": ("#0072B2", "s"), "cr": ("#D55E00", "s"),
    "flat": ("#56B4E9", "D"), "edge": ("#009E73", "^"), "texture": ("#CC79A7", "v"),
}  # fmt: skip
CODECS = {"JPEG": "--", "WebP": ":"}
DASHES = ("-", "--", ":", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (1, 4)))
LINE = 0.24  # inches for each row
PANEL, MAP = (2.7, 2.1), 1.15  # inches


def controls(rows: Rows) -> list[Drawing]:
    """Draw a line for each row, a marker for each control; an empty list if no run has controls."""
    parts, _ = read_parts(rows.decoders, "controls")
    if not parts:
        return []
    figure, left, right = _row_panels(parts, 1.5, width_ratios=(3, 2))
    for y, part in enumerate(parts):
        for control, (color, marker) in CONTROL_LOOKS.items():
            score = part.mean(f"{control}_psnr")
            left.errorbar(
                score.estimate, y, xerr=error_bars([score]), color=color, marker=marker, ls="none", elinewidth=0.8,
                markersize=7 if marker == "|" else 4,
            )  # fmt: skip
        distances = part.facts.distances
        right.plot([distances.reencoded, distances.random_pair], [y, y], color="#cccccc", lw=1, zorder=0)
        right.plot(distances.reencoded, y, "o", color=INK)
        right.plot(distances.random_pair, y, "s", color="#D55E00")
    left.set_xlabel("PSNR (dB) against the image")
    right.set_xlabel("distance of features / their norm")
    right.set_xlim(left=0)
    names = {"own": "its own features", **ABLATIONS}
    legend(figure, _markers(CONTROL_LOOKS, names), columns=3)
    caption = (
        "Left: features that are not the image's own through the trained decoder, scored against the image; "
        f"mean over {images(parts)} with its {INTERVAL_NAME}. What reaches the first "
        "marker was guessed. Right: the distance of the re-encoded reconstruction's features from the image's "
        "(disc) beside that of another image's (square)."
    )
    return [Drawing("controls", "Preserved or guessed", caption, figure)]


def _row_panels(parts: Sequence[Part], height: float, **options: Any) -> tuple[Figure, Axes, Axes]:
    """Make two panels whose y axis has a place for each row; `height` is that of all but the rows."""
    figure = Figure((7.4, height + LINE * len(parts)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, **options)
    left.set_yticks(range(len(parts)), [label(p.row) for p in parts])
    left.set_ylim(len(parts) - 0.5, -0.5)
    for axes in (left, right):
        grid_lines(axes, "x")
    return figure, left, right


def _markers(looks: Mapping[str, tuple[str, str]], names: Mapping[str, str]) -> list[Any]:
    return [legend_entry(names[name], color=c, marker=m, ls="none") for name, (c, m) in looks.items()]


def label(row: Row) -> str:
    """Write a row's features and decoder on one line, the encoder without its weights' tag."""
    sources = [split_source(source) for source in row.sources]
    shown = " + ".join(f"{model.partition('.')[0]}:{layer}" for model, layer in sources)
    return f"{drawable(shown, 36)}, {drawable(decoder(row), 30)}"


def error_breakdown(rows: Rows) -> list[Drawing]:
    """Draw the error by frequency, kind of region and place; an empty list if no run has a breakdown."""
    parts, _ = read_parts(rows.decoders, "error_breakdown")
    return [_by_frequency(parts), _by_kind(parts), _by_place(parts)] if parts else []


def _encoder_panels(
    parts: Sequence[Part], height: float, down: int = 1
) -> tuple[Figure, np.ndarray, list[list[Part]]]:
    """Make panels `(down, encoders)`; return the parts of each encoder too."""
    groups = list(group_by(parts, lambda part: part.row.encoder).values())
    figure = Figure((max(4.4, 0.8 + PANEL[0] * len(groups)), height), layout="constrained")
    panels = figure.subplots(down, len(groups), sharex=True, sharey=True, squeeze=False)
    names = short_encoders([part.row for part in parts])
    for axes, members in zip(panels[0], groups, strict=True):
        axes.set_title(drawable(names[members[0].row.encoder], 28))
    return figure, panels, groups


def _shades(parts: Sequence[Part]) -> dict[tuple[str, ...], Any]:
    """Return colours by sources, from light to dark through the layers of one encoder."""
    layers = list(dict.fromkeys(part.row.sources for part in parts))
    scale, last = matplotlib.colormaps["viridis_r"], max(1, len(layers) - 1)
    return {sources: scale(0.15 + 0.8 * i / last) for i, sources in enumerate(layers)}


def _dashes(parts: Sequence[Part]) -> dict[str, Any]:
    """Return a dash pattern for each decoder."""
    names = dict.fromkeys(decoder(part.row) for part in parts)
    return dict(zip(names, itertools.cycle(DASHES), strict=False))


def _name_layers(axes: Axes, parts: Sequence[Part], loc: str) -> None:
    """Add a legend of one encoder's layers to its panel, in the colours of `_shades`."""
    colors = _shades(parts)
    layers = dict.fromkeys((part.row.sources, drawable(part.row.layer, 16)) for part in parts)
    handles = [legend_entry(text, color=colors[sources]) for sources, text in layers]
    axes.legend(handles=handles, loc=loc, fontsize=6.5, handlelength=1.2, labelspacing=0.2)


def _by_frequency(parts: Sequence[Part]) -> Drawing:
    figure, panels, groups = _encoder_panels(parts, 1.1 + PANEL[1] * 2, down=2)
    patterns = _dashes(parts)
    for column, members in zip(panels.T, groups, strict=True):
        colors = _shades(members)
        for axes, plane in zip(column, ("luma", "chroma"), strict=True):
            axes.axhline(1, color=MUTED, lw=0.7, ls=(0, (4, 3)))
            for part in members:
                line = zip(*share_lost(part, plane), strict=True)
                axes.plot(*line, color=colors[part.row.sources], ls=patterns[decoder(part.row)], lw=1.2)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks([1 / 64, 1 / 16, 1 / 4], ["1/64", "1/16", "1/4"])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 4)))
            grid_lines(axes)
        column[-1].set_xlabel("cycles a pixel")
        _name_layers(column[0], members, "best")
    for axes, plane in zip(panels[:, 0], ("luma", "chroma"), strict=True):
        axes.set_ylabel(f"{plane}: error / image")
    legend(figure, [legend_entry(name, color=MUTED, ls=ls) for name, ls in patterns.items()], columns=4)
    caption = (
        "The error's power over the image's at each spatial frequency (radial averages of Hann-windowed spectra, "
        f"summed over {images(parts)}), luma above and chroma (Cb and Cr) below, darker "
        "the deeper the layer. At the broken line nothing is left; above it the decoder adds what is not there."
    )
    return Drawing("lost-by-frequency", "What is lost, by frequency", caption, figure)


def _by_kind(parts: Sequence[Part]) -> Drawing:
    figure, left, right = _row_panels(parts, 1.4)
    for y, part in enumerate(parts):
        for plane in PLANES:
            score, (color, marker) = part.mean(f"psnr_{plane}"), ERROR_LOOKS[plane]
            left.errorbar(
                score.estimate, y, xerr=error_bars([score]), color=color, marker=marker, elinewidth=0.8
            )
        for kind in REGIONS:
            error, (color, marker) = getattr(part.facts.regions, kind).mse, ERROR_LOOKS[kind]
            if error is not None:
                right.plot(-10 * math.log10(max(error, 1e-10)), y, color=color, marker=marker)
    for axes, title in ((left, "luma and chroma"), (right, "kind of region")):
        axes.set_xlabel("PSNR (dB)")
        axes.set_title(title)
    names = {**PLANES, **dict(zip(REGIONS, REGIONS, strict=True))}
    legend(figure, _markers(ERROR_LOOKS, names), columns=6)
    rules = parts[0].facts.regions
    caption = (
        "Left: PSNR of luma, Cb and Cr, each over its own range of 1, mean over test images with its "
        f"{INTERVAL_NAME}. Right: of the mean squared error over all pixels of a kind, by the original's luma in "
        f"{rules.window} × {rules.window} pixels: flat (standard deviation below {rules.flat_below:g}), "
        f"else edge (structure tensor's coherence {rules.edge_from:g} or more), else texture."
    )
    return Drawing("lost-by-kind", "What is lost, by colour and kind of region", caption, figure)


def _by_place(parts: Sequence[Part]) -> Drawing:
    across = min(5, len(parts))
    down = -(-len(parts) // across)
    figure = Figure((max(4.4, 0.4 + (MAP + 0.3) * across), 0.3 + (MAP + 0.45) * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    shown = []
    for axes, part in zip(panels, parts, strict=False):
        place = np.array(part.facts.place)
        relative = place / (np.sqrt((place**2).mean()) or 1.0)
        shown.append(axes.imshow(relative, cmap="viridis", vmin=0.5, vmax=1.5, interpolation="nearest"))
        axes.set_title(
            label(part.row).replace(":", "\n", 1).replace(", ", "\n", 1), fontsize=6, weight="normal"
        )
    for axes in panels:
        axes.set_axis_off()
    bar = figure.colorbar(shown[0], ax=panels, shrink=0.7, extend="both", pad=0.02)
    bar.set_label("error / its mean")
    caption = (
        "The root mean squared error at each place of the crop over its mean, from all test images: borders and "
        "the grid of locations show where a layer keeps less."
    )
    return Drawing("lost-by-place", "What is lost, by place", caption, figure)


def rate(rows: Rows) -> list[Drawing]:
    """Draw a panel for each encoder, a line for each layer; an empty list if no run has these data."""
    parts, _ = read_parts(rows.decoders, "rate_distortion")
    if not parts:
        return []
    figure, panels, groups = _encoder_panels(parts, 3.4)
    patterns = _dashes(parts)
    for axes, members in zip(panels[0], groups, strict=True):
        colors = _shades(members)
        for codec, ls in CODECS.items():
            curve = curve_of(members[0], codec)
            axes.plot([c.bits_per_pixel for c in curve], [c.psnr for c in curve], color=MUTED, ls=ls, lw=1)
        for part in members:
            points = [p for p in part.facts.points if p.bits < 32]
            scores = [
                mean_over_images([float(r["psnr"]) for r in part.images if r["bits"] == p.bits])
                for p in points
            ]
            axes.errorbar(
                [p.bits_per_pixel for p in points], [s.estimate for s in scores], error_bars(scores),
                color=colors[part.row.sources], ls=patterns[decoder(part.row)], marker="o", markersize=2.5,
                lw=1.1, elinewidth=0.7,
            )  # fmt: skip
        _name_layers(axes, members, "upper right")
        axes.set_xscale("log")
        axes.set_xlabel("bits a pixel (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        grid_lines(axes)
    panels[0][0].set_ylabel("PSNR (dB)")
    handles = [legend_entry(name, color=INK, ls=ls) for name, ls in patterns.items()]
    legend(
        figure, handles + [legend_entry(codec, color=MUTED, ls=ls) for codec, ls in CODECS.items()], columns=4
    )
    caption = (
        "Features at 1, 2, 3, 4, 6 and 8 bits (left to right) after "
        f"{coders(parts)}, rebuilt by decoders that were fitted on unquantised ones; mean over "
        f"{images(parts)} with its {INTERVAL_NAME}. Grey: the same images as JPEG and "
        "WebP files. Channels are quantised between their 0.1 % and 99.9 % quantiles over training images."
    )
    return [Drawing("rate", "Quality against the size of the features", caption, figure)]
