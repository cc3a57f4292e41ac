"""Rows among those of an atlas: what is ranked with what, what is kept apart, the command and its figure."""

import pytest

from afterimage.cli import main
from afterimage.config import AfterimageError
from afterimage.report.compare import compare, entries, read_atlas, standings_table
from afterimage.report.figures.scatter import ranking_figure
from afterimage.report.figures.style import style
from afterimage.report.reading import read_rows
from afterimage.report.tables import csv_table, records
from afterimage.runs.run import scan
from drawn_text import faults
from report_study import RESNET, VIT, write_run, write_study
from simulated_runs import edit, search

MINE = ("mine", {"early": (64, 56, 0.85), "late": (256, 14, 0.5)})  # 1.33 and 0.33 values per pixel value
REFINED = {"psnr": 2.0, "ssim": 0.05, "lpips": -0.2}


def rows_of(runs, where="here"):
    return entries(records(read_rows(runs)), where)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    root = tmp_path_factory.mktemp("atlas")
    runs = write_study(root, decoders=("linear",), baselines=("mean",))
    search(runs[0], "refined", REFINED)
    return root


@pytest.fixture
def mine(tmp_path):
    return write_study(tmp_path / "mine", encoders=(MINE,), decoders=("linear",), baselines=())


def test_a_row_is_ranked_among_rows_of_about_as_many_values_with_its_own_counted(atlas, mine):
    runs = [run for run in scan(atlas) if run.result.kind == "decoder"]
    values = {run.result.label.split(" ")[0]: run.result for run in runs}
    early = rows_of(mine)[0]
    assert early.values == pytest.approx(64 * 56 * 56 / (3 * 224 * 224))
    comparison = compare(rows_of(mine), rows_of(scan(atlas)), within=1.5)
    first = comparison.standings[0]
    near = {name for name, r in values.items() if 1 / 1.5 <= _values(r) / early.values <= 1.5}
    assert {e.features for e in first.others} == near and len(near) >= 2
    for metric, sign in (("psnr", 1), ("ssim", 1), ("lpips", -1)):
        ahead = sum(sign * values[n].scores[metric].mean > sign * early.scores[metric] for n in near)
        assert first.rank(metric) == (1 + ahead, 1 + len(near))
    wide = compare(rows_of(mine), rows_of(scan(atlas)), within=1000.0).standings[0]
    assert wide.rank("psnr")[1] == 1 + len(values)
    found = {name: r.scores["psnr"].mean for name, r in values.items()} | {"mine:early": early.scores["psnr"]}
    assert wide.first("psnr").features == max(found, key=found.get)


def _values(result):
    (found,) = result.features
    return found.channels * found.height * found.width / (3 * 224 * 224)


def test_bounds_are_ranked_among_bounds_of_as_many_passes_alone(atlas, mine):
    same, more = search(mine[0], "refined", REFINED), search(mine[1], "refined", REFINED, steps=50)
    comparison = compare(rows_of([*mine, same, more]), rows_of(scan(atlas)), within=1000.0)
    bounds = [s for s in comparison.standings if s.ranked_entry.answer == "linear + refined"]
    assert [(s.ranked_entry.features, s.rank("psnr")) for s in bounds] == [
        ("mine:early", (2 - (s.ranked_entry.scores["psnr"] > s.others[0].scores["psnr"]), 2)) for s in bounds
    ]
    (told,) = [r for r in comparison.remarks if "mine:late" in r]
    assert told.startswith("No row of the atlas was measured as mine:late: linear + refined in 50 passes")


@pytest.mark.parametrize("change", [{"data__digest": "other"}, {"data__crop": 192}])
def test_rows_of_other_images_or_crops_are_kept_apart_and_said(change, atlas, mine, tmp_path):
    others = write_study(tmp_path / "others", encoders=(RESNET, VIT), decoders=("linear",), baselines=())
    for run in others[:3]:
        edit(run, **change)
    comparison = compare(rows_of(mine), rows_of(others), within=1000.0)
    assert [s.rank("psnr")[1] for s in comparison.standings] == [1 + 4] * 2
    (told,) = comparison.remarks
    way = str(rows_of(others[:1])[0].measured)
    assert told == f"Rows of the atlas that are kept apart, since none of yours was measured as {way}: 3."
    for run in others[3:]:
        edit(run, **change)
    with pytest.raises(
        AfterimageError,
        match=r"was measured under the same conditions as your rows \(linear on",
    ):
        compare(rows_of(mine), rows_of(others))


def test_lpips_is_ranked_by_one_network_only(atlas, tmp_path):
    runs = write_study(tmp_path, encoders=(MINE,), decoders=("linear",), baselines=(), lpips="squeeze")
    comparison = compare(rows_of(runs), rows_of(scan(atlas)), within=1000.0)
    assert [s.rank("lpips") for s in comparison.standings] == [None, None]
    assert all(s.rank("ssim") for s in comparison.standings)
    (told,) = comparison.remarks
    assert told == "Rows of the atlas whose LPIPS is by alex, a network that measured none of yours: 7."


def test_random_controls_of_the_atlas_and_its_copies_of_ones_rows_are_not_ranked(mine, tmp_path):
    control = write_run(tmp_path, "m", "l", weights="random")
    real = write_run(tmp_path, "m", "l")
    comparison = compare(rows_of(mine), rows_of([control, real, *mine]), within=1000.0)
    assert [[o.features for o in s.others] for s in comparison.standings] == [["m:l"], ["m:l"]]
    assert comparison.remarks[0] == "Rows of the atlas that have random weights and are not ranked: 1."


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_an_atlas_is_a_folder_or_its_table(form, atlas, mine, tmp_path):
    path = tmp_path / f"table.{form}"
    rows = read_rows(scan(atlas))
    if form == "csv":
        path.write_text(csv_table(rows))
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(records(rows)), path)
    assert entries(read_atlas(path), "table") == entries(records(rows), "folder")


def test_what_is_no_atlas_is_said(tmp_path, mine):
    table = tmp_path / "table.csv"
    table.write_text("sources,decoder\nm:l,linear\n")
    with pytest.raises(AfterimageError, match="has no column weights, values_per_pixel"):
        entries(read_atlas(table), "table.csv")
    text = csv_table(read_rows(mine))
    cell = str(read_rows(mine).decoders[0].scores["psnr"].mean)
    table.write_text(text.replace(cell, "nan"))
    with pytest.raises(AfterimageError, match="row 1: psnr_mean is nan, not a finite number"):
        entries(read_atlas(table), "table.csv")
    (tmp_path / "table.parquet").write_bytes(b"no parquet")
    with pytest.raises(AfterimageError, match="cannot read"):
        read_atlas(tmp_path / "table.parquet")
    with pytest.raises(AfterimageError, match="1 or more"):
        compare(rows_of(mine), rows_of(mine), within=0.5)


def test_the_command_prints_ranks_and_saves_a_figure(atlas, mine, tmp_path, capsys):
    figure = tmp_path / "compare.png"
    main(["compare", str(tmp_path / "mine"), "--with", str(atlas), "--output", str(figure)])
    shown = capsys.readouterr().out
    comparison = compare(rows_of(mine), rows_of(scan(atlas)))
    place = comparison.standings[0].rank("psnr")
    assert f"{place[0]} of {place[1]}" in shown and "0.667 to 1.5 times as many feature values" in shown
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert standings_table(comparison).rows[0][2] == "1.33"


def test_the_figure_has_a_panel_an_answer_and_metric_and_room_for_its_names(atlas, mine):
    bound = search(mine[0], "refined", REFINED)
    comparison = compare(rows_of([*mine, bound]), rows_of(scan(atlas)))
    with style():
        drawing = ranking_figure(comparison)
    assert len(drawing.figure.axes) == 2 * 3 and not faults(drawing.figure)
    psnr = drawing.figure.axes[0]
    drawn = {tuple(line.get_ydata()): line.get_color() for line in psnr.lines}
    own = tuple(s.ranked_entry.scores["psnr"] for s in comparison.standings[:2])
    assert own in drawn and list(drawn.values()).count(drawn[own]) == 1
