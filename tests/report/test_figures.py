"""Rows -> figures: what they show, that nothing is clipped or overlaps, that they repeat byte for byte."""

import io
import math
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from PIL import Image

from afterimage.config import FusionConfig
from afterimage.report.figures import draw, render
from afterimage.report.figures.image_grid import highest_contrast_square
from afterimage.report.reading import read_rows
from afterimage.runs.run import scan
from drawn_text import faults, texts
from report_study import RESNET, VIT, sample_image, write_baseline, write_fused, write_run, write_study
from simulated_runs import edit


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two encoders, two decoders, random weights, a fusion, baselines."""
    root, originals = tmp_path_factory.mktemp("figures"), [sample_image(0)]
    write_study(root, originals=originals, count=8)
    write_run(root, RESNET[0], "layer1", weights="random", originals=originals, count=8)
    sources = (f"{RESNET[0]}:layer1", f"{VIT[0]}:blocks.0")
    write_run(root, "", "", "transposed", sources=sources, fusion=FusionConfig(size=28), count=8, loss="l1")
    return read_rows(scan(root))


@pytest.fixture(scope="module")
def drawings(rows):
    return {drawing.name: drawing for drawing in draw(rows)}


def test_a_study_has_its_figures(drawings):
    grids = [
        "resnet34-linear", "resnet34-attention", "resnet34-random-weights", "vit_base_patch16_224",
        "baselines",
    ]  # fmt: skip
    assert list(drawings) == [
        "quality-by-depth", *(f"reconstructions-{g}" for g in grids),
        "quality-by-locations", "quality-by-parameters", "training-curves", "distributions",
    ]  # fmt: skip


def test_no_text_is_clipped_or_overlaps(drawings):
    found = {name: faults(drawing.figure) for name, drawing in drawings.items()}
    assert not any(found.values()), found


def test_the_check_for_faults_finds_them(drawings):
    figure = matplotlib.figure.Figure()
    figure.add_axes((0.2, 0.2, 0.6, 0.6)).text(0.5, 0.5, "one")
    assert faults(figure) == []
    figure.axes[0].text(0.51, 0.5, "two")
    figure.axes[0].text(1.3, 0.5, "a long text")
    assert [fault.partition(":")[0] for fault in faults(figure)] == ["clipped", "overlap"]


def test_many_encoders_with_long_names_fit(tmp_path):
    layers = {f"stages.{i}.blocks.{i}.norm": (64, 56 // 2**i, 0.9 - 0.2 * i) for i in range(2)}
    names = ("a_rather_long_name_of_an_architecture_v2", "x", "convnextv2_nano_with_a_long_name", "y_tiny")
    encoders = [(f"{name}.tag", layers) for name in names]
    encoders.append(("one_layer_only_patch16", {"l": (8, 7, 0.3)}))
    write_study(tmp_path, encoders=encoders, decoders=("attention",), count=6)
    originals = [sample_image(0)]
    for layer in layers:
        write_run(
            tmp_path, encoders[2][0], layer, "an_attention_of_another_kind", originals=originals, count=6
        )
    found = {d.name: faults(d.figure) for d in draw(read_rows(scan(tmp_path)))}
    assert found and not any(found.values()), found


def test_depth_draws_each_mean_at_its_layer_with_its_interval(rows, drawings):
    axes = drawings["quality-by-depth"].figure.axes[0]
    layers = [f"layer{i}" for i in range(1, 5)]
    labels = [label.get_text().partition("\n")[0] for label in axes.figure.axes[-1].get_xticklabels()]
    assert labels == [*layers, "blocks.0", "blocks.5", "blocks.11", "fusion A"]
    scores = [
        r.intervals["psnr"] for r in rows.decoders if (r.encoder, r.decoder) == (RESNET[0], "attention")
    ]
    container = next(
        c
        for c in axes.containers
        if c.get_label() == "attention" and len(c.lines[0].get_xdata()) == len(layers)
    )
    line, _, (bars,) = container.lines
    assert line.get_ydata() == pytest.approx([s.estimate for s in scores])
    reach = [segment[:, 1] for segment in bars.get_segments()]
    assert np.array(reach) == pytest.approx(np.array([(s.low, s.high) for s in scores]))
    ticks = axes.figure.axes[-1].get_xticks()
    assert np.asarray(line.get_xdata(), float) == pytest.approx(ticks[: len(layers)], abs=0.3)


def test_baselines_are_named_at_their_height(rows, drawings):
    axes = drawings["quality-by-depth"].figure.axes[0]
    assert {text.get_text() for text in axes.texts} >= {row.label for row in rows.baselines}
    heights = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert {round(row.scores["psnr"].mean, 9) for row in rows.baselines} <= {
        round(float(h), 9) for h in heights
    }


def test_training_is_in_decibels_for_mse_alone_and_marks_lower_rates(drawings):
    panels = {axes.get_title(): axes for axes in drawings["training-curves"].figure.axes}
    mse, other = panels["resnet34\nattention"], panels["fusion\ntransposed\nloss: l1"]
    assert ("PSNR" in mse.get_ylabel(), "PSNR" in other.get_ylabel()) == (True, False)
    drops = next(line for line in mse.lines if line.get_marker() == "v")
    assert list(drops.get_xdata()) == [15, 23]
    assert "8 of 16 rows have no epochs" in drawings["training-curves"].caption


def test_training_of_one_encoder_shares_a_range_that_fits_its_own_lines(tmp_path):
    for model, quality in (("high", 1.6), ("low", 0.2)):
        for decoder in ("attention", "residual"):
            write_run(tmp_path, model, "l", decoder, features=(64, 56, quality), count=4)
    (drawing,) = [d for d in draw(read_rows(scan(tmp_path))) if d.name == "training-curves"]
    first, second, third, fourth = (axes.get_ylim() for axes in drawing.figure.axes)
    assert first == second and third == fourth and first[0] > third[1]
    words = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert words[0] == "epoch that is kept", "none of them is the closed form"


def test_what_is_missing_is_left_out_and_said(tmp_path):
    runs = [write_run(tmp_path, "m", f"l{i}", lpips=None, features=(8, 7 * i, 0.5)) for i in (1, 2)]
    found = {drawing.name: drawing for drawing in draw(read_rows(runs))}
    assert list(found) == [
        "quality-by-depth", "quality-by-locations", "distributions",
    ]  # fmt: skip
    assert len(found["quality-by-depth"].figure.axes) == 2
    assert all("LPIPS is not available for any row" in drawing.caption for drawing in found.values())


def test_images_that_cannot_be_shown_are_said_to_be_missing(tmp_path):
    originals = [sample_image(0), sample_image(1)]
    good, bad = (write_run(tmp_path, "m", layer, originals=originals) for layer in ("l1", "l2"))
    bad.file("reconstructions/000.png").write_bytes(b"no image")
    Image.new("RGB", (64, 64)).save(bad.file("reconstructions/001.original.png"))
    whole = next(d for d in draw(read_rows([good, bad])) if d.name == "reconstructions")
    assert "2 images were not saved" in whole.caption
    assert [t.get_text() for t in texts(whole.figure)].count("not saved") == 2


def test_a_damaged_history_is_no_curve(tmp_path):
    run = write_run(tmp_path, "m", "l", "attention")
    for content in ("epoch,validation_loss\n1,x\n", "epoch\n1\n2\n", "epoch,validation_loss\n1,2,3\n1,2,3\n"):
        run.file("history.csv").write_text(content)
        assert not [d for d in draw(read_rows([run])) if d.name.startswith("training")]


def test_images_of_the_usual_size_are_printed_pixel_by_pixel(tmp_path):
    run = write_run(tmp_path, "m", "l", originals=[sample_image(3, 224)])
    whole = next(iter(draw(read_rows([run]))))
    png, _ = render(whole.figure)
    page, wanted = (
        np.asarray(Image.open(io.BytesIO(png)).convert("RGB")),
        np.asarray(Image.open(run.images[0][2])),
    )
    found = [
        (y, x)
        for y in range(page.shape[0] - 223)
        for x in range(page.shape[1] - 223)
        if (page[y, x] == wanted[0, 0]).all() and (page[y : y + 224, x : x + 224] == wanted).all()
    ]
    assert len(found) == 1


def test_a_detail_is_the_boxed_part_of_the_row_above_it(tmp_path):
    original = sample_image(3, 224)
    (drawing,) = (
        d for d in draw(read_rows([write_run(tmp_path, "m", "l", originals=[original])])) if "rec" in d.name
    )
    whole, detail, _, rebuilt = (image.get_array() for image in drawing.figure.axes[0].images)
    y, x, size = highest_contrast_square(np.asarray(original))
    assert (whole == np.asarray(original)).all() and (detail == whole[y : y + size, x : x + size]).all()
    assert rebuilt.shape == detail.shape and (rebuilt != detail).any()
    left, right, _, top = drawing.figure.axes[0].images[0].get_extent()
    pixel = (right - left) / 224
    for box in drawing.figure.axes[0].patches:
        assert (*box.get_xy(), box.get_width()) == pytest.approx(
            (left + x * pixel, top + y * pixel, size * pixel)
        )


def test_many_pages_show_fewer_images_and_are_folded(tmp_path):
    originals = [sample_image(seed) for seed in range(4)]
    for model in "abcde":
        for i in range(2):
            write_run(tmp_path, model, f"l{i}", originals=originals, count=4)
    found = [d for d in draw(read_rows(scan(tmp_path))) if d.name.startswith("reconstructions")]
    assert [d.folded for d in found] == [False, True, True, True, True]
    assert [len(d.figure.axes[0].images) for d in found] == [2 * 3 * 2] * 5


def test_hostile_names_draw(tmp_path):
    name = "<b>$\\frac{$ & 日本\n|"
    runs = [write_run(tmp_path, name, f"{name}{i}", name, originals=[sample_image(0)]) for i in range(2)]
    for drawing in draw(read_rows(runs)):
        png, svg = render(drawing.figure)
        assert Image.open(io.BytesIO(png)).info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert ET.fromstring(svg).tag.endswith("svg") and b"<dc:date>" not in svg
        assert not set(drawing.name) & set("<>$\\{}&|/ \n")


def test_names_that_make_the_same_file_name_keep_their_own_figures(tmp_path):
    for model in ("日本", "ブロック"):
        for i in range(5):
            write_run(tmp_path, model, f"l{i}", originals=[sample_image(0)])
    found = [drawing.name for drawing in draw(read_rows(scan(tmp_path)))]
    assert len(set(found)) == len(found) and sum(name.startswith("recon") for name in found) == 2


def test_baselines_alone_are_a_report(tmp_path):
    runs = [write_baseline(tmp_path, name, originals=[sample_image(0)]) for name in ("mean", "jpeg-50")]
    assert [d.name for d in draw(read_rows(runs))] == [
        "reconstructions-baselines", "distributions",
    ]  # fmt: skip


THREE = (f"{RESNET[0]}:layer1", f"{RESNET[0]}:layer2", f"{VIT[0]}:blocks.0")


def test_fusion_weights_are_maps_on_one_scale(tmp_path):
    run = write_fused(tmp_path, THREE, [sample_image(seed) for seed in range(4)])
    (drawing,) = (d for d in draw(read_rows([run])) if d.name.startswith("fusion"))
    page, bar = drawing.figure.axes
    assert faults(drawing.figure) == []
    assert len(page.images) == 3 * (2 + 3), "three images of four: original, reconstruction, a map a source"
    original, rebuilt, *maps = page.images[:5]
    assert (original.get_array() == np.asarray(Image.open(run.images[0][1]))).all()
    assert (rebuilt.get_array() == np.asarray(Image.open(run.images[0][2]))).all()
    for image, path in zip(maps, run.fusion_maps["image-000"], strict=True):
        assert np.allclose(image.get_array(), np.asarray(Image.open(path)) / 255)
        assert image.get_clim() == (0, 1) and bar.get_ylim() == (0, 1)
    words = [text.get_text() for text in texts(drawing.figure)]
    assert "resnet34\nlayer1\nmean weight 0.50" in words and words.count("0.25") == 6
    assert "an equal share would be 0.33" in drawing.caption and " + ".join(THREE) in drawing.caption
    png, svg = render(drawing.figure)
    assert Image.open(io.BytesIO(png)).width > 1000 and ET.fromstring(svg).tag.endswith("svg")


def test_fused_rows_with_and_without_maps(tmp_path):
    originals = [sample_image(0)]
    names = ["<b>$\\frac{$ & 日本\n|:layer", f"{RESNET[0]}:layer1"]
    runs = [write_fused(tmp_path, names, originals, seed=seed) for seed in (1, 2)]
    runs.append(
        write_run(tmp_path, "", "", sources=THREE, fusion=FusionConfig("concat"), originals=originals)
    )
    found = [d for d in draw(read_rows(runs)) if d.name.startswith("fusion")]
    assert [d.name for d in found] == ["fusion-weights-1", "fusion-weights-2"]
    assert [d.title[-6:] for d in found] == ["seed 1", "seed 2"] and not any(faults(d.figure) for d in found)
    runs[0].fusion_maps["image-000"][0].write_bytes(b"no image")
    assert sum(d.name.startswith("fusion") for d in draw(read_rows(runs))) == 1


def test_weights_that_do_not_fit_the_sources_are_damage(tmp_path):
    run = write_fused(tmp_path, THREE, [sample_image(0)])
    edit(run, fusion_weights=[0.5, 0.5])
    rows = read_rows([run, write_run(tmp_path, "m", "l")])
    assert "fusion_weights must have one value for each of 3 sources" in rows.unfinished[0].error


def test_progress_ends_at_its_total(tmp_path):
    seen = []
    list(draw(read_rows([write_run(tmp_path, "m", "l")]), lambda *a, **_: seen.append(a)))
    assert seen[0][1] == 0 and seen[-1][1] == seen[-1][2] == len(seen) - 1


def test_seeds_are_one_point(tmp_path):
    runs = [write_run(tmp_path, "m", "l", seed=seed) for seed in (42, 43)] + [write_run(tmp_path, "m", "l2")]
    depth = next(iter(draw(read_rows(runs))))
    (points,) = {len(c.lines[0].get_xdata()) for c in depth.figure.axes[0].containers}
    assert points == 2 and "2 seeds" in depth.caption


def test_legends_have_room_beside_few_layers(tmp_path):
    """Few layers make a narrow figure, many decoders a wide legend."""
    for decoder in ("linear", "transposed", "attention"):
        for weights in ("pretrained", "random"):
            for layer in ("layer1", "layer2"):
                write_run(tmp_path, RESNET[0], layer, decoder, weights=weights, count=4)
    write_baseline(tmp_path, "mean", count=4)
    for drawing in draw(read_rows(scan(tmp_path))):
        assert faults(drawing.figure) == [], drawing.name


def test_the_kept_epoch_is_marked_though_another_has_a_lower_loss(tmp_path):
    """What is kept may be the closed form that training began with, which has no history of its own."""
    run = write_run(tmp_path, RESNET[0], "layer1", "attention", count=4)
    other = write_run(tmp_path, RESNET[0], "layer2", "attention", count=4)
    edit(run, training__best_epoch=0, training__best_validation_loss=0.001)
    edit(other, training__best_epoch=2)
    (drawing,) = [d for d in draw(read_rows(scan(tmp_path))) if d.name == "training-curves"]
    assert "(0: the closed form" in drawing.figure.legends[0].get_texts()[0].get_text()
    rings = [line for line in drawing.figure.axes[0].lines if line.get_marker() == "o"]
    first, second = (tuple(line.get_xydata()[0]) for line in rings)
    assert first == (0, pytest.approx(30))
    assert second[0] == 2 and second[1] == pytest.approx(
        -10 * math.log10(other.history[1]["validation_loss"])
    )
