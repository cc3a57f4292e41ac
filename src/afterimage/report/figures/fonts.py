"""Names in any script: drawn by a font that is installed and has their characters, else written as `\u4e2d`."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

import matplotlib
import numpy as np
from jaxtyping import UInt32
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from afterimage.report.format import plain

logger = logging.getLogger("afterimage")

BASE = "DejaVu Sans"
"""The font of every figure; matplotlib brings it along."""
# Fonts that hold boxes for all characters there are, and those of TeX and STIX whose characters are not what their
# numbers say.
_NO_TEXT = re.compile(r"Last ?Resort.*|cm(b|ex|mi|r|ss|sy|tt|ti)\d+|STIX(NonUnicode|Size).*", re.IGNORECASE)
_fallbacks: dict[str, None] = {}
"""Other fonts that names have needed so far, in the order in which they were needed."""
_warned: list[str] = []


def families() -> list[str]:
    """The fonts that text is drawn in: each character in the first that has it."""
    return [BASE, *_fallbacks]


def drawable(text: object, limit: int = 0) -> str:
    """`plain` text that figures can show, cut to `limit` columns where given (of which a CJK character takes two).

    What the figures' font lacks is drawn in another one that is installed. Characters that none has are written as
    escapes, and the first time the log says so.
    """
    clean = plain(text)
    lacking = _lacking(clean)
    for name in _chosen(frozenset(lacking)) if lacking else ():
        _fallbacks[name] = None
        if BASE in matplotlib.rcParams["font.family"]:  # inside of `style`, which sets this at its beginning
            matplotlib.rcParams["font.family"] = families()
    missing = _lacking(lacking)
    if missing and not _warned:
        _warned.append("".join(sorted(missing)))
        logger.warning(
            "no installed font has the characters %s of %s: figures show those that cannot be drawn as escapes such "
            "as %s; with a font that has them (Noto Sans CJK, for example) they are drawn",
            "".join(sorted(missing)), clean, _escape(min(missing)),
        )  # fmt: skip
    units = [_escape(c) if c in missing else c for c in clean]
    return "".join(units if not limit or columns("".join(units)) <= limit else _cut(units, limit))


def with_fallbacks(figure: Figure) -> None:
    """Let all text of a figure use the fonts that were found after some of it was made."""
    if _fallbacks:
        for text in figure.findobj(Text):
            text.set_fontfamily(families())


def columns(text: str) -> int:
    """The width of text, in narrow characters."""
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def head(units: Sequence[str], width: int) -> Sequence[str]:
    """As much of the beginning as `width` columns hold."""
    return units[: sum(end <= width for end in itertools.accumulate(map(columns, units)))]


def _cut(units: list[str], limit: int) -> list[str]:
    """The beginning and the end, as `plain` cuts text; an escape is kept or left out as a whole."""
    tail = head(units[::-1], (limit - 1) // 2)[::-1]
    return [*head(units, limit - 1 - columns("".join(tail))), "…", *tail]


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode() if ord(character) > 127 else character


@cache
def _installed() -> dict[str, UInt32[np.ndarray, " _"]]:
    """The characters of each installed font that sets text, in its most regular style."""
    regular: dict[str, font_manager.FontEntry] = {}

    def oddness(font: font_manager.FontEntry) -> tuple:
        weight = font.weight if isinstance(font.weight, int) else 400
        return font.style != "normal", font.stretch != "normal", abs(weight - 400), font.fname

    for font in font_manager.fontManager.ttflist:
        known = regular.get(font.name)
        if not _NO_TEXT.fullmatch(font.name) and (known is None or oddness(font) < oddness(known)):
            regular[font.name] = font
    found = {}
    for name, font in sorted(regular.items()):
        try:
            found[name] = np.array(sorted(FT2Font(font.fname).get_charmap()), np.uint32)
        except (
            OSError,
            RuntimeError,
            ValueError,
        ):  # listed once, but gone or damaged by now: it draws nothing
            continue
    return found


def _lacking(characters: Iterable[str]) -> set[str]:
    return {c for c in characters if not any(c in _characters(name) for name in families())}


@cache
def _characters(name: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(font_manager.findfont(name)).get_charmap()))


@cache
def _chosen(lacking: frozenset[str]) -> tuple[str, ...]:
    """The fewest fonts, about, that have as many of the characters as any have; sans serif first."""
    wanted, chosen = np.array(sorted(map(ord, lacking)), np.uint32), []
    while len(wanted):
        has = {name: np.isin(wanted, own) for name, own in _installed().items()}
        name = min(has, key=lambda name: (-has[name].sum(), "Sans" not in name, name), default=None)
        if name is None or not has[name].any():
            break
        chosen.append(name)
        wanted = wanted[~has[name]]
    return tuple(chosen)
