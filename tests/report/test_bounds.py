"""The measured bound in a report: decoders paired with what was found from their answers, and the table of both."""

import json

import numpy as np
import pytest
from PIL import Image

from afterimage.cli.shared import print_table
from afterimage.config import AfterimageError
from afterimage.evaluation.intervals import mean_interval
from afterimage.report.bounds import bounds_of, comparison_rows, main_bounds
from afterimage.report.figures.curves import saturation
from afterimage.report.figures.depth import bound_by_depth
from afterimage.report.figures.image_grid import LARGE, bound_images
from afterimage.report.findings import compute_findings
from afterimage.report.format import Finding, markdown_finding
from afterimage.report.inversion import bound_findings, bound_rows, print_bounds
from afterimage.report.reading import read_rows
from afterimage.report.rows import Row
from afterimage.report.tables import markdown_table
from afterimage.report.write import write_report
from afterimage.runs.files import write_csv
from afterimage.runs.results import METRICS
from drawn_text import faults, texts
from page_in_browser import find, pixels, shown, write_page
from report_study import RESNET, VIT, sample_image, write_baseline, write_fused, write_run
from simulated_runs import edit, search

pytest_plugins = ("page_fixtures",)

REFINED, ESTIMATE = {"psnr": 0.6, "ssim": -0.02, "lpips": -0.2}, {"psnr": 1.8, "ssim": 0.04, "lpips": -0.1}


@pytest.fixture
def decoder(tmp_path):
    return write_run(tmp_path, RESNET[0], "layer3", features=RESNET[1]["layer3"])


def lines(runs) -> list[tuple[str, ...]]:
    (finding,) = bound_findings(bounds_of(read_rows(runs)))
    (table,) = finding.tables
    assert all(len(line) == len(table.header) for line in table.rows)
    return list(table.rows)


def test_a_decoder_is_paired_with_what_was_found_from_it_on_the_same_images(decoder):
    refined, estimate = search(decoder, "refined", REFINED), search(decoder, "estimate", ESTIMATE, loss=0.1)
    rows = read_rows([refined, estimate, decoder])
    assert [row.run for row in rows.decoders] == [decoder] and {r.run for r in rows.inversions} == {
        refined,
        estimate,
    }
    (bound,) = bounds_of(rows)
    assert (bound.refined.run, bound.estimate.run, bound.decoder.run) == (refined, estimate, decoder)
    first = decoder.result.per_image[:4]
    assert bound.decoder.values("psnr") == {row["id"]: row["psnr"] for row in first}
    assert bound.decoder.scores["psnr"].mean == pytest.approx(np.mean([row["psnr"] for row in first]))
    assert bound.best("psnr") is bound.estimate and bound.best("lpips") is bound.refined
    assert list(bound.gap_to_decoder("lpips").values()) == pytest.approx([-0.2] * 4)
    assert list(bound.gap_to_decoder("ssim").values()) == pytest.approx([0.04] * 4)


def test_the_table_has_every_answer_with_intervals_and_its_feature_distance(decoder):
    runs = [
        decoder,
        search(decoder, "refined", REFINED, loss=0.011),
        search(decoder, "estimate", ESTIMATE, loss=0.12),
    ]
    name, *found = zip(*lines(runs), strict=True)
    assert name == ("resnet34 layer3", "", "", "") and found[-1] == ("4",) * 4
    assert found[0] == ("decoder linear", "best estimate", "most consistent", "bound − decoder")
    assert found[-2] == ("0.5", "0.12", "0.011", "")
    psnr = np.array([row["psnr"] for row in decoder.result.per_image[:4]])
    for text, gain in zip(found[1][:3], (0, 1.8, 0.6), strict=True):
        mean = mean_interval(psnr + gain)
        assert text == f"{mean.estimate:.2f} [{mean.low:.2f}, {mean.high:.2f}]"
    assert found[1][3] == "+1.80 [+1.80, +1.80]" and found[3][3] == "−0.200 [−0.200, −0.200]"


def test_a_bound_below_its_decoder_is_said_to_be_none(decoder):
    def told(gains):
        runs = [decoder, search(decoder, "refined", REFINED), search(decoder, "estimate", gains)]
        (finding,) = bound_findings(bounds_of(read_rows(runs)))
        return [text for text in finding.paragraphs if text.startswith("Below the decoder in the mean")]

    (text,) = told(ESTIMATE | {"psnr": -3.0})
    assert "mean: PSNR for resnet34 layer3 (linear). There" in text
    assert not told(ESTIMATE)


def test_what_owes_nothing_to_the_features_stands_beside_the_bound(decoder):
    refined = search(decoder, "refined", REFINED)
    score = {
        metric: {"mean": value, "std": 1.0, "count": 4}
        for metric, value in zip(METRICS, (9.5, 0.1, 0.7), strict=True)
    }
    alone = score | {"psnr": {"mean": 12.25, "std": 1.0, "count": 4}}
    controls = {
        "other_image": score,
        "prior_alone": alone,
        "identified": 0.75,
        "distance": "lpips",
        "candidates": 4,
    }
    edit(refined, inversion__controls=controls)
    (finding,) = bound_findings(bounds_of(read_rows([decoder, refined])))
    _, table = finding.tables
    ((name, answer, *cells, found),) = table.rows
    assert (name, answer, found) == ("resnet34 layer3", "most consistent", "3 of 4 by lpips")
    psnr = refined.result.scores["psnr"].mean
    assert cells[:3] == [f"{psnr:.2f}", "9.50", "12.25"] and cells[-2:] == ["0.700", "0.700"]
    assert len(table.header) == len(table.rows[0])


@pytest.mark.parametrize("part", ["decoder_alone__scores", "controls__other_image"])
def test_a_part_without_a_metric_is_one_error_that_names_it(decoder, part):
    refined = search(decoder, "refined", REFINED)
    score = {metric: {"mean": 1.0, "std": 1.0, "count": 4} for metric in METRICS if metric != "ssim"}
    edit(
        refined,
        inversion__controls={
            "other_image": None, "prior_alone": None, "identified": 1.0, "distance": "lpips", "candidates": 4,
        },
    )  # fmt: skip
    edit(refined, **{f"inversion__{part}": score})
    with pytest.raises(AfterimageError, match=f"there is no {part.replace('__', '.')}.ssim"):
        assert refined.result


@pytest.mark.parametrize(("ways", "answers"), [
    (("refined",), ("decoder linear", "most consistent", "bound − decoder")),
    (("estimate",), ("decoder linear", "best estimate", "bound − decoder")),
    (("inversion",), ("most consistent, from grey",)),
])  # fmt: skip
def test_what_there_is_is_shown(decoder, ways, answers):
    runs = [decoder, *(search(decoder, way, REFINED) for way in ways)]
    assert tuple(line[1] for line in lines(runs)) == answers
    (finding,) = bound_findings(bounds_of(read_rows(runs)))
    text = " ".join(finding.paragraphs)
    assert ("most consistent image" in text, "best estimate" in text) == (
        ways != ("estimate",),
        ways == ("estimate",),
    )
    assert ("From the decoders to the measured bound" in text) == (ways != ("inversion",))


def test_without_inversions_nothing_is_said(decoder):
    assert bound_findings(bounds_of(read_rows([decoder]))) == []


def test_other_images_of_the_same_names_are_not_the_decoders_own(decoder):
    found = search(decoder, "refined", REFINED)
    edit(found, inversion__decoder_alone__scores__psnr__mean=decoder.result.scores["psnr"].mean + 3)
    (bound,) = bounds_of(read_rows([decoder, found]))
    assert bound.decoder.values("psnr") == {} and bound.gap_to_decoder("psnr") == {}
    answers = lines([decoder, found])
    assert [line[1] for line in answers] == ["decoder linear", "most consistent"] and "[" not in answers[0][2]


def test_a_decoder_that_is_not_in_the_report_has_means_without_intervals(decoder):
    found = search(decoder, "refined", REFINED)
    alone = found.result.inversion.decoder_alone.scores["psnr"].mean
    first, second = lines([found])
    assert (first[1], first[2]) == ("decoder linear", f"{alone:.2f}") and second[2].startswith(
        f"{alone + 0.6:.2f} ["
    )


def test_of_several_searches_the_one_whose_features_fit_best_is_the_most_consistent(decoder):
    few, many = (search(decoder, "refined", REFINED, steps=s, loss=1 / s) for s in (50, 800))
    (bound,) = bounds_of(read_rows([decoder, many, few]))
    assert bound.refined.run == many
    wide = search(decoder, "refined", REFINED, count=8)
    bounds = bounds_of(read_rows([decoder, many, wide]))
    assert [bound.count for bound in bounds] in ([4, 8], [8, 4]) and [
        b.count for b in main_bounds(bounds)
    ] == [8]


def test_distances_of_another_lpips_network_are_not_paired(decoder):
    found = search(decoder, "refined", REFINED)
    edit(found, lpips__net="squeeze")
    (bound,) = bounds_of(read_rows([decoder, found]))
    assert bound.gap_to_decoder("lpips") == {} and len(bound.gap_to_decoder("psnr")) == 4


def test_the_main_table_leaves_out_what_was_measured_on_few_images(decoder, tmp_path):
    found = search(decoder, "refined", REFINED)
    rows = read_rows([decoder, found, write_baseline(tmp_path, "mean")])
    assert "refined" not in markdown_table(rows) and not any(
        "do not compare" in text for text in rows.warnings
    )
    assert rows.with_inversions == (*rows.all, *rows.inversions)
    alone = read_rows([found])
    assert alone.decoders == alone.inversions == alone.with_inversions and "refined" in markdown_table(alone)


def test_the_report_opens_with_the_bound_and_says_how_each_was_made(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_: iter(()))
    found = search(decoder, "refined", REFINED)
    text = write_report([decoder, found], tmp_path / "out")["report.md"].read_text()
    assert (
        text.index("## What a layer keeps") < text.index("## Results") and f"{found.name}/config.toml" in text
    )
    assert "`afterimage invert" in text


def test_the_table_is_open_in_markdown_however_many_layers_there_are(tmp_path):
    runs = []
    for i in range(8):
        runs.append(write_run(tmp_path, "m", f"layer{i}", order=i))
        runs.append(search(runs[-1], "refined", REFINED))
    (finding,) = bound_findings(bounds_of(read_rows(runs)))
    text = "".join(markdown_finding(finding))
    assert "<details>" not in text and len(finding.tables[0].rows) == 24
    assert "The answers to the same test images, mean \\[95 % BCa interval\\]:\n\n| features" in text


def test_bounds_of_the_command_line_have_estimates_without_a_curve(decoder):
    found = read_rows([search(decoder, way, {}) for way in ("estimate", "refined", "inversion")]).inversions
    rows = bound_rows(found)
    assert [row["way"] for row in rows] == ["decoder", "estimate", "inversion", "refined"]
    assert [row["peak_passes"] for row in rows] == [None, None, 200, 200]
    assert [row["feature_loss"] for row in rows][:2] == [0.5, 0.01]


def test_a_search_whose_curve_was_not_kept_has_no_peak_and_no_line(decoder):
    whole, lost = search(decoder, "refined", {}), search(decoder, "inversion", {})
    lost.file("curve.csv").unlink()
    rows = read_rows([decoder, whole, lost])
    assert [row["peak_passes"] for row in bound_rows(rows.inversions)] == [None, None, 200]
    (drawing,) = saturation(rows)
    assert drawing.caption.endswith("1 search without curve.csv left out.")
    assert saturation(read_rows([decoder, lost])) == []


def layers(tmp_path, gains, *, ways=("refined",), decoders=("linear",), originals=()):
    """Runs of two layers of two encoders and what was found from them; `gains[way]` is of every layer."""
    runs = []
    for model, names in (RESNET, VIT):
        for order, (layer, features) in enumerate(list(names.items())[:2]):
            for decoder in decoders:
                run = write_run(
                    tmp_path, model, layer, decoder, features=features, order=order, originals=originals
                )
                runs += [run, *(search(run, way, gains[way], images=saved(run, way)) for way in ways)]
    return runs


def saved(run, way):
    """The run's saved images as an inversion's, each way in a shade of its own."""
    shade = 40 if way == "refined" else 200
    return [
        (name, np.asarray(Image.open(original)), np.full_like(np.asarray(Image.open(original)), shade))
        for name, original, _ in run.images[:4]
    ]


def drawn(axes) -> dict[str, list[np.ndarray]]:
    """The heights of each curve of a panel by its name."""
    found = {}
    for container in axes.containers:
        if hasattr(container, "lines"):
            found.setdefault(container.get_label(), []).append(
                np.asarray(container.lines[0].get_ydata(), float)
            )
    return found


def test_the_band_lies_between_the_decoder_and_the_bound_of_each_metric(tmp_path):
    gains = {"refined": REFINED, "estimate": ESTIMATE}
    rows = read_rows(layers(tmp_path, gains, ways=("refined", "estimate")))
    (drawing,) = bound_by_depth(rows)
    assert faults(drawing.figure) == [] and "same 4 test images" in drawing.caption
    assert "what this decoder missed" in [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    for axes, (metric, kind, gain) in zip(drawing.figure.axes, (
        ("psnr", "best estimate", 1.8), ("ssim", "best estimate", 0.04), ("lpips", "most consistent image", -0.2),
    ), strict=True):  # fmt: skip
        curves = drawn(axes)
        assert set(curves) == {"decoder linear", kind}
        means = [row.decoder.scores[metric].mean for row in bounds_of(rows)]
        assert np.concatenate(curves["decoder linear"]) == pytest.approx(means)
        assert np.concatenate(curves[kind]) == pytest.approx(np.add(means, gain))
        bands = [
            path for band in axes.collections if len(path := band.get_paths()) and band.get_zorder() == 0.5
        ]
        heights = np.concatenate([path.vertices[:, 1] for paths in bands for path in paths])
        ends = min(means) + min(gain, 0), max(means) + max(gain, 0)
        assert (heights.min(), heights.max()) == pytest.approx(ends)


def test_where_nothing_found_is_better_there_is_no_band(tmp_path):
    (drawing,) = bound_by_depth(
        read_rows(layers(tmp_path, {"refined": {"psnr": 1.0, "ssim": -0.02, "lpips": 0.1}}))
    )
    filled = [
        [len(b.get_paths()) for b in axes.collections if b.get_zorder() == 0.5]
        for axes in drawing.figure.axes
    ]
    assert filled == [[1, 1], [0, 0], [0, 0]]


def test_each_decoder_has_a_figure_of_its_own(tmp_path):
    rows = read_rows(layers(tmp_path, {"refined": REFINED}, decoders=("linear", "attention")))
    first, second = bound_by_depth(rows)
    assert ("attention" in first.title, "linear" in second.title) == (True, True), (
        "the better one comes first"
    )
    assert (first.name, second.name, second.folded) == ("kept-by-depth", "kept-by-depth-2", True)
    assert bound_by_depth(read_rows([row.run for row in rows.decoders])) == []


def test_one_walks_from_the_original_to_the_bound(visit, tmp_path):
    gains, originals = {"refined": REFINED, "estimate": ESTIMATE}, [sample_image(seed) for seed in range(5)]
    runs = layers(tmp_path, gains, ways=("refined", "estimate"), originals=originals)
    path = write_page(runs, tmp_path / "page.html", title="t")
    tab = visit(path)
    assert tab.get_attribute("#viewer", "data-view") == "bound"
    assert tab.eval_on_selector_all("#panes figure", "nodes => nodes.map(n => n.id)") == [
        "pane-original", "pane-a", "pane-estimate", "pane-refined",
    ]  # fmt: skip
    tab.focus("#pane-a .stage")
    tab.keyboard.press("ArrowRight")
    shown(tab, "image-000. resnet34 · layer2 · linear")
    decoder = find(runs, "resnet34.tv_in1k:layer2 · linear")
    assert np.array_equal(pixels(tab, "#pane-a canvas"), np.asarray(Image.open(decoder.images[0][2])))
    assert (pixels(tab, "#pane-refined canvas") == 40).all() and (
        pixels(tab, "#pane-estimate canvas") == 200
    ).all()
    psnr = decoder.result.per_image[0]["psnr"]
    for key, gain, distance in (("a", 0, "0.5"), ("estimate", 1.8, "0.01"), ("refined", 0.6, "0.01")):
        words = tab.inner_text(f"#pane-{key} .scores")
        assert f"{psnr + gain:.2f} dB" in words and words.endswith(distance), words
        assert (f"{gain:+.2f} to A" in words) == (key != "a")
        assert f"{psnr + gain:.2f} dB" in tab.inner_text("#announce")
    tab.locator("#strip button").nth(4).click()
    shown(tab, "image-004.")
    assert "There is no best estimate of this image" in tab.inner_text("#pane-estimate")
    assert tab.inner_text("#pane-refined figcaption").startswith("Most consistent")
    tab.focus("#pane-a .stage")
    for key, name in (("1", "layers"), ("4", "bound")):
        tab.keyboard.press(key)
        tab.wait_for_selector(f"#viewer[data-view={name}]")
    assert tab.locator("#table tbody tr").count() == 4 and tab.locator("#depth-chart .point").count() == 4
    # A bar a layer and a band between two, from the decoder to its bound on the bound's images.
    assert tab.locator("#depth-chart rect.missed").count() == 4
    told = tab.locator("#depth-chart rect.missed title").all_text_contents()
    assert all(text.endswith("missed 1.80 dB PSNR on 4 images") for text in told), told
    assert tab.locator("#depth-chart path.missed").count() == 2, "two encoders"
    tab.select_option("#metric", "lpips")
    assert "missed 0.200 LPIPS" in tab.locator("#depth-chart rect.missed title").first.text_content()
    assert "what a decoder missed" in tab.inner_text("#charts")

    phone = visit(path, 390, 844, has_touch=True, is_mobile=True)
    assert phone.get_attribute("#viewer", "data-view") == "bound"
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [
        phone.locator(f"#pane-{key} .stage").bounding_box()
        for key in ("original", "a", "estimate", "refined")
    ]
    assert len({box["x"] for box in boxes}) == len({box["y"] for box in boxes}) == 2, "two rows of two"


def test_the_page_shows_what_there_is(visit, tmp_path):
    originals = [sample_image(0)]
    tab = visit(
        write_page(
            layers(tmp_path, {"refined": REFINED}, originals=originals), tmp_path / "a.html", title="t"
        )
    )
    assert tab.locator("#panes figure").count() == 3 and tab.locator("#pane-estimate").count() == 0
    bottom = tab.locator("#choosers").bounding_box()
    assert bottom["y"] + bottom["height"] <= 900, "images, scores and the layers' slider fit the first screen"
    run = write_run(tmp_path / "other", "m", "layer1", originals=originals)
    tab = visit(write_page([run], tmp_path / "b.html", title="t"))
    assert (
        tab.get_attribute("#viewer", "data-view") == "layers"
        and tab.locator("input[value=bound]").count() == 0
    )
    found = search(run, "refined", REFINED, images=saved(run, "refined"))
    tab = visit(write_page([found], tmp_path / "c.html", title="t"))
    assert tab.get_attribute("#viewer", "data-view") == "layers" and "refined" in tab.inner_text("#table")


def test_the_bound_comes_first_on_the_page(decoder, tmp_path):
    finding = Finding("What is kept", paragraphs=("more",), wide=True)
    path = write_page([decoder], tmp_path / "p.html", title="t", bounds=[finding], findings=[Finding("H1")])
    text = path.read_text()
    assert text.index("<h3>What is kept</h3>") < text.index('id="charts"') < text.index("<h3>H1</h3>")


def judged(tmp_path, gains) -> list[Finding]:
    """The findings of three layers whose decoder falls by 2 dB a step, with a bound of 20 images that much above it."""
    runs = []
    for i, gain in enumerate(gains):
        runs.append(write_run(tmp_path, "m", f"layer{i}", features=(8, 14, 0.9 - i / 7), order=i, lpips=None))
        runs.append(search(runs[-1], "refined", {"psnr": gain}, count=20))
    rows = read_rows(runs)
    found = compute_findings(rows.all, bounds_of(rows))
    assert (
        found.problems == () and {"decoders_beside_bound", "measured_bound"} < json.loads(found.json).keys()
    )
    return list(found.findings)


def test_quality_falls_with_depth_only_where_the_bound_falls_too(tmp_path):
    (h1, *_) = judged(tmp_path / "both", (5, 5, 5))
    assert h1.verdict == "supported"
    assert "Quality falls with depth (PSNR, linear): the measured bound does too." in h1.paragraphs
    (h1, *_) = judged(tmp_path / "one", (1, 5, 9))
    assert h1.verdict == "supported for decoders, contradicted for the measured bound"
    text = " ".join(h1.paragraphs)
    assert (
        "decoder's score falls with depth, the measured bound does not (PSNR, linear): contradicted" in text
    )
    assert "Quality falls with depth (PSNR" not in text
    verdicts, steps = h1.tables[:2]
    assert verdicts.rows[0] == ("PSNR", "linear", "supported", "supported", "contradicted")
    assert [row[3] for row in steps.rows[:2]] == ["layer0 → layer1", "layer1 → layer2"]
    assert all(row[4].startswith("−") and row[5].startswith("+") for row in steps.rows[:2])


def test_without_a_bound_depth_is_about_decoders(tmp_path):
    runs = [write_run(tmp_path, "m", f"l{i}", features=(8, 14, 0.9 - i / 4), order=i) for i in range(2)]
    (h1, *_) = compute_findings(read_rows(runs).all).findings
    assert h1.verdict == "supported" and "a measured bound can tell" in h1.paragraphs[1]
    assert "Quality falls" not in " ".join(h1.paragraphs)


def test_too_few_images_say_nothing_against_a_decoder(tmp_path):
    runs = []
    for i in range(2):
        runs.append(write_run(tmp_path, "m", f"layer{i}", features=(8, 14, 0.9 - i / 7), order=i, lpips=None))
        runs.append(search(runs[-1], "refined", {"psnr": 1.0}, count=2))
    rows = read_rows(runs)
    (h1, *_) = compute_findings(rows.all, bounds_of(rows)).findings
    assert "too few to tell (PSNR, linear)" in " ".join(h1.paragraphs)


def test_a_bound_bounds_psnr_by_the_estimate_and_lpips_by_the_consistent_image(decoder):
    runs = [decoder, search(decoder, "refined", REFINED), search(decoder, "estimate", ESTIMATE)]
    (alone,), (best,) = comparison_rows(bounds_of(read_rows(runs)))
    for metric, gain in (("psnr", 1.8), ("ssim", 0.04), ("lpips", -0.2)):
        pairs = zip(alone.values(metric).values(), best.values(metric).values(), strict=True)
        assert [b - a for a, b in pairs] == pytest.approx([gain] * 4)
        assert best.scores[metric].mean == pytest.approx(alone.scores[metric].mean + gain)


def test_the_grid_shows_the_same_photographs_a_column_a_layer_and_a_row_an_answer(tmp_path):
    gains, originals = {"refined": REFINED, "estimate": ESTIMATE}, [sample_image(seed) for seed in range(3)]
    runs = layers(tmp_path, gains, ways=("refined", "estimate"), originals=originals)
    (drawing,) = bound_images(read_rows(runs))
    assert drawing.name == "kept" and faults(drawing.figure) == []
    shown = [image.get_array() for image in drawing.figure.axes[0].images]
    assert len(shown) == 2 * (1 + 3 * 4), "two photographs: the original and three answers of four layers"
    decoders = [run for run in runs if run.result.kind == "decoder"]
    for photo, images in enumerate((shown[:13], shown[13:])):
        assert (images[0] == np.asarray(originals[photo])).all()
        for image, run in zip(images[1:5], decoders, strict=True):
            assert (image == np.asarray(Image.open(run.images[photo][2]))).all()
        assert {int(image.max()) for image in images[5:9]} == {200} and {
            int(i.max()) for i in images[9:]
        } == {40}
    words = [text.get_text() for text in texts(drawing.figure)]
    assert (
        words.count("decoder linear") == words.count("best estimate") == words.count("most consistent") == 2
    )
    psnr, lpips = (decoders[0].result.per_image[0][metric] for metric in ("psnr", "lpips"))
    assert f"{psnr:.1f} dB, {lpips:.2f}" in words and f"{psnr + 1.8:.1f} dB, {lpips - 0.1:.2f}" in words


def test_what_was_not_saved_has_an_empty_cell_and_many_layers_several_figures(tmp_path):
    originals, runs = [sample_image(0)], []
    for i in range(9):
        runs.append(
            write_run(
                tmp_path, "m", f"layer{i}", order=i, features=(8, 14, 0.9 - i / 12), originals=originals
            )
        )
        runs.append(search(runs[-1], "refined", REFINED, images=saved(runs[-1], "refined")))
    runs[0].file("reconstructions/000.png").write_bytes(b"no image")
    first, second = bound_images(read_rows(runs))
    assert (first.name, second.name, second.folded) == ("kept", "kept-2", True) and "(2 of 2)" in second.title
    assert [len(drawing.figure.axes[0].images) for drawing in (first, second)] == [1 + 2 * 5 - 1, 1 + 2 * 4]
    assert [t.get_text() for t in texts(first.figure)].count("not saved") == 1
    seven = bound_images(read_rows(runs[:14]))
    assert len(seven) == 1 and LARGE / 72 * 900 / seven[0].figure.get_figwidth() > 10, (
        "readable at 900 pixels"
    )
    assert (
        bound_images(read_rows(runs[::2]))
        == []
        == bound_images(read_rows([write_run(tmp_path / "x", "m", "l")]))
    )


def test_the_terminal_shows_bounds_below_the_table(decoder, capsys):
    found = search(decoder, "refined", REFINED)
    print_table([decoder, found])
    table, bounds = capsys.readouterr().out.split("measured lower bounds")[0].split("feature loss")
    assert "refined" not in table and f"{found.result.scores['psnr'].mean:.2f}" in bounds
    print_table([decoder])
    assert "feature loss" not in capsys.readouterr().out


def test_a_bound_of_another_decoder_is_left_out_and_named(decoder, tmp_path):
    refined, estimate = search(decoder, "refined", REFINED), search(decoder, "estimate", ESTIMATE)
    edit(refined, inversion__start_sha256="ab" * 32)
    rows = read_rows([decoder, refined, estimate])
    (bound,) = bounds_of(rows)
    assert (bound.refined, bound.estimate.run) == (None, estimate) and len(rows.with_inversions) == 2
    (told,) = [text for text in rows.warnings if "left out" in text]
    assert refined.name in told and decoder.name in told and "SHA-256 abababababab then, unknown now" in told
    report = write_report([decoder, refined], tmp_path / "out")["report.md"].read_text()
    assert "What a layer keeps" not in report and "it started from another decoder" in report


def test_of_runs_of_one_name_the_decoder_that_was_used_is_taken(decoder, tmp_path):
    found = search(decoder, "refined", REFINED)
    other = write_run(tmp_path / "other", RESNET[0], "layer3", features=RESNET[1]["layer3"], seed=42)
    assert other.name == decoder.name
    edit(other, training__decoder_sha256="cd" * 32)
    (bound,) = bounds_of(read_rows([decoder, other, found]))
    assert bound.decoder.run == decoder


def test_scores_are_paired_on_the_same_images_alone(decoder):
    found = search(decoder, "refined", REFINED, count=20)
    (bound,) = bounds_of(read_rows([decoder, found]))
    assert len(bound.gap_to_decoder("psnr")) == 20
    edit(found, data__test_digest="of other images")
    (bound,) = bounds_of(read_rows([decoder, found]))
    assert bound.decoder.run == decoder and bound.gap_to_decoder("psnr") == {}


def test_a_bound_may_have_a_metric_that_only_some_decoders_have(tmp_path):
    runs = []
    for i in range(4):
        run = write_run(tmp_path, "m", f"layer{i}", features=(8, 14, 0.9 - i / 7), order=i, lpips="squeeze")
        runs += [run, search(run, "refined", REFINED, count=20)]
        if i < 2:
            write_csv(run.file("scores.csv"), [{**row, "lpips": None} for row in run.result.per_image])
            status = {"net": "alex", "available": False, "reason": "no weights", "weights": None}
            edit(run, scores__lpips=None, lpips=status)
    rows = read_rows(runs)
    found = compute_findings(rows.all, bounds_of(rows))
    assert found.problems == ()
    assert not any("(LPIPS, linear)" in text for text in found.findings[0].paragraphs)
    verdicts, steps = found.findings[0].tables[:2]
    assert [row[0] for row in verdicts.rows] == ["PSNR", "SSIM", "LPIPS"] and verdicts.rows[2][3] == "–"
    assert [row[0] for row in steps.rows] == ["PSNR"] * 3 + ["SSIM"] * 3


def test_a_fused_bound_has_the_letter_and_the_text_of_its_decoder(tmp_path):
    sources = (f"{RESNET[0]}:layer1", f"{VIT[0]}:blocks.0")
    fused = write_fused(tmp_path, sources, [sample_image(0)])
    rows = read_rows([fused, search(fused, "refined", REFINED), search(fused, "inversion", REFINED)])
    refined, grey = sorted(rows.inversions, key=lambda row: row.fusion_letter)
    (decoder,) = rows.decoders
    assert refined.fusion_letter == decoder.fusion_letter == "A" and grey.fusion_letter == "B"
    assert refined.fusion_text == decoder.fusion_text == "attention fusion, 256 channels at 8×8"
    assert grey.fusion_text == "joint inversion"


def test_bounds_of_several_seeds_name_theirs(tmp_path, capsys):
    runs = []
    for seed in (1, 2):
        run = write_run(tmp_path, RESNET[0], "layer3", features=RESNET[1]["layer3"], seed=seed)
        runs += [run, search(run, "refined", REFINED)]
    assert [line[0] for line in lines(runs)][::3] == ["resnet34 layer3, seed 1", "resnet34 layer3, seed 2"]
    print_table(runs)
    told = capsys.readouterr().out
    assert "linear + refined, seed 1" in told and "decoder, seed 2" not in told
    print_bounds([row for row in map(Row.from_run, runs) if row.inversion])
    assert f"linear + refined, from {runs[0].name[-8:]}" in capsys.readouterr().out
