"""Quality by depth: a line for each decoder over layers in execution order, and beside the measured bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from afterimage.evaluation.intervals import INTERVAL_NAME
from afterimage.report.bounds import Bound, bounds_of, by_decoder
from afterimage.report.figures.labels import margin_labels, wrap
from afterimage.report.figures.style import (
    MUTED,
    Drawing,
    Style,
    columns,
    controls_note,
    decoder_styles,
    drawable,
    error_bars,
    fusion_note,
    grid_lines,
    has_score,
    legend,
    legend_entry,
    lpips_note,
    mean_over_seeds,
    metric_label,
    metrics_of,
    with_control,
)
from afterimage.report.rows import Row, Rows, group_by, mean_over_images, short_encoders
from afterimage.runs.results import METRICS, Interval

LAYER_INCHES = 0.55
LETTER_INCHES = 0.06  # for each character of a tick label


def quality_by_depth(rows: Rows) -> list[Drawing]:
    """Draw quality by depth, a panel for each metric; an empty list for fewer than two decoder rows."""
    if len(rows.decoders) < 2:
        return []
    metrics, styles = metrics_of(rows.decoders), decoder_styles(rows.decoders)
    figure, panels, places = _panels(rows.decoders, metrics)
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        shown = [r for r in rows.decoders if has_score(r, metric, net)]
        _lines(axes, shown, places, styles, metric)
        for baseline in (r for r in rows.baselines if has_score(r, metric, net)):
            axes.axhline(baseline.scores[metric].mean, color=MUTED, lw=0.7, ls=(0, (4, 3)), zorder=-1)
    looks = dict.fromkeys(
        (r.decoder_label, r.control) for r in sorted(rows.decoders, key=lambda r: r.decoder_order)
    )
    handles = [
        legend_entry(with_control(drawable(name, 48), control), **styles[name].line(control))
        for name, control in looks
    ]
    if rows.baselines:
        handles.append(legend_entry("baseline", color=MUTED, lw=0.7, ls=(0, (4, 3))))
    legend(figure, handles, columns=min(len(handles), 5))
    figure.draw_without_rendering()
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        axes.set_ylim(axes.get_ylim())
        marked = [r for r in rows.baselines if has_score(r, metric, net)]
        margin_labels(axes, [(r.scores[metric].mean, drawable(r.label, 32), MUTED) for r in marked])
    return [Drawing("quality-by-depth", "Quality by depth", _caption(rows), figure)]


ANSWERS = {"best estimate": ("#117733", "D"), "most consistent image": ("#882255", "^")}
"""Colours and markers of the two answers that form the measured bound."""
BAND = "#F3DFA2"


def bound_by_depth(rows: Rows) -> list[Drawing]:
    """Draw measured bound and decoder by depth, a figure for each decoder with bounds of several layers."""
    found = [
        pair
        for pair in by_decoder(bounds_of(rows)).items()
        if len({b.reference.sources for b in pair[1]}) > 1
    ]
    return [_kept(label, bounds, number) for number, (label, bounds) in enumerate(found)]


def _kept(label: str, bounds: Sequence[Bound], number: int) -> Drawing:
    founds = [bound.reference for bound in bounds]
    metrics = metrics_of(founds)
    figure, panels, places = _panels(founds, metrics)
    looks = list(decoder_styles([bound.decoder for bound in bounds]).values())
    drawn: dict[str, Style] = {f"decoder {label}": looks[0]}
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        estimates: list[float] = []
        series = group_by(
            (bound for bound in bounds if has_score(bound.reference, metric, net)),
            lambda bound, metric=metric: (
                bound.reference.encoder,
                bound.reference.control,
                bound.best(metric) is bound.refined,
            ),
        )
        for (encoder, control, is_refined), own in series.items():
            kind = "most consistent image" if is_refined else "best estimate"
            drawn[kind] = Style(*ANSWERS[kind])
            layers = sorted(group_by(own, lambda bound: places[_layer_key(bound.reference)]).items())
            x = np.array([place for place, _ in layers])
            decoder = [_mean([bound.decoder for bound in seeds], metric) for _, seeds in layers]
            answer = [_mean([bound.best(metric) for bound in seeds], metric) for _, seeds in layers]
            joined = encoder != "fusion"
            _band(axes, x, decoder, answer, METRICS[metric].sign, joined=joined)
            still = [Interval(mean, mean, mean, 1) for mean in decoder]
            apart = [
                _bound_interval(seeds, metric, mean) for (_, seeds), mean in zip(layers, answer, strict=True)
            ]
            for name, means in ((next(iter(drawn)), still), (kind, apart)):
                _curve(axes, x, means, drawn[name], control, name, joined=joined)
            estimates += decoder + answer
        _keep_in_view(axes, estimates)
    handles = [legend_entry(drawable(name, 48), **look.line()) for name, look in drawn.items()]
    legend(figure, [*handles, Patch(color=BAND, label="what this decoder missed")], columns=4)
    figure.draw_without_rendering()
    counts = " or ".join(str(count) for count in sorted({bound.count for bound in bounds}))
    caption = (
        f"What the features of each layer keep at least (the measured bound), and what the decoder {label} shows of "
        f"it: means over the same {counts} test images. The band is what this decoder missed, though the features hold "
        "it; where there is none, nothing that was found is better than the decoder. Bars: the bound's difference to "
        f"the decoder, paired by image, with its {INTERVAL_NAME}; of few images it may leave the panel."
        f"{controls_note(founds)}{fusion_note(founds)}"
    )
    stem = "kept-by-depth" + (f"-{number + 1}" if number else "")
    return Drawing(stem, f"What layers keep, and what {label} missed", caption, figure, folded=number > 0)


def _mean(rows: Sequence[Row], metric: str) -> float:
    """Return the mean over images of pooled rows; that of the first row if scores by image are unknown."""
    found = mean_over_seeds(rows, metric)
    return found.estimate if found else rows[0].scores[metric].mean


def _bound_interval(bounds: Sequence[Bound], metric: str, mean: float) -> Interval:
    """Return the bound's mean with the interval of its difference to the decoder; of no width if unknown."""
    gaps = [bound.gap_to_decoder(metric) for bound in bounds]
    common = [name for name in gaps[0] if all(name in gap for gap in gaps)]
    if len(common) < 2:
        return Interval(mean, mean, mean, len(common))
    gap = mean_over_images([sum(gap[name] for gap in gaps) / len(gaps) for name in common])
    return Interval(mean, mean + gap.low - gap.estimate, mean + gap.high - gap.estimate, gap.count)


def _band(
    axes: Axes, x: np.ndarray, decoder: Sequence[float], answer: Sequence[float], sign: int, *, joined: bool
) -> None:
    """Fill from decoder to answer where the answer is better: as an area over joined layers, else as bars."""
    low, high = np.array(decoder), np.array(answer)
    ahead = sign * (high - low) > 0
    if joined and len(x) > 1:
        axes.fill_between(x, low, high, where=ahead, interpolate=True, color=BAND, lw=0, zorder=0.5)
    else:
        axes.bar(x[ahead], (high - low)[ahead], 0.12, bottom=low[ahead], color=BAND, zorder=0.5)


def _curve(
    axes: Axes, x: np.ndarray, means: Sequence[Interval], look: Style, control: str, label: str, *, joined: bool
) -> None:  # fmt: skip
    """Draw means with intervals at their places."""
    line = look.line(control) | ({} if joined else {"ls": "none"})
    middles = [mean.estimate for mean in means]
    axes.errorbar(x, middles, error_bars(means), label=label, elinewidth=0.9, capsize=1.5, **line)


def _keep_in_view(axes: Axes, estimates: Sequence[float]) -> None:
    """Limit a panel to the span of the estimates and as much on either side, whatever the intervals."""
    if estimates:
        low, high = axes.get_ylim()
        span = max(estimates) - min(estimates) or high - low
        axes.set_ylim(max(low, min(estimates) - span), min(high, max(estimates) + span))


def _panels(
    rows: Sequence[Row], metrics: Sequence[tuple[str, str]]
) -> tuple[Figure, np.ndarray, dict[tuple[str, ...], float]]:
    """Make a panel for each metric over a shared axis of layers, with the encoders' names above.

    Returned are also the places of the layers on the axis.
    """
    short = short_encoders(rows)
    ordered = sorted(rows, key=lambda r: (r.order[0], r.order[1], r.fusion_letter, r.order[4:]))
    encoders = {
        encoder: [own[0] for own in group_by(members, _layer_key).values()]
        for encoder, members in group_by(ordered, lambda row: row.encoder).items()
    }
    total = sum(max(len(layers), 2) for layers in encoders.values())
    inches = min(max(LAYER_INCHES, 4.3 / total), 18 / total)  # a layer, in figures of about 6.5 to 20 inches
    figure = Figure((2.2 + inches * total, 1.3 + 1.9 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (metric, net) in zip(panels, metrics, strict=True):
        axes.set_ylabel(metric_label(metric, net))
        grid_lines(axes)
    places, names, start = {}, [], 0.0
    for i, (encoder, layers) in enumerate(encoders.items()):
        span = max(len(layers), 2)
        first = start + (span - len(layers)) / 2 + 0.5
        places |= {_layer_key(row): first + k for k, row in enumerate(layers)}
        names += [f"{drawable(row.layer, 22)}\n{row.grid}" for row in layers]
        for axes in panels:
            axes.axvspan(start, start + span, color="#f6f6f6" if i % 2 == 0 else "white", lw=0, zorder=-2)
        panels[0].annotate(
            wrap(drawable(short[encoder]), max(8, int(span * inches / 0.085))), (start + span / 2, 1), (0, 4),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom",
            weight="bold", fontsize=8,
        )  # fmt: skip
        start += span
    is_rotated = max(columns(line) for name in names for line in name.split("\n")) * LETTER_INCHES > inches
    rotation = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if is_rotated else {}
    labels = [name.replace("\n", ", ") if is_rotated else name for name in names]
    panels[-1].set_xticks(list(places.values()), labels, **rotation)
    panels[-1].set_xlim(0, total)
    panels[-1].set_xlabel("layer, in execution order, and its feature locations")
    return figure, panels, places


def _layer_key(row: Row) -> tuple[str, ...]:
    return (*row.sources, row.fusion_letter)


def _lines(
    axes: Axes, rows: Sequence[Row], places: dict[tuple[str, ...], float], styles: dict[str, Style], metric: str
) -> None:  # fmt: skip
    series = group_by(rows, lambda row: (row.encoder, row.decoder_label, row.control))
    for (encoder, label, control), members in series.items():
        beside = [name[1:] for name in series if name[0] == encoder]
        shift = 0.4 * ((beside.index((label, control)) + 0.5) / len(beside) - 0.5)
        layers = group_by(members, _layer_key).items()
        points = {
            places[layer] + shift: mean for layer, own in layers if (mean := mean_over_seeds(own, metric))
        }
        x = np.array(sorted(points))
        _curve(axes, x, [points[at] for at in x], styles[label], control, label, joined=encoder != "fusion")


def _caption(rows: Rows) -> str:
    alike = group_by(
        rows.decoders, lambda row: (row.encoder, row.decoder_label, row.control, *_layer_key(row))
    )
    most = max(len({row.seed for row in own}) for own in alike.values())
    text = (
        f"Mean over test images with its {INTERVAL_NAME}; decoders of a layer stand side by side. "
        "Intervals of two points may overlap although their difference is certain: the images are the "
        "same, so compare pairs."
    )
    text += f" Each image's score is its mean over up to {most} seeds." if most > 1 else ""
    return text + controls_note(rows.decoders) + fusion_note(rows.decoders) + lpips_note(rows.decoders)
