r"""Text of figures: cut to a width in columns; characters that no font has are written as `\u4e2d`."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from afterimage.report.format import plain

BASE = "DejaVu Sans"
"""Font of every figure, bundled with matplotlib."""
OTHERS = (
    "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans Devanagari", "Noto Sans Thai",
    "Arial Unicode MS", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Unifont",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS that are used, if installed, for characters missing in the base font."""


@cache
def families() -> list[str]:
    """Return the fonts to draw text in; each character is drawn in the first font that contains it."""
    installed = set(font_manager.get_font_names())
    return [BASE, *(name for name in OTHERS if name in installed)]


@cache
def _characters() -> frozenset[str]:
    files = (font_manager.findfont(name) for name in families())
    return frozenset(chr(code) for file in files for code in FT2Font(file).get_charmap())


def drawable(text: object, limit: int = 0) -> str:
    """Return text as `plain` does, with characters that no font contains written as escapes.

    Args:
        text: the text
        limit: largest width in columns (a CJK character takes two), cut in the middle; 0 for no limit
    """
    units = [c if c in _characters() else _escape(c) for c in plain(text)]
    return "".join(units if not limit or columns("".join(units)) <= limit else _cut(units, limit))


def columns(text: str) -> int:
    """Return the width of text in columns: 2 for a wide (CJK) character, 1 for any other."""
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def head(units: Sequence[str], width: int) -> Sequence[str]:
    """Return the longest beginning that fits into `width` columns."""
    return units[: sum(end <= width for end in itertools.accumulate(map(columns, units)))]


def _cut(units: list[str], limit: int) -> list[str]:
    """Cut text in the middle, as `plain` does, without splitting escapes."""
    tail = head(units[::-1], (limit - 1) // 2)[::-1]
    return [*head(units, limit - 1 - columns("".join(tail))), "…", *tail]


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode() if ord(character) > 127 else character
