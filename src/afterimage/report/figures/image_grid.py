"""Image grids: originals beside reconstructions with an enlarged detail, and decoders beside measured bounds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import uniform_filter

from afterimage.config import AfterimageError
from afterimage.report.bounds import Bound, bounds_of, by_decoder
from afterimage.report.figures.labels import wrap
from afterimage.report.figures.style import (
    INK,
    MUTED,
    Drawing,
    drawable,
    fusion_note,
    style,
    with_control,
)
from afterimage.report.format import single_line
from afterimage.report.rows import Row, Rows, group_by, lpips_nets, short_encoders
from afterimage.runs.files import read_image
from afterimage.runs.run import Run

Pixels = UInt8[np.ndarray, "height width 3"]
Column = TypeVar("Column")
COLUMNS = 8
IMAGES, FEW_IMAGES, MANY_PAGES = 3, 2, 4  # IMAGES on a page, FEW_IMAGES if there are more than MANY_PAGES
DETAIL = 4  # ratio of an image's shorter side to the side of its detail
CELL = 1.12  # inches: at 200 dpi the 224 pixels of a usual image are printed one to one
GAP, EDGE, FOOT = 0.06, 0.05, 0.18
BLOCK = 2 * CELL + FOOT + 0.14  # an image, its PSNR, its detail, and the gap to the next image
HEAD = 17  # characters that fit above a column
BOX = "#D55E00"


@dataclass(frozen=True)
class Line:
    """One image of a figure: its original, and each row's reconstruction and PSNR, None where there is none."""

    id: str
    original: Pixels
    cells: Sequence[Pixels | None]
    psnr: Sequence[float | None]


@dataclass(frozen=True)
class Page:
    """Runs that share a figure of up to `images` images; `names` are short names of encoders."""

    stem: str
    title: str
    rows: list[Row]
    names: dict[str, str]
    images: int
    folded: bool


def pages(rows: Rows) -> list[Page]:
    """Split rows into pages: by encoder, decoder and seed where they are many; baselines always apart."""
    names, found = short_encoders(rows.decoders), []
    split = list(_split(rows, names))
    many = len(split) > MANY_PAGES
    for title, members in split:
        stem = _slug(title)
        # Titles that differ only in characters that file names cannot hold must not share a file.
        taken = sum(page.stem == stem or page.stem.startswith(f"{stem}~") for page in found)
        stem = f"{stem}~{taken + 1}" if taken else stem
        found.append(Page(stem, title, members, names, FEW_IMAGES if many else IMAGES, many and bool(found)))
    return found


def grid(page: Page) -> list[Drawing]:
    """Draw whole images and a detail of each in one figure; an empty list where the runs saved none."""
    lines = list(itertools.islice(_lines(page.rows), page.images))
    return [_drawing(page, lines)] if lines else []


def own_images(rows: Rows, shown: Mapping[Run, Mapping[str, Any]]) -> list[Drawing]:
    """Draw the figures of `grid` for other images than the runs' test images.

    Args:
        rows: the runs
        shown: by run and name of the image, an object with uint8 `(H, W, 3)` arrays `original` and `image`, which is
            the reconstruction, and with `scores` by metric
    """
    drawings = []
    for page in pages(rows):
        columns = [shown[row.run] for row in page.rows]
        lines = []
        for name, first in columns[0].items():
            own = [column[name] for column in columns]
            scores = [image.scores["psnr"] for image in own]
            lines.append(Line(name, first.original, [image.image for image in own], scores))
        with style():
            drawings.append(_drawing(page, lines))
    return drawings


def bound_images(rows: Rows) -> list[Drawing]:
    """Draw decoder and measured bound on the same images: columns are layers, rows are reconstructions.

    Each decoder has one figure or more; those without a bound or saved images have none.
    """
    drawings: list[Drawing] = []
    for label, bounds in by_decoder(bounds_of(rows)).items():
        layers = group_by(
            bounds, lambda bound: (bound.reference.sources, bound.reference.weights_label)
        ).values()
        own = [same[0] for same in layers]
        for title, part in _chunks(f"What layers keep, and what {label} shows", own):
            drawings += _kept(part, label, title, len(drawings))
    return drawings


LABEL = 0.22  # inches for a row's name, which is rotated
LARGE = 8.5  # font size in points that is legible where the figure is 900 pixels wide


def _kept(bounds: Sequence[Bound], label: str, title: str, number: int) -> list[Drawing]:
    lines = {
        f"decoder {label}": [bound.decoder for bound in bounds],
        "best estimate": [bound.estimate for bound in bounds],
        "most consistent": [bound.refined for bound in bounds],
    }
    lines = {name: answers for name, answers in lines.items() if any(answers)}
    saved = [_saved(bound.reference) for bound in bounds]
    common = [i for i in saved[0] if all(i in images for images in saved)] or list(saved[0])
    originals = {i: pixels for i in common if (pixels := read_pixels(saved[0][i][0])) is not None}
    originals = dict(itertools.islice(originals.items(), FEW_IMAGES))
    if not originals:
        return []
    founds = [bound.reference for bound in bounds]
    names = short_encoders(founds)
    start = EDGE + CELL + GAP + LABEL
    heads = {start + i * (CELL + GAP): _column_head(found, names) for i, found in enumerate(founds)}
    width, step = start + len(bounds) * (CELL + GAP) - GAP + EDGE, CELL + 0.2
    block = len(lines) * step + 0.1
    below, text = len(originals) * block - 0.1 + EDGE, {"fontsize": LARGE, "linespacing": 1.2}
    figure, axes, top = create_grid_figure({EDGE: "original", **heads}, width, below, line=0.15, **text)
    for place, (identity, original) in enumerate(originals.items()):
        y = top + place * block
        place_image(axes, original, EDGE, y, "")
        for line, (name, answers) in enumerate(lines.items()):
            middle = y + line * step + CELL / 2
            axes.text(start - 0.05, middle, drawable(name, 20), ha="right", va="center", rotation=90, **text)
            for x, answer in zip(heads, answers, strict=True):
                at = x, y + line * step
                pixels = _rebuilt(_saved(answer), identity, original) if answer else None
                if pixels is None:
                    _draw_placeholder(axes, *at, has_detail=False)
                else:
                    place_image(axes, pixels, *at, _scores_of(answer, identity), size=LARGE - 0.5)
    nets = lpips_nets(founds)
    caption = (
        f"The same photographs from the features of each layer, in order of depth: what the decoder {label} shows of "
        "them, and what the features keep at least (the measured bound)."
        + " The best estimate averages what they do not tell." * any(bound.estimate for bound in bounds)
        + " The most consistent image fills in what they do not tell."
        * any(bound.refined for bound in bounds)
        + f" Below an image: its PSNR{f' and LPIPS ({nets[0]})' if len(nets) == 1 else ''}."
        + fusion_note(founds)
    )
    return [Drawing("kept" + (f"-{number + 1}" if number else ""), title, caption, figure, folded=number > 0)]


def _column_head(row: Row, names: Mapping[str, str]) -> str:
    encoder = [] if row.is_fused else [wrap(drawable(names[row.encoder]), HEAD - 2)]
    control = [row.control] if row.is_random else []
    return "\n".join([*encoder, drawable(row.layer, HEAD - 2), *control])


def _scores_of(answer: Row, identity: str) -> str:
    psnr, lpips = (answer.values(metric).get(identity) for metric in ("psnr", "lpips"))
    texts = ["" if psnr is None else f"{psnr:.1f} dB", "" if lpips is None else f"{lpips:.2f}"]
    return ", ".join(filter(None, texts))


def _split(rows: Rows, names: dict[str, str]) -> Iterable[tuple[str, list[Row]]]:
    if rows.decoders and len(rows.decoders) < COLUMNS:
        yield "Reconstructions", list(rows.decoders)
    else:
        for (encoder, control), members in group_by(rows.decoders, lambda r: (r.encoder, r.control)).items():
            title = f"Reconstructions: {with_control(names[encoder], control)}"
            if len(members) < COLUMNS:
                yield title, members
                continue
            has_seeds = len({r.seed for r in members}) > 1
            members.sort(key=lambda r: (r.decoder_order, r.seed or 0, r.order))
            for (label, seed), own in group_by(members, lambda r: (r.decoder_label, r.seed)).items():
                seeded = f", seed {seed}" if has_seeds else ""
                yield from _chunks(f"{title}, {single_line(label)}{seeded}", own)
    if rows.baselines:
        yield from _chunks("Reconstructions: baselines", list(rows.baselines))


def _chunks(title: str, columns: list[Column]) -> Iterable[tuple[str, list[Column]]]:
    """Yield titles and columns of as few figures as possible, with about as many columns each."""
    count = -(-len(columns) // (COLUMNS - 1))
    size = -(-len(columns) // count)
    for i in range(count):
        yield title + (f" ({i + 1} of {count})" if count > 1 else ""), columns[i * size : (i + 1) * size]


def _lines(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield the saved images, those that most rows saved first; a row with another original has no cell."""
    saved = [_saved(row) for row in rows]
    counts = Counter(itertools.chain(*saved))
    for identity, _ in counts.most_common():
        own = (read_pixels(images[identity][0]) for images in saved if identity in images)
        original = next((pixels for pixels in own if pixels is not None), None)
        if original is not None:
            cells = [_rebuilt(images, identity, original) for images in saved]
            psnr = [row.values("psnr").get(identity) for row in rows]
            yield Line(identity, original, cells, psnr)


def _rebuilt(saved: Mapping[str, tuple[Path, Path]], identity: str, original: Pixels) -> Pixels | None:
    """Read a reconstruction of this original in its size; None where there is none that can be read."""
    own, pixels = map(read_pixels, saved[identity]) if identity in saved else (None, None)
    fits = pixels is not None and pixels.shape == original.shape and np.array_equal(own, original)
    return pixels if fits else None


def _saved(row: Row) -> dict[str, tuple[Path, Path]]:
    try:
        return {str(identity): (original, rebuilt) for identity, original, rebuilt in row.run.images}
    except AfterimageError:
        return {}


def read_pixels(path: Path) -> Pixels | None:
    try:
        return np.asarray(read_image(path).convert("RGB"))
    except AfterimageError:
        return None


def _drawing(page: Page, lines: Sequence[Line]) -> Drawing:
    heads = in_columns(["original", *(_head(row, page) for row in page.rows)])
    width, below = len(heads) * (CELL + GAP) - GAP + 2 * EDGE, 2 * CELL + FOOT + EDGE
    figure, axes, top = create_grid_figure(heads, width, (len(lines) - 1) * BLOCK + below)
    for place, line in enumerate(lines):
        y = top + place * BLOCK
        scores = ("" if psnr is None else f"{psnr:.2f} dB" for psnr in line.psnr)
        feet = [drawable(line.id, HEAD), *scores]
        for x, pixels, foot in zip(heads, [line.original, *line.cells], feet, strict=True):
            if pixels is None:
                _draw_placeholder(axes, x, y)
            else:
                _show(axes, pixels, x, y, foot, highest_contrast_square(line.original), boxed=x == EDGE)
    gaps = sum(pixels is None for line in lines for pixels in line.cells)
    missing = f" {gaps} images were not saved, cannot be read, or are of another original." if gaps else ""
    caption = (
        "Originals and what each row rebuilt, and under each the boxed detail enlarged pixel by pixel: the "
        "part of the original with the highest contrast (variance of its luma). Above a column: its row and "
        f"mean PSNR over all test images; below an image: its own PSNR.{missing}{fusion_note(page.rows)}"
    )
    return Drawing(page.stem, page.title, caption, figure, page.folded)


def _show(
    axes: Axes, pixels: Pixels, x: float, y: float, foot: str, detail: tuple[int, int, int], *, boxed: bool
) -> None:
    """Draw an image in the square cell at `(x, y)`, `foot` below it, and its detail in the cell below."""
    left, above, scale = place_image(axes, pixels, x, y, foot)
    top, side, size = detail
    corner, length = (left + side * scale, above + top * scale), size * scale
    if boxed:
        axes.add_patch(Rectangle(corner, length, length, fill=False, ec="white", lw=2.2))
        axes.add_patch(Rectangle(corner, length, length, fill=False, ec=BOX, lw=1.2))
    y += CELL + FOOT
    axes.imshow(
        pixels[top : top + size, side : side + size], extent=(x, x + CELL, y + CELL, y), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip


def in_columns(heads: Sequence[str]) -> dict[float, str]:
    """Return headings by the left ends of columns that stand side by side."""
    return {EDGE + column * (CELL + GAP): head for column, head in enumerate(heads)}


def create_grid_figure(
    heads: Mapping[float, str], width: float, below: float, *, line: float = 0.13, **text: Any
) -> tuple[Figure, Axes, float]:
    """Make a figure with one axes in inches from the top left: an axes for each cell would be slow.

    `heads` are headings by the left ends of their columns, in lines of `line` inches. Returned are also the top of
    what is `below` inches high under them.
    """
    top = EDGE + line * max(head.count("\n") + 1 for head in heads.values()) + 0.08
    figure = Figure((width, top + below))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(figure.get_figheight(), 0))
    axes.set_axis_off()
    look = {"ha": "center", "va": "bottom", "fontsize": 7.5, "linespacing": 1.25, **text}
    for x, head in heads.items():
        axes.text(x + CELL / 2, top - 0.05, head, **look)
    return figure, axes, top


def place_image(
    axes: Axes, pixels: np.ndarray, x: float, y: float, foot: str, *, size: float = 7.0, **options: Any
) -> tuple[float, float, float]:
    """Place an image, or a map, in the square cell at `(x, y)` with `foot` of `size` points below it.

    Returns:
        left and top of the image, and the size of its pixels, in inches
    """
    rows, columns = pixels.shape[:2]
    scale = CELL / max(rows, columns)
    left, above = x + (CELL - columns * scale) / 2, y + (CELL - rows * scale) / 2
    extent = (left, left + columns * scale, above + rows * scale, above)
    axes.imshow(pixels, extent=extent, aspect="auto", **{"interpolation": "auto", **options})
    axes.text(x + CELL / 2, y + CELL + 0.03, foot, ha="center", va="top", fontsize=size, color=INK)
    return left, above, scale


def _draw_placeholder(axes: Axes, x: float, y: float, *, has_detail: bool = True) -> None:
    for top in (y, y + CELL + FOOT) if has_detail else (y,):
        axes.add_patch(Rectangle((x, top), CELL, CELL, fill=False, ec="#cccccc", lw=0.7))
    axes.text(x + CELL / 2, y + CELL / 2, "not saved", ha="center", va="center", color=MUTED, fontsize=7)


def highest_contrast_square(pixels: Pixels) -> tuple[int, int, int]:
    """Return top, left and size of the square (1/4 of the shorter side) with the highest luma variance."""
    luma: Float[np.ndarray, "height width"] = pixels @ np.array([0.299, 0.587, 0.114])
    size = max(1, min(luma.shape) // DETAIL)

    # A filter's output at (y, x) is of the window whose centre is there.
    first, rows, columns = size // 2, luma.shape[0] - size + 1, luma.shape[1] - size + 1
    square, mean = uniform_filter(luma**2, size), uniform_filter(luma, size)
    variance = (square - mean**2)[first : first + rows, first : first + columns]
    y, x = np.unravel_index(variance.argmax(), variance.shape)
    return int(y), int(x), size


def _head(row: Row, page: Page) -> str:
    """Return the heading of a column: names that set its row apart, and its mean PSNR."""
    parts = []
    if row.is_baseline:
        parts.append(wrap(drawable(row.label, 44), HEAD))
    else:
        if len({(r.encoder, r.control) for r in page.rows}) > 1 and len(row.sources) == 1:
            parts.append(wrap(drawable(page.names[row.encoder]), HEAD))
        parts += [drawable(row.layer, HEAD), wrap(drawable(row.decoder_label, 60), HEAD)]
        parts += [f"seed {row.seed}"] if len({r.seed for r in page.rows}) > 1 else []
        parts += [row.control] if row.is_random else []
    return "\n".join([*parts, f"mean {row.scores['psnr'].mean:.2f} dB"])


def _slug(name: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part)[:120]
