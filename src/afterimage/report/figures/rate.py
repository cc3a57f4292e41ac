"""Rate-distortion of features that are quantised and coded, beside JPEG and WebP."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from afterimage.evaluation.intervals import NAME
from afterimage.report.controls import curve_of, decoder, read_parts
from afterimage.report.figures.controls import PANEL, dashes, name_layers, shades
from afterimage.report.figures.fonts import drawable
from afterimage.report.figures.style import INK, MUTED, Drawing, error_bars, grid_y, legend, short_encoders
from afterimage.report.rows import Rows, mean_over_images

CODECS = {"JPEG": "--", "WebP": ":"}


def rate(rows: Rows) -> list[Drawing]:
    """Draw a panel for each encoder, a line for each layer; an empty list if no run has these data."""
    parts, _ = read_parts(rows.decoders, "rate_distortion")
    if not parts:
        return []
    encoders = list(dict.fromkeys(p.row.encoder for p in parts))
    names = short_encoders([p.row for p in parts])
    figure = Figure((max(4.4, 0.8 + PANEL[0] * len(encoders)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(encoders), sharex=True, sharey=True, squeeze=False)[0]
    colors, patterns = shades(parts), dashes(parts)
    for axes, encoder in zip(panels, encoders, strict=True):
        members = [p for p in parts if p.row.encoder == encoder]
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
        name_layers(axes, members, colors, loc="upper right")
        axes.set_title(drawable(names[encoder], 28))
        axes.set_xscale("log")
        axes.set_xlabel("bits a pixel (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        grid_y(axes)
    panels[0].set_ylabel("PSNR (dB)")
    handles = [Line2D([], [], color=INK, ls=ls, label=name) for name, ls in patterns.items()]
    handles += [Line2D([], [], color=MUTED, ls=ls, label=codec) for codec, ls in CODECS.items()]
    legend(figure, handles, columns=4)
    caption = (
        "Features at 1, 2, 3, 4, 6 and 8 bits (left to right) after "
        f"{parts[0].facts.coder}, rebuilt by decoders that were fitted on unquantised ones; mean over "
        f"{parts[0].facts.images} test images with its {NAME}. Grey: the same images as JPEG and "
        "WebP files. Channels are quantised between their 0.1 % and 99.9 % quantiles over training images."
    )
    return [Drawing("rate", "Quality against the size of the features", caption, figure)]
