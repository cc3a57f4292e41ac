"""Quality by depth: every encoder's layers in execution order, a line a decoder, baselines behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from afterimage.evaluation.intervals import NAME
from afterimage.report.figures.fonts import columns, drawable
from afterimage.report.figures.labels import margin_labels, wrap
from afterimage.report.figures.style import (
    MUTED,
    Drawing,
    Style,
    controls_note,
    dashes,
    decoder_styles,
    error_bars,
    grid_y,
    has,
    legend,
    lpips_note,
    metric_label,
    metrics_of,
    short_encoders,
)
from afterimage.report.rows import Row, Rows, fusion_legend, pool

LAYER_INCHES = 0.55
LETTER_INCHES = 0.06  # of a tick label


@dataclass(frozen=True)
class Segment:
    """One encoder's stretch of the x axis: its layers' places and names."""

    title: str
    places: dict[tuple[str, ...], float]
    names: dict[tuple[str, ...], str]
    left: float
    right: float


def quality_by_depth(rows: Rows) -> list[Drawing]:
    """Empty where there are not two decoder rows to compare."""
    if len(rows.decoders) < 2:
        return []
    metrics, styles = metrics_of(rows.decoders), decoder_styles(rows.decoders)
    segments = _segments(rows.decoders)
    names = [name for segment in segments for name in segment.names.values()]
    inches = _layer_inches(segments[-1].right)
    is_rotated = max(columns(line) for name in names for line in name.split("\n")) * LETTER_INCHES > inches
    figure = Figure((2.2 + inches * segments[-1].right, 1.3 + 1.9 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        for i, segment in enumerate(segments):
            axes.axvspan(
                segment.left, segment.right, color="#f6f6f6" if i % 2 == 0 else "white", lw=0, zorder=-2
            )
        shown = [r for r in rows.decoders if has(r, metric, net)]
        _lines(axes, shown, segments, styles, metric)
        for reference in (r for r in rows.references if has(r, metric, net)):
            axes.axhline(reference.scores[metric].mean, color=MUTED, lw=0.7, ls=(0, (4, 3)), zorder=-1)
        axes.set_ylabel(metric_label(metric, net))
        grid_y(axes)
    places = [place for segment in segments for place in segment.places.values()]
    rotation = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if is_rotated else {}
    labels = [name.replace("\n", ", ") if is_rotated else name for name in names]
    panels[-1].set_xticks(places, labels, **rotation)
    panels[-1].set_xlim(segments[0].left, segments[-1].right)
    panels[-1].set_xlabel("layer, in execution order, and its feature locations")
    for segment in segments:
        panels[0].annotate(
            segment.title, ((segment.left + segment.right) / 2, 1), (0, 4),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom",
            weight="bold", fontsize=8,
        )  # fmt: skip
    handles = _handles(rows.decoders, styles, bool(rows.references))
    legend(figure, handles, columns=min(len(handles), 5))
    figure.draw_without_rendering()
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        axes.set_ylim(axes.get_ylim())
        marked = [r for r in rows.references if has(r, metric, net)]
        margin_labels(axes, [(r.scores[metric].mean, drawable(r.label, 32), MUTED) for r in marked])
    return [Drawing("quality-by-depth", "Quality by depth", _caption(rows), figure)]


def _segments(rows: Sequence[Row]) -> list[Segment]:
    short = short_encoders(rows)
    layers: dict[str, dict[tuple[str, ...], Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: (r.order[0], r.order[1], r.fusion_letter, r.order[4:])):
        layers[row.encoder].setdefault(_layer_key(row), row)
    spans = [max(len(members), 2) for members in layers.values()]
    inches = _layer_inches(float(sum(spans)))
    segments, start = [], 0.0
    for (encoder, members), span in zip(layers.items(), spans, strict=True):
        first = start + (span - len(members)) / 2 + 0.5
        places = {key: first + i for i, key in enumerate(members)}
        names = {key: f"{drawable(row.layer, 22)}\n{row.grid}" for key, row in members.items()}
        title = wrap(drawable(short[encoder]), max(8, int(span * inches / 0.085)))
        segments.append(Segment(title, places, names, start, start + span))
        start += span
    return segments


def _layer_inches(total: float) -> float:
    """What a layer gets of the figure's width, which is 6.5 to 20 inches."""
    return min(max(LAYER_INCHES, 4.3 / total), 18 / total)


def _layer_key(row: Row) -> tuple[str, ...]:
    return (*row.sources, row.fusion_letter)


def _lines(
    axes: Axes, rows: Sequence[Row], segments: Sequence[Segment], styles: dict[str, Style], metric: str
) -> None:
    series: dict[tuple[str, str, str], dict[tuple[str, ...], list[Row]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        series[row.encoder, row.decoder_label, row.control][_layer_key(row)].append(row)
    place = {key: x for segment in segments for key, x in segment.places.items()}
    for (encoder, label, control), layers in series.items():
        look, beside = styles[label], [key[1:] for key in series if key[0] == encoder]
        shift = 0.4 * ((beside.index((label, control)) + 0.5) / len(beside) - 0.5)
        points = [
            (place[key] + shift, score) for key, members in layers.items() if (score := pool(members, metric))
        ]
        points.sort(key=lambda point: point[0])
        axes.errorbar(
            [x for x, _ in points], [s.estimate for _, s in points], error_bars([s for _, s in points]),
            color=look.color, marker=look.marker, mfc="white" if control else look.color, elinewidth=0.9,
            capsize=1.5, ls="none" if encoder == "fusion" else dashes(control), label=label,
        )  # fmt: skip


def _handles(rows: Sequence[Row], styles: dict[str, Style], has_references: bool) -> list[Line2D]:
    looks = dict.fromkeys((r.decoder_label, r.control) for r in sorted(rows, key=lambda r: r.decoder_order))
    handles = [
        Line2D(
            [], [], color=styles[name].color, marker=styles[name].marker, ls=dashes(control),
            mfc="white" if control else styles[name].color,
            label=drawable(name, 48) + (f", {control}" if control else ""),
        )
        for name, control in looks
    ]  # fmt: skip
    if has_references:
        handles.append(Line2D([], [], color=MUTED, lw=0.7, ls=(0, (4, 3)), label="baseline"))
    return handles


def _caption(rows: Rows) -> str:
    seeds: dict[tuple[object, ...], set[int | None]] = defaultdict(set)
    for row in rows.decoders:
        seeds[row.encoder, row.decoder_label, row.control, *_layer_key(row)].add(row.seed)
    most = max(map(len, seeds.values()))
    text = (
        f"Mean over test images with its {NAME}; decoders of a layer stand side by side. "
        "Intervals of two points may overlap although their difference is certain: the images are the "
        "same, so compare pairs."
    )
    text += f" Each image's score is its mean over up to {most} seeds." if most > 1 else ""
    text += controls_note(rows.decoders)
    text += "".join(f" {line[0].upper()}{line[1:]}." for line in fusion_legend(rows.decoders))
    return text + lpips_note(rows.decoders)
