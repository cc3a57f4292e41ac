"""Quality against the decoder's input, in feature locations or values, and against its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from afterimage.config import short_names
from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.compare import Comparison, Entry
from afterimage.report.figures.labels import point_labels
from afterimage.report.figures.style import (
    MUTED,
    Drawing,
    Style,
    controls_note,
    decoder_styles,
    drawable,
    encoder_styles,
    error_bars,
    grid_lines,
    has_score,
    legend,
    legend_entry,
    log_x,
    lpips_note,
    mean_over_seeds,
    metric_label,
    metrics_of,
)
from afterimage.report.rows import Row, Rows, group_by, short_encoders
from afterimage.runs.results import Interval

PANEL = (2.35, 1.95)
Point = tuple[float, Interval, Row]


def quality_by_locations(rows: Rows) -> list[Drawing]:
    """Draw a column for each decoder, a line for each encoder; an empty list for one number of locations."""
    shown = [row for row in rows.decoders if row.locations]
    counts = sorted({row.locations for row in shown})
    if len(counts) < 2:
        return []
    encoders = list(short_encoders(shown))
    # Encoders with the same number of locations stand side by side.
    beside = {name: 1.09 ** (i - (len(encoders) - 1) / 2) for i, name in enumerate(encoders)}
    figure, drawn = _draw(
        shown,
        "feature locations (log scale)",
        lambda row: row.locations * beside[row.encoder],
        "decoder_label",
    )
    for axes, *_ in drawn:
        axes.set_xscale("log")
        axes.set_xlim(counts[0] / 1.8, counts[-1] * 1.8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_apart(counts), [f"{count:,}" for count in _apart(counts)])
    caption = (
        "Every layer by the number of its feature locations (height × width), a column a decoder, a line an "
        f"encoder through its layers in execution order; mean over test images with its {INTERVAL_NAME}."
        f"{controls_note(shown)}{lpips_note(shown)}"
    )
    return [Drawing("quality-by-locations", "Quality and spatial resolution", caption, figure)]


def quality_by_parameters(rows: Rows) -> list[Drawing]:
    """Draw a column for each encoder, a line for each decoder; an empty list for one parameter count."""
    shown = [row for row in rows.decoders if row.parameters]
    if len({row.parameters for row in shown}) < 2:
        return []
    low, high = min(row.parameters for row in shown), max(row.parameters for row in shown)
    figure, drawn = _draw(
        shown, "decoder parameters (log scale)", lambda row: float(row.parameters), "encoder"
    )
    drawn[0][0].set_xlim(low / 2, high * 2)
    for axes, *_ in drawn:
        log_x(axes, _short_count, subs=(1,) if high / low > 30 else (1, 2, 5), most=6)
    figure.draw_without_rendering()
    for axes, metric, points in drawn:
        if metric == "psnr":
            names = [(x, score.estimate, drawable(row.layer, 18)) for x, score, row in points]
            point_labels(axes, names)
    figure.set_layout_engine("none")  # labels lie inside the axes: another layout would change nothing
    caption = (
        "Every row by the size of its decoder, a column an encoder, a line a decoder through the layers in "
        f"execution order (named where there is room); mean over test images with its {INTERVAL_NAME}."
        f"{controls_note(shown)}{lpips_note(shown)}"
    )
    return [Drawing("quality-by-parameters", "Quality and decoder size", caption, figure)]


def _draw(
    rows: Sequence[Row], label: str, x: Callable[[Row], float], column: str
) -> tuple[Figure, list[tuple[Axes, str, list[Point]]]]:
    """Draw metrics down and columns across, a single column in a row; return each panel's metric and points.

    Columns are encoders or decoders, as `column` is `encoder` or `decoder_label`; lines are the others.
    """
    encoders, decoders = short_encoders(rows), decoder_styles(rows)
    if column == "encoder":
        line, columns, names, styles = "decoder_label", encoders, {name: name for name in decoders}, decoders
    else:
        line, columns, names = "encoder", {name: name for name in decoders}, encoders
        styles = encoder_styles(list(encoders))
    metrics, single = metrics_of(rows), len(columns) == 1
    down, across = (1, len(metrics)) if single else (len(metrics), len(columns))
    size = max(4.4, 0.8 + PANEL[0] * across), max(1.1 + PANEL[1] * down, 2.9)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=False if single else "row")
    for axes in panels[-1]:
        axes.set_xlabel(label)
    if not single:
        for axes, title in zip(panels[0], columns.values(), strict=True):
            axes.set_title(drawable(title, 28))
    drawn = []
    for part, (metric, net) in zip(panels.T if single else panels, metrics, strict=True):
        (part[0].set_title if single else part[0].set_ylabel)(metric_label(metric, net))
        for axes, name in zip(part, columns, strict=True):
            own = [row for row in rows if getattr(row, column) == name and has_score(row, metric, net)]
            drawn.append((axes, metric, _lines(axes, own, metric, x, line, styles)))
    keys = [legend_entry(drawable(names[name], 48), lw=0.8, **style.line()) for name, style in styles.items()]
    for control in sorted({row.control for row in rows if row.is_random}):
        keys.append(legend_entry(control, lw=0.8, **Style(MUTED, "o").line(control)))
    legend(figure, keys, columns=4)
    return figure, drawn


def _lines(
    axes: Axes, rows: Sequence[Row], metric: str, x: Callable[[Row], float], line: str, styles: Mapping[str, Style]
) -> list[Point]:  # fmt: skip
    """Draw a line for each value of the attribute `line` and random control; return the points drawn."""
    drawn: list[Point] = []
    for (name, control), members in group_by(rows, lambda row: (getattr(row, line), row.control)).items():
        alike = group_by(members, lambda row: (row.sources, row.fusion_letter, row.decoder_label)).values()
        points = [(x(own[0]), score, own[0]) for own in alike if (score := mean_over_seeds(own, metric))]
        if not points:
            continue
        points.sort(key=lambda p: (p[2].order, p[0]))
        drawn += points
        look = styles[name].line(control) | ({"ls": "none"} if points[0][2].is_fused else {})
        places, scores = [p[0] for p in points], [p[1] for p in points]
        estimates = [score.estimate for score in scores]
        axes.errorbar(places, estimates, error_bars(scores), elinewidth=0.9, capsize=1.5, lw=0.8, **look)
    grid_lines(axes)
    return drawn


def _apart(counts: Sequence[int]) -> list[int]:
    """Return the counts whose labels do not touch on a logarithmic axis, from the smallest on."""
    kept = [counts[0]]
    span = counts[-1] / counts[0]
    for count in counts[1:]:
        if count / kept[-1] > span ** (1 / 6):
            kept.append(count)
    return kept


def _short_count(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


ATLAS_STYLE = Style("#b5b5b5", "o")
"""Style of an atlas's encoders."""


def ranking_figure(comparison: Comparison) -> Drawing:
    """Draw the user's rows among those of an atlas by feature values: answers down, metrics across."""
    mine = [standing.ranked_entry for standing in comparison.standings]
    answers = {e.measured: e.answer for e in mine}
    metrics = comparison.columns
    names, others = _by_encoder(mine), _by_encoder(comparison.atlas)
    looks, short = encoder_styles(list(names)), short_names(others)
    figure = Figure((0.8 + PANEL[0] * len(metrics), 1.2 + PANEL[1] * len(answers)), layout="constrained")
    panels = figure.subplots(len(answers), len(metrics), squeeze=False, sharex=True)
    named = {}
    for line, (measured, answer) in zip(panels, answers.items(), strict=True):
        for axes, (metric, net) in zip(line, metrics, strict=True):
            firsts = named[axes] = []
            for name, rows in others.items():
                if found := _scored(rows, measured, metric, net):
                    _plot_encoder(axes, found, metric, ATLAS_STYLE, zorder=1)
                    firsts.append((found[0].values, found[0].scores[metric], drawable(short[name], 32)))
            for name, rows in names.items():
                _plot_encoder(axes, _scored(rows, measured, metric, net), metric, looks[name], zorder=2)
            log_x(axes)
            axes.margins(x=0.2)  # room for names
            grid_lines(axes)
        line[0].set_ylabel(drawable(answer, 24))
    for axes, metric in zip(panels[0], metrics, strict=True):
        axes.set_title(metric_label(*metric))
    for axes in panels[-1]:
        axes.set_xlabel("feature values per pixel value")
    keys = {drawable(name, 32): looks[model] for model, name in short_names(names).items()} | {
        "atlas": ATLAS_STYLE
    }
    handles = [legend_entry(name, lw=0.8, **look.line()) for name, look in keys.items()]
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
    return group_by(rows, lambda row: row.encoder + row.name.removeprefix(row.features))


def _scored(rows: Sequence[Entry], measured: str, metric: str, net: str) -> list[Entry]:
    return [e for e in rows if e.measured == measured and e.has(metric, net)]


def _plot_encoder(axes: Axes, rows: Sequence[Entry], metric: str, look: Style, *, zorder: int) -> None:
    hollow = any(row.is_random for row in rows)
    axes.plot(
        [row.values for row in rows], [row.scores[metric] for row in rows], color=look.color, marker=look.marker,
        lw=0.8, mfc="white" if hollow else look.color, zorder=zorder,
    )  # fmt: skip
