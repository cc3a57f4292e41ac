"""Originals beside their reconstructions, whole and in a detail."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from afterimage.report.escape import plain
from afterimage.report.figures.labels import wrap
from afterimage.report.figures.style import INK, MUTED, Drawing, short_encoders
from afterimage.report.read import DAMAGE
from afterimage.report.rows import Row, Rows
from afterimage.report.variants import fusion_legend

Pixels = UInt8[np.ndarray, "height width 3"]
COLUMNS = 8
PICTURES = 4
DETAIL = 4  # a detail is this part of the shorter side
CELL = 1.12  # inches: at 200 dpi the 224 pixels of a usual picture are printed one to one
LINE = 0.13  # inches a line of text takes
HEAD = 17  # characters that fit above a column
BOX = "#D55E00"


@dataclass(frozen=True)
class Album:
    """The pictures of a figure: `cells[id][i]` is the reconstruction by row `i`, None where there is none."""

    ids: list[str]
    originals: dict[str, Pixels]
    cells: dict[str, list[Pixels | None]]


@dataclass(frozen=True)
class Page:
    """The runs that share a figure."""

    stem: str
    title: str
    rows: list[Row]
    names: dict[str, str]


def pages(rows: Rows) -> list[Page]:
    """Few runs share a page; more are split by encoder, decoder and seed. Reference lines stand apart."""
    names, found = short_encoders(rows.decoders), []
    for title, members in _split(rows, names):
        stem = _slug(title)
        # Names that differ only in what a file's name cannot hold must not share a file.
        taken = sum(page.stem == stem or page.stem.startswith(f"{stem}~") for page in found)
        found.append(Page(f"{stem}~{taken + 1}" if taken else stem, title, members, names))
    return found


def grid(page: Page) -> list[Drawing]:
    """Two figures: whole pictures, and a detail of each. Empty where the runs saved none."""
    album = _album(page.rows)
    return [_whole(page, album), _detail(page, album)] if album.ids else []


def _split(rows: Rows, names: dict[str, str]) -> Iterable[tuple[str, list[Row]]]:
    room = COLUMNS - 1
    if rows.decoders and len(rows.decoders) <= room:
        yield "Reconstructions", list(rows.decoders)
    else:
        for encoder, is_random in dict.fromkeys((r.encoder, r.is_random) for r in rows.decoders):
            members = [r for r in rows.decoders if (r.encoder, r.is_random) == (encoder, is_random)]
            name = names[encoder] + (", RANDOM weights" if is_random else "")
            if len(members) <= room:
                yield f"Reconstructions: {name}", members
                continue
            seeds = len({r.seed for r in members}) > 1
            by_decoder = sorted(members, key=lambda r: (r.decoder_order, r.seed or 0, r.order))
            for _, group in itertools.groupby(by_decoder, key=lambda r: (r.decoder_label, r.seed)):
                own = list(group)
                title = f"Reconstructions: {name}, {plain(own[0].decoder_label)}"
                yield from _chunks(title + (f", seed {own[0].seed}" if seeds else ""), own)
    if rows.references:
        yield from _chunks("Reconstructions: reference lines", list(rows.references))


def _chunks(title: str, rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    count = -(-len(rows) // (COLUMNS - 1))
    size = -(-len(rows) // count)
    for i in range(count):
        yield title + (f" ({i + 1} of {count})" if count > 1 else ""), rows[i * size : (i + 1) * size]


def _album(rows: Sequence[Row]) -> Album:
    """The first pictures that most rows saved; a row whose original differs under the same id has no cell."""
    saved = [_saved(row) for row in rows]
    counts = {i: sum(i in s for s in saved) for i in dict.fromkeys(itertools.chain(*saved))}
    ids = sorted(counts, key=lambda i: -counts[i])
    album = Album([], {}, {})
    for identity in ids:
        pairs = [tuple(map(_read, s[identity])) if identity in s else (None, None) for s in saved]
        original = next((o for o, _ in pairs if o is not None), None)
        if original is not None:
            album.ids.append(identity)
            album.originals[identity] = original
            album.cells[identity] = [
                r if r is not None and r.shape == original.shape and np.array_equal(o, original) else None
                for o, r in pairs
            ]
        if len(album.ids) == PICTURES:
            break
    return album


def _saved(row: Row) -> dict[str, tuple[Path, Path]]:
    try:
        return {str(identity): (original, rebuilt) for identity, original, rebuilt in row.run.pictures}
    except DAMAGE:
        return {}


def _read(path: Path) -> Pixels | None:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _whole(page: Page, album: Album) -> Drawing:
    heads = ["original", *(_head(row, page) for row in page.rows)]
    figure, panels = _frame(heads, len(album.ids), foot=True)
    for identity, line in zip(album.ids, panels, strict=True):
        _show(line[0], album.originals[identity], plain(identity, HEAD))
        for axes, row, pixels in zip(line[1:], page.rows, album.cells[identity], strict=True):
            psnr = row.values("psnr").get(identity)
            _show(axes, pixels, "" if psnr is None or pixels is None else f"{psnr:.2f} dB")
    caption = (
        "Originals and what each row rebuilt. Above a column: its row and mean PSNR over all test pictures; "
        f"below a picture: its own PSNR.{_missing(album)}{_fusions(page.rows)}"
    )
    return Drawing(page.stem, page.title, caption, figure)


def _detail(page: Page, album: Album) -> Drawing:
    heads = ["original", "detail", *(_head(row, page) for row in page.rows)]
    figure, panels = _frame(heads, len(album.ids), foot=False)
    for identity, line in zip(album.ids, panels, strict=True):
        original = album.originals[identity]
        y, x, size = busiest(original)
        window = np.s_[y : y + size, x : x + size]
        _show(line[0], original, "")
        line[0].add_patch(Rectangle((x - 0.5, y - 0.5), size, size, fill=False, ec="white", lw=2.2))
        line[0].add_patch(Rectangle((x - 0.5, y - 0.5), size, size, fill=False, ec=BOX, lw=1.2))
        for axes, pixels in zip(line[1:], [original, *album.cells[identity]], strict=True):
            _show(axes, None if pixels is None else pixels[window], "", smooth=False)
    caption = (
        "The boxed detail, the part of the original with the highest contrast (variance of its luma), "
        f"enlarged pixel by pixel.{_missing(album)}{_fusions(page.rows)}"
    )
    return Drawing(f"{page.stem}-detail", f"{page.title}, in detail", caption, figure, folded=True)


def busiest(pixels: Pixels) -> tuple[int, int, int]:
    """Top, left and size of the square with the highest luma variance; a quarter of the shorter side wide."""
    luma: Float[np.ndarray, "height width"] = pixels @ np.array([0.299, 0.587, 0.114])
    size = max(1, min(luma.shape) // DETAIL)

    def sums(values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "rows columns"]:
        total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        return total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]

    variance = sums(luma**2) / size**2 - (sums(luma) / size**2) ** 2
    y, x = np.unravel_index(variance.argmax(), variance.shape)
    return int(y), int(x), size


def _frame(heads: Sequence[str], count: int, *, foot: bool) -> tuple[Figure, np.ndarray]:
    """A figure of square cells at fixed sizes in inches, so that pictures print alike in every figure."""
    top = LINE * max(head.count("\n") + 1 for head in heads) + 0.08
    below = LINE + 0.05 if foot else 0.0
    gap, edge = 0.06, 0.05
    width = len(heads) * (CELL + gap) - gap + 2 * edge
    height = top + count * (CELL + below + gap) - gap + 2 * edge
    figure = Figure((width, height))
    panels = np.empty((count, len(heads)), dtype=object)
    for i, j in itertools.product(range(count), range(len(heads))):
        left = edge + j * (CELL + gap)
        bottom = height - edge - top - (i + 1) * CELL - i * (below + gap)
        panels[i, j] = figure.add_axes((left / width, bottom / height, CELL / width, CELL / height))
        if i == 0:
            panels[i, j].set_title(heads[j], fontsize=7.5, pad=4, weight="normal", linespacing=1.25)
    return figure, panels


def _show(axes: Axes, pixels: Pixels | None, foot: str, *, smooth: bool = True) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(pixels is None)
    axes.spines[:].set_color("#cccccc")
    if pixels is None:
        axes.text(
            0.5, 0.5, "not saved", transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=7
        )
    else:
        axes.imshow(pixels, interpolation="auto" if smooth else "nearest")
    axes.text(0.5, -0.03, foot, transform=axes.transAxes, ha="center", va="top", fontsize=7, color=INK)


def _head(row: Row, page: Page) -> str:
    """What tells this column from the others, and its mean PSNR."""
    parts = []
    if row.kind == "reference":
        parts.append(wrap(plain(row.label, 44), HEAD))
    else:
        if len({(r.encoder, r.is_random) for r in page.rows}) > 1 and len(row.sources) == 1:
            parts.append(wrap(page.names[row.encoder], HEAD))
        parts += [plain(row.layer, HEAD), wrap(plain(row.decoder_label, 60), HEAD)]
        parts += [f"seed {row.seed}"] if len({r.seed for r in page.rows}) > 1 else []
        parts += ["RANDOM weights"] if row.is_random else []
    return "\n".join([*parts, f"mean {row.scores['psnr'].mean:.2f} dB"])


def _missing(album: Album) -> str:
    gaps = sum(pixels is None for cells in album.cells.values() for pixels in cells)
    return f" {gaps} pictures were not saved, cannot be read, or are of another original." if gaps else ""


def _fusions(rows: Sequence[Row]) -> str:
    return "".join(f" {line[0].upper()}{line[1:]}." for line in fusion_legend(rows))


def _slug(name: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part)[:120]
