"""Quality against the decoder's input, in feature locations or values, and against its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from afterimage.evaluation.intervals import NAME
from afterimage.report.compare import Comparison, Entry, Measured
from afterimage.report.figures.fonts import drawable
from afterimage.report.figures.labels import point_labels
from afterimage.report.figures.style import (
    MUTED,
    Drawing,
    Style,
    controls_note,
    dashes,
    decoder_styles,
    encoder_styles,
    error_bars,
    grid_y,
    has,
    legend,
    lpips_note,
    metric_label,
    metrics_of,
    short_encoders,
)
from afterimage.report.rows import Row, Rows, pool
from afterimage.runs.results import Interval

PANEL = (2.35, 1.95)
Point = tuple[float, Interval, Row]


@dataclass(frozen=True)
class Look:
    """Functions for a row's place on the x axis and the name of its line, and styles of the lines."""

    x: Callable[[Row], float]
    line: Callable[[Row], str]
    styles: dict[str, Style]


def quality_by_locations(rows: Rows) -> list[Drawing]:
    """Draw a column for each decoder, a line for each encoder; an empty list for one number of locations."""
    shown = [row for row in rows.decoders if row.locations]
    counts = sorted({row.locations for row in shown})
    if len(counts) < 2:
        return []
    names = short_encoders(shown)
    looks = encoder_styles(list(names))
    # Encoders with the same number of locations stand side by side.
    beside = {name: 1.09 ** (i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    columns = list(dict.fromkeys(r.decoder_label for r in sorted(shown, key=lambda r: r.decoder_order)))
    figure, panels = _panels(shown, columns)
    for axes, metric, members in _members(shown, columns, panels, lambda r: r.decoder_label):
        by_locations = Look(lambda r: r.locations * beside[r.encoder], lambda r: r.encoder, looks)
        _draw(axes, members, metric, by_locations)
        axes.set_xscale("log")
        axes.set_xlim(counts[0] / 1.8, counts[-1] * 1.8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_apart(counts), [f"{count:,}" for count in _apart(counts)])
    _heads(panels, shown, columns, "feature locations (log scale)")
    legend(figure, _handles(looks, lambda name: drawable(names[name]), shown), columns=4)
    caption = (
        "Every layer by the number of its feature locations (height × width), a column a decoder, a line an "
        f"encoder through its layers in execution order; mean over test images with its {NAME}."
        f"{controls_note(shown)}{lpips_note(shown)}"
    )
    return [Drawing("quality-by-locations", "Quality and spatial resolution", caption, figure)]


def quality_by_parameters(rows: Rows) -> list[Drawing]:
    """Draw a column for each encoder, a line for each decoder; an empty list for one parameter count."""
    shown = [row for row in rows.decoders if row.parameters]
    if len({row.parameters for row in shown}) < 2:
        return []
    names, looks = short_encoders(shown), decoder_styles(shown)
    columns = list(names)
    figure, panels = _panels(shown, columns)
    low, high = min(r.parameters for r in shown), max(r.parameters for r in shown)
    panels[0][0].set_xlim(low / 2, high * 2)
    named = {}
    for axes, metric, members in _members(shown, columns, panels, lambda r: r.encoder):
        by_size = Look(lambda r: float(r.parameters), lambda r: r.decoder_label, looks)
        points = _draw(axes, members, metric, by_size)
        if metric == "psnr":
            named[axes] = [(x, score.estimate, drawable(row.layer, 18)) for x, score, row in points]
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 30 else (1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_count))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _heads(panels, shown, [names[c] for c in columns], "decoder parameters (log scale)")
    legend(figure, _handles(looks, lambda name: drawable(name, 48), shown), columns=4)
    figure.draw_without_rendering()
    for axes, points in named.items():
        point_labels(axes, points)
    figure.set_layout_engine("none")  # labels lie inside the axes: another layout would change nothing
    caption = (
        "Every row by the size of its decoder, a column an encoder, a line a decoder through the layers in "
        f"execution order (named where there is room); mean over test images with its {NAME}."
        f"{controls_note(shown)}{lpips_note(shown)}"
    )
    return [Drawing("quality-by-parameters", "Quality and decoder size", caption, figure)]


OTHERS = "#b5b5b5"
"""Colour of an atlas's encoders."""


def standing(comparison: Comparison) -> Drawing:
    """Draw the user's rows among those of an atlas by feature values: answers down, metrics across."""
    mine = [standing.mine for standing in comparison.standings]
    answers = list(dict.fromkeys(e.measured for e in mine))
    metrics = comparison.columns
    names, others = _by_encoder(mine), _by_encoder(comparison.atlas)
    looks = encoder_styles(list(names))
    figure = Figure((0.8 + PANEL[0] * len(metrics), 1.2 + PANEL[1] * len(answers)), layout="constrained")
    panels = figure.subplots(len(answers), len(metrics), squeeze=False, sharex=True)
    named = {}
    for line, measured in zip(panels, answers, strict=True):
        for axes, (metric, net) in zip(line, metrics, strict=True):
            firsts = []
            for name, rows in others.items():
                if found := _scored(rows, measured, metric, net):
                    _through(axes, found, metric, Style(OTHERS, "o"), zorder=1)
                    firsts.append((found[0].values, found[0].scores[metric], _bare(name, others)))
            for name, rows in names.items():
                _through(axes, _scored(rows, measured, metric, net), metric, looks[name], zorder=2)
            named[axes] = firsts
            axes.set_xscale("log")
            axes.margins(x=0.2)  # room for names
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            grid_y(axes)
        line[0].set_ylabel(drawable(measured.answer, 24))
    for axes, metric in zip(panels[0], metrics, strict=True):
        axes.set_title(metric_label(*metric))
    for axes in panels[-1]:
        axes.set_xlabel("feature values per pixel value")
    keys = {_bare(name, names): looks[name] for name in names} | {"atlas": Style(OTHERS, "o")}
    handles = [Line2D([], [], lw=0.8, label=key, color=s.color, marker=s.marker) for key, s in keys.items()]
    legend(figure, handles, columns=4)
    figure.draw_without_rendering()
    for axes, firsts in named.items():
        point_labels(axes, firsts, size=5.5)
    figure.set_layout_engine("none")
    caption = (
        "Means over the same test images by the number of feature values for each value of the image (log scale), a "
        "line an encoder through its layers in execution order; of the atlas, in grey, all rows measured alike"
    )
    return Drawing("standing", "Among the encoders of an atlas", caption, figure)


def _by_encoder(rows: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = defaultdict(list)
    for row in rows:
        found[row.encoder + row.name.removeprefix(row.features)].append(row)
    return found


def _bare(name: str, names: Iterable[str]) -> str:
    """Return an encoder's name, without the weights' tag where names stay distinct."""
    bare = name.partition(".")[0]
    return drawable(bare if [n.partition(".")[0] for n in names].count(bare) == 1 else name, 32)


def _scored(rows: Sequence[Entry], measured: Measured, metric: str, net: str) -> list[Entry]:
    return [e for e in rows if e.measured == measured and e.has(metric, net)]


def _through(axes: Axes, rows: Sequence[Entry], metric: str, look: Style, *, zorder: int) -> None:
    hollow = any(row.is_random for row in rows)
    axes.plot(
        [row.values for row in rows], [row.scores[metric] for row in rows], color=look.color, marker=look.marker,
        lw=0.8, mfc="white" if hollow else look.color, zorder=zorder,
    )  # fmt: skip


def _panels(rows: Sequence[Row], columns: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """Make axes `(metrics, columns)`: metrics down, columns across; a single column is laid out in a row."""
    metrics = metrics_of(rows)
    down, across = (1, len(metrics)) if len(columns) == 1 else (len(metrics), len(columns))
    size = max(4.4, 0.8 + PANEL[0] * across), 1.1 + PANEL[1] * down
    figure = Figure((size[0], max(size[1], 2.9)), layout="constrained")
    panels = figure.subplots(
        down, across, squeeze=False, sharex=True, sharey="row" if len(columns) > 1 else False
    )
    return figure, panels.T if len(columns) == 1 else panels


def _members(
    rows: Sequence[Row], columns: Sequence[str], panels: np.ndarray, column: Callable[[Row], str]
) -> Iterator[tuple[Axes, str, list[Row]]]:
    """Yield each panel with its metric and rows."""
    for line, (metric, net) in zip(panels, metrics_of(rows), strict=True):
        for axes, name in zip(line, columns, strict=True):
            yield axes, metric, [r for r in rows if column(r) == name and has(r, metric, net)]


def _draw(axes: Axes, rows: Sequence[Row], metric: str, look: Look) -> list[Point]:
    """Draw a line for each of the look's names and random controls; return the points drawn."""
    drawn: list[Point] = []
    cells: dict[tuple[str, str], dict[tuple[object, ...], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[look.line(row), row.control][(*row.sources, row.fusion_letter, row.decoder_label)].append(row)
    for (name, control), members in cells.items():
        points = [(look.x(m[0]), s, m[0]) for m in members.values() if (s := pool(m, metric))]
        if not points:
            continue
        points.sort(key=lambda p: (p[2].order, p[0]))
        drawn += points
        style, fused = look.styles[name], len(points[0][2].sources) > 1
        axes.errorbar(
            [p[0] for p in points], [p[1].estimate for p in points], error_bars([p[1] for p in points]),
            color=style.color, marker=style.marker, mfc="white" if control else style.color, elinewidth=0.9,
            capsize=1.5, lw=0.8, ls="none" if fused else dashes(control),
        )  # fmt: skip
    grid_y(axes)
    return drawn


def _heads(panels: np.ndarray, rows: Sequence[Row], names: Sequence[str], x: str) -> None:
    for line, metric in zip(panels, metrics_of(rows), strict=True):
        (line[0].set_title if len(names) == 1 else line[0].set_ylabel)(metric_label(*metric))
    if len(names) > 1:
        for axes, name in zip(panels[0], names, strict=True):
            axes.set_title(drawable(name, 28))
    for axes in panels[:, 0] if len(names) == 1 else panels[-1]:
        axes.set_xlabel(x)


def _handles(looks: dict[str, Style], names: Callable[[str], str], rows: Sequence[Row]) -> list[Line2D]:
    keys = [(names(name), {"color": look.color, "marker": look.marker}) for name, look in looks.items()]
    for control in sorted({r.control for r in rows if r.is_random}):
        keys.append((control, {"color": MUTED, "marker": "o", "mfc": "white", "ls": dashes(control)}))
    return [Line2D([], [], lw=0.8, label=label, **look) for label, look in keys]


def _apart(counts: Sequence[int]) -> list[int]:
    """Return the counts whose labels do not touch on a logarithmic axis, from the smallest on."""
    kept = [counts[0]]
    span = counts[-1] / counts[0]
    for count in counts[1:]:
        if count / kept[-1] > span ** (1 / 6):
            kept.append(count)
    return kept


def _short_count(value: float, _: object) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
