"""Rows -> tables: Markdown, LaTeX, CSV and the terminal."""

import csv
import io
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, FusionConfig
from afterimage.report.figures.style import mean_over_seeds
from afterimage.report.format import latex, markdown, markdown_code, ratio, single_line
from afterimage.report.inversion import distance_text
from afterimage.report.reading import read_rows
from afterimage.report.tables import build_table, csv_table, duration, latex_table, markdown_table
from afterimage.report.write import write_report
from afterimage.runs.results import METRICS, Score
from afterimage.runs.run import scan
from report_study import VIT, printed, write_baseline, write_run, write_study
from simulated_runs import shift

HOSTILE = "<script>alert(1)</script>|[x](javascript:y)\n# $a_b^c$ {%} `**`\\ &~"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_study(root, baselines=("mean", "thumbnail-112", "jpeg-50"))
    return read_rows(scan(root))


def cells(table: str) -> list[list[str]]:
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")]


def test_order_does_not_depend_on_the_order_of_the_runs(tmp_path):
    runs = write_study(tmp_path, encoders=(VIT,), baselines=("mean", "jpeg-50"))
    assert csv_table(read_rows(runs)) == csv_table(read_rows(reversed(runs)))


def test_one_image_has_no_spread_and_no_interval(tmp_path):
    rows = read_rows([write_run(tmp_path, "m", "l", count=1)])
    assert rows.decoders[0].scores["psnr"].std is None
    assert "±" not in cells(markdown_table(rows))[2][-1]
    assert Score.of([3.0]) == Score(3.0, None, 1)


def test_markdown_shows_every_row_with_its_numbers(study):
    header, _, *lines = cells(markdown_table(study))
    assert [name.strip() for name in header][-3:] == ["PSNR (dB) ↑", "SSIM ↑", "LPIPS (alex) ↓"]
    assert len(lines) == len(study.all)
    first, score = [cell.strip() for cell in lines[1]], study.decoders[1].scores["psnr"]
    assert first[:6] == ["`resnet34.tv_in1k:layer1`", "64×56×56", "4×", "attention", "pretrained", "250,147"]
    assert first[7].strip("*") == f"{score.mean:.2f} ± {score.std:.2f}"


def test_figures_are_named_by_their_protocol_and_what_it_has_beside_them_is_not_made_up(tmp_path):
    runs = [
        write_run(tmp_path, "m", "norm", protocol="rae"),
        write_baseline(tmp_path, "jpeg-50", protocol="rae"),
    ]
    table = markdown_table(read_rows(runs))
    header, _, *lines = cells(table)
    assert [name.strip() for name in header][-4:] == [
        "PSNR (dB), rae ↑", "SSIM, rae ↑", "LPIPS (alex), rae ↓", "rFID, rae ↓"
    ]  # fmt: skip
    assert all("not measured" in line[-1] for line in lines)
    assert "rFID is not measured: it needs the Inception network" in table.replace("\\", "")
    assert any("rFID (rae) is not measured" in warning for warning in read_rows(runs).warnings)


def test_figures_of_several_protocols_are_not_put_into_one_report(tmp_path):
    runs = [write_run(tmp_path, "m", "norm", protocol=name) for name in ("rae", "study")]
    with pytest.raises(
        AfterimageError, match=r"different protocols: study \(m-norm.*\); rae \(m-norm.*one at a time"
    ):
        write_report(runs, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_spread_may_be_the_interval(study):
    found = study.decoders[0].intervals["psnr"]
    shown = markdown_table(study, spread="interval")
    assert rf"{found.estimate:.2f} \[{found.low:.2f}, {found.high:.2f}\]" in shown
    assert r"95 \% BCa interval" in latex_table(study, spread="interval")
    with pytest.raises(AfterimageError, match="std, interval"):
        markdown_table(study, spread="stdev")


def test_the_best_decoder_row_is_bold_in_its_own_direction_and_ties_with_it(tmp_path):
    runs = [write_run(tmp_path, "m", f"l{i}") for i in range(3)] + [write_baseline(tmp_path, "jpeg-50")]
    means = [(20.0, 0.5, 0.3), (25.001, 0.9, 0.2), (24.999, 0.8, 0.1), (40.0, 1.0, 0.0)]
    for run, mean in zip(runs, means, strict=True):
        shift(run, **dict(zip(METRICS, mean, strict=True)))
    bold = [[c.bold for c in list(line.cells.values())[-3:]] for line in build_table(read_rows(runs)).lines]
    assert bold == [[False] * 3, [True, True, False], [True, False, True], [False] * 3]


def test_lpips_that_is_unavailable_says_why_and_never_a_number(tmp_path):
    rows = read_rows([write_run(tmp_path, "m", "l", lpips=None)])
    for table in (markdown_table(rows), latex_table(rows)):
        assert "LPIPS is unavailable: no weights for alexnet" in table
    header, _, line = cells(markdown_table(rows))
    assert (header[-1].strip(), line[-1].strip()) == ("LPIPS ↓", "unavailable¹")
    (record,) = csv.DictReader(io.StringIO(csv_table(rows)))
    assert (record["lpips_mean"], record["lpips_net"]) == ("", "")


def test_distances_by_different_networks_stand_in_different_columns(tmp_path):
    runs = [write_run(tmp_path, "m", "l1", lpips="alex"), write_run(tmp_path, "m", "l2", lpips="squeeze")]
    header, _, first, second = cells(markdown_table(read_rows(runs)))
    assert [h.strip() for h in header[-2:]] == ["LPIPS (alex) ↓", "LPIPS (squeeze) ↓"]
    assert (first[-1].strip(), second[-2].strip()) == ("–", "–")
    assert "±" in first[-2] and "±" in second[-1]


@pytest.mark.parametrize("kind", RANDOM_WEIGHTS)
def test_random_weights_are_loud(kind, tmp_path):
    rows = read_rows([write_run(tmp_path, "m", "l", weights=kind), write_run(tmp_path, "m", "l")])
    assert [row.is_random for row in rows.decoders] == [False, True]
    assert f"**{kind.upper()}**" in markdown_table(rows)
    assert rf"\textbf{{{kind.upper()}}}" in latex_table(rows)
    assert f"{kind.upper()} WEIGHTS" in printed(rows, 100)
    assert any(warning.startswith(f"Rows marked {kind.upper()} used") for warning in rows.warnings)


def test_both_random_controls_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / "runs", "m", "l", weights=w) for w in ("pretrained", *RANDOM_WEIGHTS)]
    rows = read_rows(runs)
    assert [row.control for row in rows.decoders] == ["", "RANDOM weights", "RANDOM-INIT weights"]
    text = write_report(runs, tmp_path / "out")["report.md"].read_text()
    for kind, what in RANDOM_WEIGHTS.items():
        assert f"**{kind.upper()}**, `seed 0`: {what}, a control, not a pretrained network" in text
    assert "Open markers: RANDOM weights (broken lines), RANDOM-INIT weights (dotted lines)." in text.replace(
        "\\", ""
    )


def test_csv_reads_back(study):
    records = list(csv.DictReader(io.StringIO(csv_table(study))))
    assert [float(r["psnr_mean"]) for r in records] == [row.scores["psnr"].mean for row in study.all]
    assert [r["sources"] for r in records] == [" + ".join(row.sources) for row in study.all]


def test_fusions_are_lettered_and_explained(tmp_path):
    sources = ("a:x", "b:y")
    fusions = [FusionConfig("concat"), FusionConfig("attention", 64, 28)]
    rows = read_rows([write_run(tmp_path, "", "", sources=sources, fusion=f) for f in fusions])
    assert [(r.layer, r.grid, r.locations) for r in rows.decoders] == [
        ("fusion A", "28×28", 784),
        ("fusion B", "56×56", 3136),
    ]
    table = markdown_table(rows)
    assert "A: attention fusion, 64 channels at 28×28<br>`a:x`<br>`b:y`" in table
    assert "fusion A: attention fusion, 64 channels at 28×28 of a:x + b:y" in " ".join(
        printed(rows, 100).split()
    )


def test_seeds_have_a_column_and_pool_image_by_image(tmp_path):
    rows = read_rows([write_run(tmp_path, "m", "l", seed=seed) for seed in (42, 43)])
    assert "seed" in [name.strip() for name in cells(markdown_table(rows))[0]]
    both = np.array([list(row.values("psnr").values()) for row in rows.decoders])
    pooled = mean_over_seeds(rows.decoders, "psnr")
    assert (pooled.estimate, pooled.count) == (pytest.approx(both.mean()), both.shape[1])


def test_hostile_names_stay_text_in_markdown(tmp_path):
    rows = read_rows(
        [write_run(tmp_path, HOSTILE, HOSTILE, HOSTILE, notes=[HOSTILE]), write_run(tmp_path, "m", "l")]
    )
    table = markdown_table(rows)
    assert {len(line) for line in cells(table)} == {10}
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(table)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "link_open", "image", "heading_open", "s_open"}
    assert {t.content for t in inline if t.type == "html_inline"} <= {"<br>"}
    shown = "".join(t.content for t in inline)
    assert single_line(HOSTILE) in shown


@pytest.mark.parametrize("text", [HOSTILE, "a_b*c", "* x", "1. x", "<br>", "|", "a`b", "![x](y)", "~~x~~"])
def test_escaped_markdown_reads_as_written(text):
    for escaped in (markdown(text), markdown_code(text)):
        html = MarkdownIt("commonmark").enable("strikethrough").renderInline(escaped)
        for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
            html = re.sub("</?code>", "", html).replace(entity, char)
        assert html == single_line(text)


def test_hostile_names_stay_text_in_latex(tmp_path):
    rows = read_rows([write_run(tmp_path, HOSTILE, HOSTILE, HOSTILE, notes=[HOSTILE])])
    body = re.search(r"\\midrule\n(.*)\\bottomrule", latex_table(rows), re.S)[1]
    (line,) = body.splitlines()
    assert len(re.findall(r"(?<!\\)&", line)) == 9
    assert not re.search(r"(?<!\\)[%#]", line) and line.endswith(r" \\")
    bare = re.sub(r"\\[{}]", "", latex_table(rows))
    assert bare.count("{") == bare.count("}")
    assert latex("[2]*") == "{[}2]{*}"


def test_no_cell_is_a_formula(tmp_path):
    run = write_run(tmp_path, "=cmd|'/c calc'!A1", "l", notes=["@SUM(1)"])
    (record,) = csv.DictReader(io.StringIO(csv_table(read_rows([run]))))
    assert not [v for v in record.values() if v[:1] in ("=", "@", "+")]


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140, 200])
def test_the_terminal_table_fits_and_keeps_the_scores(study, width):
    text = printed(study, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in study.all:
        assert f"{row.scores['psnr'].mean:.2f}" in text and f"{row.scores['lpips'].mean:.3f}" in text
    assert ("±" in text.partition("Mean ±")[0]) == (width >= 140)


def test_markup_in_a_name_is_not_markup(tmp_path):
    assert "[red]x[/red]" in printed(read_rows([write_run(tmp_path, "m", "[red]x[/red]")]), 140)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (3.24, "3.2 s"), (59.9, "60 s"), (150, "2.5 min"), (7200, "2.0 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-5, "0.00003"), (-1.234e-4, "−0.000123"), (12.0, "12"), (1234.5, "1,234"), (-0.0, "0")],
)
def test_ratios_have_no_power_of_ten(value, text):
    assert ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(150.0, "150"), (0.0123, "0.012"), (1e-4, "0.0001"), (9e-5, "< 0.0001")]
)
def test_feature_distances_have_no_power_of_ten(value, text):
    assert distance_text(value) == text


def test_the_terminals_caption_says_what_is_shown(study):
    for width, text in (
        (80, "Mean over 20 test images."),
        (300, "Mean ± standard deviation over 20 test images."),
    ):
        shown = " ".join(printed(study, width).split())
        assert text in shown and ("±" in shown) == ("±" in text)
