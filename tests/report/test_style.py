"""The parts that figures share: colours, labels, details."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterimage.report.figures.image_grid import highest_contrast_square
from afterimage.report.figures.labels import spread, wrap
from afterimage.report.figures.style import decoder_styles
from afterimage.report.reading import read_rows
from report_study import write_run


def test_decoders_keep_their_colour_and_no_two_look_alike(tmp_path):
    names = ["attention", "mine", "linear", "other", "residual"]
    runs = [write_run(tmp_path, "m", "l", name) for name in names]
    runs += [write_run(tmp_path, "m", "l", "attention", parameters=p) for p in (10_000, 20_000)]
    styles = decoder_styles(read_rows(runs).decoders)
    assert len(set(styles.values())) == len(styles) == 7
    assert styles["linear"].color == "#000000"
    alone = decoder_styles(read_rows(runs[2:3]).decoders)
    assert alone["linear"] == styles["linear"]


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (3, 3)])
def test_the_detail_is_where_the_contrast_is_highest(shape):
    pixels = np.random.default_rng(0).integers(100, 140, (*shape, 3)).astype(np.uint8)
    pixels[-8:-2, 9:14] = np.random.default_rng(1).choice([0, 255], pixels[-8:-2, 9:14].shape)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    y, x, size = highest_contrast_square(pixels)
    assert size == max(1, min(shape) // 4)
    variances = {
        (i, j): luma[i : i + size, j : j + size].var()
        for i in range(shape[0] - size + 1)
        for j in range(shape[1] - size + 1)
    }
    assert variances[y, x] == pytest.approx(max(variances.values()))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).map(sorted), st.floats(0.001, 0.1))
def test_spread_labels_keep_their_order_their_distance_and_the_margin(positions, gap):
    placed = spread(positions, gap, 0.0, 1.0)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(placed))
    assert placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9
    if all(b - a >= gap for a, b in pairwise(positions)):
        assert placed == pytest.approx(positions)


@given(st.text("ab_.- ", max_size=60), st.integers(3, 30))
def test_wrapped_names_lose_nothing_but_spaces(name, width):
    lines = wrap(name, width).split("\n")
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert max(map(len, lines)) <= width
