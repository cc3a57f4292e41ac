"""Names in any script are drawn by a font that has their characters, else written as escapes."""

import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from afterimage.report.figures import draw, render, style
from afterimage.report.figures.labels import wrap
from afterimage.report.figures.style import BASE, _characters, columns, drawable, families
from afterimage.report.format import single_line
from afterimage.report.reading import read_rows
from report_study import sample_image, write_run

LACKING = "龘靐"  # no font that comes with matplotlib, and none here, has these
NAME = f"{LACKING}_001"


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
    """Install only the fonts that come with matplotlib."""
    brought = [f for f in font_manager.fontManager.ttflist if "mpl-data" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", brought)
    for known in (families, _characters):
        known.cache_clear()
    yield
    for known in (families, _characters):
        known.cache_clear()


def install(folder, name: str, characters: str) -> None:
    """A font whose glyphs are triangles, added to those that are installed."""
    builder, glyphs = FontBuilder(1000, isTTF=True), {".notdef": TTGlyphPen(None).glyph()}
    for character in characters:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        pen.lineTo((1000, 0))
        pen.lineTo((500, 900))
        pen.closePath()
        glyphs[f"u{ord(character):X}"] = pen.glyph()
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(character): f"u{ord(character):X}" for character in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": name, "styleName": "Regular", "psName": name.replace(" ", "")})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(folder / f"{name}.ttf")
    font_manager.fontManager.addfont(folder / f"{name}.ttf")


def test_what_no_font_has_is_written_as_escapes():
    assert drawable(NAME) == r"\u9f98\u9750_001"
    assert drawable("ÿ Ω я ☕ 😀") == "ÿ Ω я ☕ 😀"  # these the base font has
    assert drawable("\U0002070e") == r"\U0002070e"
    assert families() == [BASE]


def test_an_installed_font_draws_what_the_base_font_lacks(tmp_path):
    install(tmp_path, "Noto Sans CJK SC", LACKING)
    assert drawable(f"{NAME}龖") == rf"{NAME}\u9f96" and families() == [BASE, "Noto Sans CJK SC"]
    with style(), warnings.catch_warnings():
        warnings.simplefilter("error")  # of glyphs that are missing
        figure = Figure((3, 1))
        figure.text(0.1, 0.5, drawable(NAME))
        svg = render(figure)[1].decode()
    assert (
        svg.count("NotoSansCJKSC-") >= 2 and "DejaVuSans-" in svg
    )  # its outlines, and the base font's for the rest


@pytest.mark.parametrize("has_font", [False, True])
def test_every_figure_draws_such_names(tmp_path, has_font):
    if has_font:
        install(tmp_path, "Noto Sans CJK SC", LACKING)
    runs = [
        write_run(tmp_path, f"{LACKING}net", layer, decoder, originals=[sample_image(0, 32)], count=3)
        for layer in (f"{LACKING}1", f"{LACKING}2")
        for decoder in ("linear", LACKING)
    ]
    shown = {}
    for drawing in draw(read_rows(runs)):
        with style():
            drawing.figure.draw_without_rendering()
        shown[drawing.name] = "".join(text.get_text() for text in drawing.figure.findobj(Text))
        assert r"\u9f98" not in drawing.caption and r"\u9f98" not in drawing.title
    assert {"quality-by-depth", "distributions", "training-curves"} <= shown.keys() and len(shown) > 4
    for name, text in shown.items():
        assert set(text) - {"\n"} <= _characters(), name
        assert (LACKING[0] in text, r"\u9f98" in text) == (has_font, not has_font), name


@given(st.text(st.characters(codec="ascii"), max_size=60), st.integers(3, 30))
def test_what_the_base_font_has_is_cut_as_ever(text, limit):
    assert drawable(text, limit) == single_line(text, limit) and drawable(text) == single_line(text)


@given(st.text("ab_.- 龘靐", max_size=60), st.integers(4, 30))
def test_wide_characters_take_two_columns(name, width):
    lines = wrap(name, width).split("\n")
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert max(map(columns, lines)) <= width
    assert columns(drawable(name, width)) <= width
