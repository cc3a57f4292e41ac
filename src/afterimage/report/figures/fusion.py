"""Maps of fusion weights: the share of each source in the fused features over an image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from afterimage.config import AfterimageError, short_names, split_source
from afterimage.report.figures.image_grid import (
    CELL,
    EDGE,
    FOOT,
    GAP,
    HEAD,
    IMAGES,
    create_grid_figure,
    in_columns,
    place_image,
    read_pixels,
)
from afterimage.report.figures.labels import wrap
from afterimage.report.figures.style import Drawing, drawable, with_control
from afterimage.report.format import capitalised, single_line
from afterimage.report.rows import Row, Rows

COLORS = "cividis"
FEW = 3  # number of figures that are shown unfolded
BAR = 0.62  # inches for the colour bar and its labels

Line = tuple[str, list[np.ndarray]]
"""An image's id, and its original, its reconstruction and a map for each source."""


def fusion_weights(rows: Rows) -> list[Drawing]:
    """Draw a figure for each fused row with stored weight maps."""
    has_seeds = len({row.seed for row in rows.decoders}) > 1
    weighted = [row for row in rows.decoders if row.fusion_weights]
    first = ((row, list(itertools.islice(_lines(row), IMAGES))) for row in weighted)
    found = [(row, lines) for row, lines in first if lines]
    drawings = []
    for number, (row, lines) in enumerate(found, 1):
        name = f"fusion-weights-{number}" if len(found) > 1 else "fusion-weights"
        who = ", ".join([row.layer, row.decoder_label, *([f"seed {row.seed}"] if has_seeds else [])])
        title = with_control(f"Fusion weights: {single_line(who, 100)}", row.control)
        drawings.append(Drawing(name, title, _caption(row), _figure(row, lines), number > FEW))
    return drawings


def _lines(row: Row) -> Iterator[Line]:
    """Yield the images whose original, reconstruction and maps can all be read."""
    try:
        saved, maps = row.run.images, row.run.fusion_maps
    except AfterimageError:
        return
    for identity, *files in saved:
        pixels = [read_pixels(file) for file in files + maps.get(identity, [])]
        if len(pixels) == 2 + len(row.sources) and all(image is not None for image in pixels):
            yield str(identity), pixels


def _figure(row: Row, lines: list[Line]) -> Figure:
    heads = [
        "original",
        f"{wrap(drawable(row.decoder_label, 60), HEAD)}\nmean {row.scores['psnr'].mean:.2f} dB",
    ]
    split = [split_source(source) for source in row.sources]
    names = short_names(model for model, _ in split)
    for (model, layer), mean in zip(split, row.fusion_weights, strict=True):
        name = f"{wrap(drawable(names[model], 40), HEAD)}\n{drawable(layer, HEAD)}"
        heads.append(f"{name}\nmean weight {mean:.2f}")
    step, width = CELL + FOOT + EDGE, len(heads) * (CELL + GAP) + EDGE + BAR
    places = in_columns(heads)
    figure, axes, top = create_grid_figure(places, width, len(lines) * step)
    norm = Normalize(0, max(float(m.max()) for _, (_, _, *maps) in lines for m in maps) / 255 or 1)
    left = list(places)
    look = {"interpolation": "nearest", "cmap": COLORS, "norm": norm}
    for place, (identity, (original, rebuilt, *maps)) in enumerate(lines):
        y, psnr = top + place * step, row.values("psnr").get(identity)
        place_image(axes, original, left[0], y, drawable(identity, HEAD))
        place_image(axes, rebuilt, left[1], y, "" if psnr is None else f"{psnr:.2f} dB")
        for x, weights in zip(left[2:], maps, strict=True):
            place_image(axes, weights[..., 0] / 255, x, y, f"{weights.mean() / 255:.2f}", **look)
    height = figure.get_figheight()
    bottom = height - (top + (len(lines) - 1) * step + CELL)
    place = (left[-1] + CELL + 0.1) / width, bottom / height, 0.1 / width, (height - top - bottom) / height
    bar = figure.add_axes(place)
    figure.colorbar(ScalarMappable(norm, COLORS), cax=bar)
    bar.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    bar.tick_params(length=2.5)
    return figure


def _caption(row: Row) -> str:
    return (
        f"{capitalised(row.fusion_text)} of {' + '.join(row.sources)}. Each map shows how much of the fused features "
        "comes from one source at each location; at a location the sources' weights add up to 1, and an equal "
        f"share would be {1 / len(row.sources):.2f}. All maps have one colour scale. Above a column: the mean over "
        "all test images; below a map: its own mean."
    )
