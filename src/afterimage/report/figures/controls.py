"""Controls: what each decoder makes of features that are not the picture's, and how far re-encoding leads."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from afterimage.report.controls import STAND_INS, Part, decoder, read_part
from afterimage.report.figures.fonts import drawable
from afterimage.report.figures.style import INK, MUTED, Drawing, legend
from afterimage.report.rows import Row, Rows

LOOKS = {
    "own": ("#000000", "o"), "another": ("#D55E00", "s"), "shuffled": ("#56B4E9", "D"),
    "mean": ("#009E73", "^"), "zero": ("#CC79A7", "v"), "colour": (MUTED, "|"),
}  # fmt: skip
LINE = 0.24  # inches a row


def controls(rows: Rows) -> list[Drawing]:
    """A line a row, a marker a control. Empty where no run folder holds controls."""
    parts, _ = read_part(rows.decoders, "controls")
    if not parts:
        return []
    figure = Figure((7.4, 1.5 + LINE * len(parts)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, part in enumerate(parts):
        for control, (color, marker) in LOOKS.items():
            score = part.score(f"{control}_psnr")
            left.errorbar(
                score.mean, y, xerr=score.margin or 0, color=color, marker=marker, ls="none", elinewidth=0.8,
                markersize=7 if marker == "|" else 4,
            )  # fmt: skip
        distances = part.facts["distances"]
        right.plot(
            [distances["reencoded"], distances["random_pair"]], [y, y], color="#cccccc", lw=1, zorder=0
        )
        right.plot(distances["reencoded"], y, "o", color=INK)
        right.plot(distances["random_pair"], y, "s", color="#D55E00")
    left.set_yticks(range(len(parts)), [label(p.row) for p in parts])
    left.set_ylim(len(parts) - 0.5, -0.5)
    left.set_xlabel("PSNR (dB) against the picture")
    right.set_xlabel("distance of features / their norm")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(length=2.5)
    names = {"own": "its own features", **STAND_INS}
    handles = [Line2D([], [], color=c, marker=m, ls="none", label=names[k]) for k, (c, m) in LOOKS.items()]
    legend(figure, handles, columns=3)
    return [Drawing("controls", "Preserved or guessed", _caption(parts), figure)]


def label(row: Row) -> str:
    """A row's features and decoder on one line, the encoder without its weights' tag."""
    sources = [source.partition(":") for source in row.sources]
    shown = " + ".join(f"{model.partition('.')[0]}:{layer}" for model, _, layer in sources)
    return f"{drawable(shown, 36)}, {drawable(decoder(row), 30)}"


def _caption(parts: list[Part]) -> str:
    return (
        "Left: features that are not the picture's own through the trained decoder, scored against the picture; "
        f"mean over {parts[0].facts['pictures']} test pictures with its 95 % t interval. What reaches the first "
        "marker was guessed. Right: the distance of the re-encoded reconstruction's features from the picture's "
        "(disc) beside that of another picture's (square)."
    )
