"""Run folders -> rows: order, scores, and whatever a damaged or foreign folder holds."""

import csv
import io
import re
import subprocess
import sys

import numpy as np
import pytest

from afterimage.config import AfterimageError, RunConfig, short_names
from afterimage.evaluation.intervals import mean_interval
from afterimage.report.reading import read_rows
from afterimage.report.rows import natural_sort_key
from afterimage.report.tables import csv_table, latex_table, markdown_table
from afterimage.runs.run import Run, scan
from report_study import BASELINES, RESNET, VIT, printed, write_baseline, write_run, write_study
from simulated_runs import edit, shift

HOSTILE = "<script>alert(1)</script>|[x](javascript:y)\n# $a_b^c$ {%} `**`\\ &~"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_study(root, baselines=("mean", "thumbnail-112", "jpeg-50"))
    return read_rows(scan(root))


def test_rows_stand_by_encoder_depth_and_decoder_and_baselines_last(study):
    expected = [
        f"{m}:{layer} · {d}" for m, ls in (RESNET, VIT) for layer in ls for d in ("linear", "attention")
    ]
    assert [row.label for row in study.decoders] == expected
    assert [row.label for row in study.baselines] == [
        BASELINES[name][0] for name in ("mean", "thumbnail-112", "jpeg-50")
    ]


def test_a_layer_number_sorts_as_a_number():
    assert sorted(["blocks.11", "blocks.2", "blocks.1"], key=natural_sort_key) == [
        "blocks.1",
        "blocks.2",
        "blocks.11",
    ]


def test_scores_are_those_of_the_images(study):
    for row in study.all:
        for metric, score in row.scores.items():
            values = np.array(list(row.values(metric).values()))
            assert (score.mean, score.std, score.count) == pytest.approx(
                (values.mean(), values.std(ddof=1), len(values))
            )
            interval = mean_interval(np.array([value for _, value in sorted(row.values(metric).items())]))
            assert row.intervals[metric] == interval


def test_rows_that_differ_in_a_setting_say_which(tmp_path):
    runs = [write_run(tmp_path, "m", "l", "attention", parameters=p) for p in (None, 4_000_000, 50_000)]
    assert {row.decoder_label for row in read_rows(runs).decoders} == {
        "attention", "attention (parameters=4M)", "attention (parameters=50K)",
    }  # fmt: skip


def test_mixed_recipes_and_mixed_images_are_warned_of(tmp_path):
    runs = [write_run(tmp_path, "m", "l", "linear"), write_run(tmp_path, "m", "l", "attention", loss="l1")]
    assert "recipe.loss (l1, mse)" in "".join(read_rows(runs).warnings)
    edit(runs[0], data__test_digest="other")
    assert "do not compare" in "".join(read_rows(runs).warnings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"kind": "dec'),
        ("summary.json", "[]"),
        ("summary.json", '{"version": 1, "kind": "decoder", "label": "x", "scores": {}}'),
        ("summary.json", '{"version": 1, "kind": "party", "label": "x", "scores": {}}'),
        ("summary.json", "[" * 100_000),
        ("status.json", "[1]"),
        ("config.toml", "seed = = 1"),
        ("scores.csv", "id,psnr\na,1,2,3\n"),
        ("scores.csv", None),
        ("summary.json", None),
    ],
)
def test_a_damaged_run_is_listed_and_the_rest_go_on(tmp_path, name, content):
    good, bad = write_run(tmp_path, "m", "good"), write_run(tmp_path, "m", "bad")
    bad.file(name).unlink()
    if content is not None:
        bad.file(name).write_text(content)
    rows = read_rows([good, bad])
    assert [row.run for row in rows.decoders] == [good]
    (unfinished,) = rows.unfinished
    assert (unfinished.run, unfinished.state) == (bad, "damaged") and unfinished.error


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"many"', "{}"])
@pytest.mark.parametrize("key", ["mean", "parameters"])
def test_a_number_that_is_none_is_damage(tmp_path, key, value):
    run = write_run(tmp_path, "m", "l")
    text = re.sub(rf'"{key}": [\d.]+', f'"{key}": {value}', run.file("summary.json").read_text(), count=1)
    run.file("summary.json").write_text(text)
    with pytest.raises(AfterimageError, match="damaged"):
        read_rows([run])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("features", []),
        ("features", [{"source": "m:l"}]),
        ("features", [{"channels": 1, "height": 1, "width": 1e999, "reduction": 1}]),
        ("features", [{"channels": 1, "height": 1, "width": 1, "reduction": "half"}]),
        ("features", 7),
        ("weights", ["pretrained"]),
        ("data", "div2k"),
        ("lpips", []),
        ("lpips", "alex"),
        ("version", 0),
        ("notes", 3),
        ("surprise", 3),
    ],
)
def test_a_foreign_summary_is_damage_or_a_row_never_a_crash(tmp_path, key, value):
    good, odd = write_run(tmp_path, "m", "good"), write_run(tmp_path, "m", "odd")
    edit(odd, **{key: value})
    rows = read_rows([good, odd])
    assert len(rows.decoders) == len(rows.unfinished) == 1
    assert "summary.json" in rows.unfinished[0].error and key in rows.unfinished[0].error
    assert str(markdown_table(rows)) and latex_table(rows) and csv_table(rows) and printed(rows, 100)


def test_unfinished_runs_keep_their_state_and_error(tmp_path):
    runs = [Run.create(tmp_path, RunConfig((f"m:{name}",))) for name in ("new", "running", "failed")]
    runs[1].set_state("running")
    runs[2].set_state("failed", error="loss is nan at epoch 3")
    rows = read_rows([*runs, write_run(tmp_path, "m", "done")])
    assert [(u.state, u.error) for u in rows.unfinished] == [
        ("new", ""), ("running", ""), ("failed", "loss is nan at epoch 3"),
    ]  # fmt: skip
    records = list(csv.DictReader(io.StringIO(csv_table(rows))))
    assert [r["state"] for r in records] == ["done", "new", "running", "failed"]
    assert "loss is nan at epoch 3" in printed(rows, 200)


def test_no_finished_run_is_an_error_that_says_what_is_wrong(tmp_path):
    run = Run.create(tmp_path, RunConfig(("m:l",)))
    run.set_state("failed", error="the disk is full")
    with pytest.raises(AfterimageError, match=r"no finished run.*\n.*failed: the disk is full"):
        read_rows([run])
    with pytest.raises(AfterimageError, match="no run to report"):
        read_rows([])


def test_importing_brings_no_heavy_library():
    code = "import sys; import afterimage.report\nprint(*({'torch', 'matplotlib', 'rich', 'scipy'} & set(sys.modules)))"
    heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert heavy == []


def test_decoders_that_are_not_above_the_mean_colour_are_warned_of(tmp_path):
    write_run(tmp_path, "m", "good", features=(64, 56, 0.8))
    write_run(tmp_path, "m", "low", features=(64, 56, -0.2))
    write_run(tmp_path, "m", "control", features=(64, 56, -0.2), weights="random")
    write_baseline(tmp_path, "jpeg-50")
    assert not any("mean colour" in warning for warning in read_rows(scan(tmp_path)).warnings)
    write_baseline(tmp_path, "mean")
    (warning,) = [w for w in read_rows(scan(tmp_path)).warnings if "mean colour" in w]
    assert warning.startswith("1 decoder row is not above the mean colour in PSNR (m:low · linear)")


def test_encoders_have_short_names_where_these_tell_them_apart():
    models = [
        "resnet18.tv_in1k",
        "vit.a",
        "vit.b",
        "python//home/me/mine.py:factory",
        "python/package.module:factory",
    ]
    models += ["transformers//data/dino", "transformers//other/dino", "torchvision/resnet50.IMAGENET1K_V2"]
    assert list(short_names(models).values()) == [
        *("resnet18", "vit.a", "vit.b", "mine.py:factory", "python/package.module:factory"),
        *("transformers//data/dino", "transformers//other/dino", "torchvision/resnet50"),
    ]


def test_a_whole_number_in_a_file_of_scores_is_a_score(tmp_path):
    run = shift(write_run(tmp_path, "m", "layer1", count=1), ssim=1.0)
    text = run.file("scores.csv").read_text()
    assert ",1.0," in text
    run.file("scores.csv").write_text(text.replace(",1.0,", ",1,"))
    assert type(run.result.per_image[0]["ssim"]) is float


def test_scores_that_the_summary_does_not_hold_are_an_error_that_names_both_files(tmp_path):
    run = write_run(tmp_path, "m", "layer1")
    text = run.file("scores.csv").read_text()
    run.file("scores.csv").write_text("\n".join(text.splitlines()[:-1]) + "\n")
    with pytest.raises(AfterimageError, match="20 images were scored, 19 are listed") as error:
        assert run.result
    assert all(str(run.file(name)) in str(error.value) for name in ("summary.json", "scores.csv"))
    run.file("scores.csv").write_text(text)
    edit(run, scores__ssim__mean=0.99)
    with pytest.raises(
        AfterimageError, match=r"do not agree about ssim: the mean is 0\.99, that of the images"
    ):
        assert run.result
