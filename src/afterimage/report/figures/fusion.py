"""Maps of fusion weights: the share of each source in the fused features over an image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from afterimage.config import AfterimageError, split_source
from afterimage.report.figures.image_grid import (
    CELL,
    EDGE,
    FOOT,
    GAP,
    HEAD,
    IMAGES,
    Pixels,
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

Map = UInt8[np.ndarray, "h w"]


@dataclass(frozen=True)
class Line:
    """One image: its original, its reconstruction and a map for each source."""

    identity: str
    original: Pixels
    rebuilt: Pixels
    maps: list[Map]


def fusion_weights(rows: Rows) -> list[Drawing]:
    """Draw a figure for each fused row with stored weight maps."""
    has_seeds = len({row.seed for row in rows.decoders}) > 1
    found = [(row, lines) for row in rows.decoders if row.fusion_weights and (lines := _lines(row))]
    drawings = []
    for number, (row, lines) in enumerate(found, 1):
        name = f"fusion-weights-{number}" if len(found) > 1 else "fusion-weights"
        who = ", ".join([row.layer, row.decoder_label, *([f"seed {row.seed}"] if has_seeds else [])])
        title = with_control(f"Fusion weights: {single_line(who, 100)}", row.control)
        drawings.append(Drawing(name, title, _caption(row), _figure(row, lines), number > FEW))
    return drawings


def _lines(row: Row) -> list[Line]:
    """Return the first images whose original, reconstruction and maps can all be read."""
    try:
        saved, maps = row.run.images, row.run.fusion_maps
    except AfterimageError:
        return []
    lines = []
    for identity, *files in saved:
        files += maps.get(identity, [])
        pixels = [read_pixels(file) for file in files]
        if len(pixels) == 2 + len(row.sources) and all(image is not None for image in pixels):
            lines.append(Line(str(identity), *pixels[:2], [image[..., 0] for image in pixels[2:]]))
        if len(lines) == IMAGES:
            break
    return lines


def _figure(row: Row, lines: list[Line]) -> Figure:
    heads = [
        "original",
        f"{wrap(drawable(row.decoder_label, 60), HEAD)}\nmean {row.scores['psnr'].mean:.2f} dB",
    ]
    means = zip(_names(row.sources), row.fusion_weights, strict=True)
    heads += [f"{name}\nmean weight {mean:.2f}" for name, mean in means]
    step, width = CELL + FOOT + EDGE, len(heads) * (CELL + GAP) + EDGE + BAR
    places = in_columns(heads)
    figure, axes, top = create_grid_figure(places, width, len(lines) * step)
    norm = Normalize(0, max(float(m.max()) for line in lines for m in line.maps) / 255 or 1)
    left = list(places)
    for y, line in zip(itertools.count(top, step), lines, strict=False):
        psnr = row.values("psnr").get(line.identity)
        feet = [drawable(line.identity, HEAD), "" if psnr is None else f"{psnr:.2f} dB"]
        for x, pixels, foot in zip(left, (line.original, line.rebuilt), feet, strict=False):
            place_image(axes, pixels, x, y, foot)
        look = {"interpolation": "nearest", "cmap": COLORS, "norm": norm}
        for x, weights in zip(left[2:], line.maps, strict=True):
            place_image(axes, weights / 255, x, y, f"{weights.mean() / 255:.2f}", **look)
    height = figure.get_figheight()
    bottom = height - (top + (len(lines) - 1) * step + CELL)
    place = (left[-1] + CELL + 0.1, bottom, 0.1, height - top - bottom)
    bar = figure.add_axes([place[0] / width, place[1] / height, place[2] / width, place[3] / height])
    figure.colorbar(ScalarMappable(norm, COLORS), cax=bar)
    bar.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    bar.tick_params(length=2.5)
    return figure


def _names(sources: tuple[str, ...]) -> list[str]:
    """Return two lines for each source, model and layer, without the weights' tag if names stay distinct."""
    split = [split_source(source) for source in sources]
    bare = [(model.partition(".")[0], layer) for model, layer in split]
    chosen = bare if len(set(bare)) == len(bare) else split
    return [f"{wrap(drawable(model, 40), HEAD)}\n{drawable(layer, HEAD)}" for model, layer in chosen]


def _caption(row: Row) -> str:
    return (
        f"{capitalised(row.fusion_text)} of {' + '.join(row.sources)}. Each map shows how much of the fused features "
        "comes from one source at each location; at a location the sources' weights add up to 1, and an equal "
        f"share would be {1 / len(row.sources):.2f}. All maps have one colour scale. Above a column: the mean over "
        "all test images; below a map: its own mean."
    )
