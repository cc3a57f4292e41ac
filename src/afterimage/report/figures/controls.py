"""Figures of controls and of error breakdowns: by frequency, kind of region and place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from afterimage.config import split_source
from afterimage.evaluation.intervals import NAME
from afterimage.report.controls import Part, decoder, read_parts, share_lost
from afterimage.report.figures.fonts import drawable
from afterimage.report.figures.style import INK, MUTED, Drawing, error_bars, grid_y, legend, short_encoders
from afterimage.report.format import significant
from afterimage.report.rows import Row, Rows
from afterimage.runs.controls import PLANES, REGIONS, STAND_INS

CONTROL_LOOKS = {
    "own": ("#000000", "o"), "another": ("#D55E00", "s"), "shuffled": ("#56B4E9", "D"),
    "mean": ("#009E73", "^"), "zero": ("#CC79A7", "v"), "colour": (MUTED, "|"),
}  # fmt: skip
LINE = 0.24  # inches for each row


def controls(rows: Rows) -> list[Drawing]:
    """Draw a line for each row, a marker for each control; an empty list if no run has controls."""
    parts, _ = read_parts(rows.decoders, "controls")
    if not parts:
        return []
    figure = Figure((7.4, 1.5 + LINE * len(parts)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
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
    left.set_yticks(range(len(parts)), [label(p.row) for p in parts])
    left.set_ylim(len(parts) - 0.5, -0.5)
    left.set_xlabel("PSNR (dB) against the image")
    right.set_xlabel("distance of features / their norm")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(length=2.5)
    names = {"own": "its own features", **STAND_INS}
    handles = [
        Line2D([], [], color=c, marker=m, ls="none", label=names[k]) for k, (c, m) in CONTROL_LOOKS.items()
    ]
    legend(figure, handles, columns=3)
    return [Drawing("controls", "Preserved or guessed", _caption(parts), figure)]


def label(row: Row) -> str:
    """Write a row's features and decoder on one line, the encoder without its weights' tag."""
    sources = [split_source(source) for source in row.sources]
    shown = " + ".join(f"{model.partition('.')[0]}:{layer}" for model, layer in sources)
    return f"{drawable(shown, 36)}, {drawable(decoder(row), 30)}"


def _caption(parts: list[Part]) -> str:
    return (
        "Left: features that are not the image's own through the trained decoder, scored against the image; "
        f"mean over {parts[0].facts.images} test images with its {NAME}. What reaches the first "
        "marker was guessed. Right: the distance of the re-encoded reconstruction's features from the image's "
        "(disc) beside that of another image's (square)."
    )


PANEL = (2.7, 2.1)
MAP = 1.15
DASHES = ("-", "--", ":", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (1, 4)))
ERROR_LOOKS = {
    "luma": ("#000000", "o"), "cb": ("#0072B2", "s"), "cr": ("#D55E00", "s"),
    "flat": ("#56B4E9", "D"), "edge": ("#009E73", "^"), "texture": ("#CC79A7", "v"),
}  # fmt: skip


def lost(rows: Rows) -> list[Drawing]:
    """Draw the error by frequency, kind of region and place; an empty list if no run has a breakdown."""
    parts, _ = read_parts(rows.decoders, "error_breakdown")
    return [_by_frequency(parts), _by_kind(parts), _by_place(parts)] if parts else []


def shades(parts: Sequence[Part]) -> dict[tuple[str, ...], tuple]:
    """Return colours by sources, from light to dark through the layers of each encoder."""
    layers: dict[str, dict[tuple[str, ...], None]] = {}
    for part in parts:
        layers.setdefault(part.row.encoder, {})[part.row.sources] = None
    colors = matplotlib.colormaps["viridis_r"]
    return {
        sources: colors(0.15 + 0.8 * i / max(1, len(members) - 1))
        for members in layers.values()
        for i, sources in enumerate(members)
    }


def dashes(parts: Sequence[Part]) -> dict[str, Any]:
    """Return a dash pattern for each decoder."""
    names = dict.fromkeys(decoder(p.row) for p in parts)
    return {name: DASHES[i % len(DASHES)] for i, name in enumerate(names)}


def name_layers(
    axes: Axes, parts: Sequence[Part], colors: Mapping[tuple[str, ...], tuple], *, loc: str
) -> None:
    """Add a legend of one encoder's layers to its panel, in the colours of `shades`."""
    layers = dict.fromkeys((p.row.sources, drawable(p.row.layer, 16)) for p in parts)
    handles = [Line2D([], [], color=colors[sources], label=text) for sources, text in layers]
    axes.legend(handles=handles, loc=loc, fontsize=6.5, handlelength=1.2, labelspacing=0.2)


def _by_frequency(parts: Sequence[Part]) -> Drawing:
    encoders = list(dict.fromkeys(p.row.encoder for p in parts))
    names = short_encoders([p.row for p in parts])
    figure = Figure((max(4.4, 0.8 + PANEL[0] * len(encoders)), 1.1 + PANEL[1] * 2), layout="constrained")
    panels = figure.subplots(2, len(encoders), sharex=True, sharey=True, squeeze=False)
    colors, patterns = shades(parts), dashes(parts)
    for j, encoder in enumerate(encoders):
        members = [p for p in parts if p.row.encoder == encoder]
        for i, plane in enumerate(("luma", "chroma")):
            axes = panels[i][j]
            axes.axhline(1, color=MUTED, lw=0.7, ls=(0, (4, 3)))
            for part in members:
                line = share_lost(part, plane)
                axes.plot(
                    [f for f, _ in line], [s for _, s in line],
                    color=colors[part.row.sources], ls=patterns[decoder(part.row)], lw=1.2,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks([1 / 64, 1 / 16, 1 / 4], ["1/64", "1/16", "1/4"])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: significant(value, 4)))
            grid_y(axes)
            panels[i][0].set_ylabel(f"{plane}: error / image")
        panels[0][j].set_title(drawable(names[encoder], 28))
        panels[1][j].set_xlabel("cycles a pixel")
        name_layers(panels[0][j], members, colors, loc="best")
    handles = [Line2D([], [], color=MUTED, ls=ls, label=name) for name, ls in patterns.items()]
    legend(figure, handles, columns=4)
    caption = (
        "The error's power over the image's at each spatial frequency (radial averages of Hann-windowed spectra, "
        f"summed over {parts[0].facts.images} test images), luma above and chroma (Cb and Cr) below, darker "
        "the deeper the layer. At the broken line nothing is left; above it the decoder adds what is not there."
    )
    return Drawing("lost-by-frequency", "What is lost, by frequency", caption, figure)


def _by_kind(parts: Sequence[Part]) -> Drawing:
    figure = Figure((7.4, 1.4 + LINE * len(parts)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
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
    left.set_yticks(range(len(parts)), [label(p.row) for p in parts])
    left.set_ylim(len(parts) - 0.5, -0.5)
    for axes in (left, right):
        axes.set_xlabel("PSNR (dB)")
        axes.grid(axis="x")
        axes.tick_params(length=2.5)
    left.set_title("luma and chroma")
    right.set_title("kind of region")
    names = {**PLANES, **dict(zip(REGIONS, REGIONS, strict=True))}
    handles = [
        Line2D([], [], color=c, marker=m, ls="none", label=names[key]) for key, (c, m) in ERROR_LOOKS.items()
    ]
    legend(figure, handles, columns=6)
    rules = parts[0].facts.regions
    caption = (
        "Left: PSNR of luma, Cb and Cr, each over its own range of 1, mean over test images with its "
        f"{NAME}. Right: of the mean squared error over all pixels of a kind, by the original's luma in "
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
        place = part.facts.place
        mean = math.sqrt(sum(v * v for row in place for v in row) / (len(place) * len(place[0]))) or 1.0
        relative = [[v / mean for v in row] for row in place]
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
