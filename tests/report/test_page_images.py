"""The page's images in a real browser: pixels, keys, wipe, zoom. Skips where there is no Chromium."""

import re

import numpy as np
import pytest
from PIL import Image

from afterimage.runs.files import read_json, write_json
from page_in_browser import HOSTILE, choose, find, pixels, shown, view, write_page
from report_study import VIT, sample_image, write_fused, write_run

pytest_plugins = ("page_fixtures",)


def test_first_screen_shows_images_and_their_scores(visit, study):
    runs, path = study
    tab = visit(path)
    choose(tab, "resnet34", "linear", 2)
    run = find(runs, "resnet34.tv_in1k:layer3 · linear")
    score = run.result.per_image[0]
    shown(
        tab, f"image-000. resnet34 · layer3 · linear: PSNR {score['psnr']:.2f} dB, SSIM {score['ssim']:.3f}"
    )
    assert f"{score['psnr']:.2f} dB" in tab.inner_text("#pane-a .scores")
    assert np.array_equal(pixels(tab, "#pane-original canvas"), np.asarray(Image.open(run.images[0][1])))
    assert np.array_equal(pixels(tab, "#pane-a canvas"), np.asarray(Image.open(run.images[0][2])))
    bottom = tab.locator("#choosers").bounding_box()
    assert bottom["y"] + bottom["height"] <= 900, "images, scores and the layers' slider fit the first screen"
    assert (
        tab.get_attribute("#pane-a canvas", "aria-label")
        == "image-000 reconstructed by resnet34 · layer3 · linear"
    )


def test_error_map_is_the_amplified_difference(visit, study):
    runs, path = study
    tab = visit(path)
    choose(tab, "resnet34", "linear", 3)
    shown(tab, "layer4")
    _, original, result = find(runs, "resnet34.tv_in1k:layer4 · linear").images[0]
    error = np.abs(np.asarray(Image.open(original), float) - np.asarray(Image.open(result), float)).mean(-1)
    colours = pixels(tab, "#pane-error-a canvas").astype(int)
    assert tuple(colours[error == error.min()][0]) < (60, 30, 90), "black where nothing differs"
    assert (colours[error * 4 > 255] == (252, 255, 164)).all() and (error * 4 > 255).any()
    brightness = colours.sum(-1)
    assert np.corrcoef(error[error * 4 < 255], brightness[error * 4 < 255])[0, 1] > 0.95
    tab.locator("#gain").fill("0")
    tab.wait_for_function("document.getElementById('gain-value').textContent === '1'")
    shown(tab, "layer4")
    tab.wait_for_function("document.querySelector('#pane-error-a .scale').textContent.includes('1.00')")
    assert pixels(tab, "#pane-error-a canvas").astype(int).sum() < 0.6 * colours.sum()


def test_keys_walk_through_layers_and_images(visit, study):
    tab = visit(study[1])
    choose(tab, "resnet34", "attention", 0)
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("ArrowRight")
    shown(tab, "image-000. resnet34 · layer2 · attention")
    tab.focus("#pane-a .stage")
    tab.keyboard.press("ArrowDown")
    shown(tab, "image-001. resnet34 · layer2")
    tab.keyboard.press("ArrowLeft")
    shown(tab, "image-001. resnet34 · layer1")
    tab.focus("#layer-a")
    tab.keyboard.press("End")
    shown(tab, "image-001. resnet34 · layer4")
    assert tab.get_attribute("#layer-a", "aria-valuetext") == "layer4, 4 of 4"
    tab.focus("#strip [aria-selected=true]")
    tab.keyboard.press("End")
    shown(tab, "image-004. resnet34 · layer4")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Image 5: image-004"
    tab.keyboard.press("ArrowLeft")
    shown(tab, "image-003.")
    tab.click("[aria-label='Next image']")
    shown(tab, "image-004.")
    tab.focus("#pane-a .stage")
    tab.keyboard.press("3")
    tab.wait_for_selector("#pane-b")
    assert tab.is_checked("input[value=runs]")
    tab.focus("#filter-text")
    tab.keyboard.type("3+1")
    assert tab.is_checked("input[value=runs]") and tab.inner_text("#zoom-level") == "1×", (
        "typing is not a shortcut"
    )


def test_wipe_by_mouse_and_keys(visit, study):
    tab = visit(study[1])
    choose(tab, "resnet34", "linear", 3)
    view(tab, "wipe")
    box = tab.locator("#pane-wipe .stage").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40, steps=4)
    tab.mouse.up()
    assert tab.get_attribute(".handle", "aria-valuenow") == "25"
    tab.focus(".handle")
    tab.keyboard.press("ArrowRight")
    assert tab.get_attribute(".handle", "aria-valuetext") == "27 % Original"
    clip = tab.eval_on_selector(".clip", "node => getComputedStyle(node).clipPath")
    assert re.fullmatch(r"inset\(0px 73(\.0+\d+)?% 0px 0px\)", clip)
    tab.select_option("#wipe-left", "b")
    tab.wait_for_function("document.querySelector('.tag.left').textContent.startsWith('B ')")
    assert tab.is_visible("#chooser-b") and tab.is_visible("#linked")


def test_two_runs_side_by_side(visit, study):
    runs, path = study
    tab = visit(path)
    view(tab, "runs")
    choose(tab, "resnet34", "linear", 0)
    choose(tab, "vit_base_patch16_224", "attention", 0, slot="b")
    shown(tab, "vit_base_patch16_224 · blocks.0 · attention")
    tab.locator("#layer-a").fill("2")
    shown(tab, "vit_base_patch16_224 · blocks.11 · attention")
    a, b = (find(runs, label).result.per_image[0]["psnr"] for label in (
        "resnet34.tv_in1k:layer3 · linear", f"{VIT[0]}:blocks.11 · attention"))  # fmt: skip
    assert f"{b - a:+.2f} to A".replace("-", "−") in tab.inner_text("#pane-b .scores")
    tab.uncheck("#linked")
    tab.locator("#layer-a").fill("0")
    shown(tab, "resnet34 · layer1 · linear")
    shown(tab, "blocks.11")
    tab.check("#errors")
    tab.wait_for_selector("#pane-error-b")
    assert tab.locator("#panes figure").count() == 3 and tab.is_visible("#gain")


def test_zoom_and_pan_move_every_image_alike(visit, study):
    tab = visit(study[1])
    layers = "nodes => nodes.map(node => node.style.transform)"
    tab.dblclick("#pane-a .stage", position={"x": 10, "y": 10})
    first = tab.eval_on_selector_all("#panes .layer", layers)
    assert len(first) == 3 and len(set(first)) == 1 and first[0].endswith("scale(2)")
    box = tab.locator("#pane-original .stage").bounding_box()
    tab.mouse.move(box["x"] + 200, box["y"] + 200)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 150, box["y"] + 180, steps=3)
    tab.mouse.up()
    second = tab.eval_on_selector_all("#panes .layer", layers)
    assert len(set(second)) == 1 and second != first
    x, y = map(float, re.findall(r"-?[\d.]+(?=%)", second[0]))
    before = [float(n) for n in re.findall(r"-?[\d.]+(?=%)", first[0])]
    assert (x - before[0], y - before[1]) == pytest.approx(
        (-5000 / box["width"], -2000 / box["width"]), abs=0.2
    )
    view(tab, "wipe")
    assert set(tab.eval_on_selector_all("#panes .layer", layers)) == set(second), (
        "the zoom survives a change of view"
    )
    tab.focus("#pane-wipe .stage")
    tab.keyboard.press("+")
    assert tab.inner_text("#zoom-level") == "4×"
    tab.click("#zoom-reset")
    assert tab.inner_text("#zoom-level") == "1×" and tab.is_disabled("#zoom-out")


def test_runs_that_kept_different_images(visit, tmp_path):
    few, many = [sample_image(0)], [sample_image(seed) for seed in range(3)]
    runs = [
        write_run(tmp_path, "m", "layer1", originals=many),
        write_run(tmp_path, "m", "layer2", originals=few, order=1),
    ]
    tab = visit(write_page(runs, tmp_path / "page.html", title="t"))
    tab.locator("#layer-a").fill("1")
    tab.locator("#strip button").nth(2).click()
    shown(tab, f"image-002. m · layer2 · linear: PSNR {runs[1].result.per_image[2]['psnr']:.2f}")
    assert "saved no reconstruction" in tab.inner_text("#pane-a")
    tab.locator("#layer-a").fill("0")
    shown(tab, "layer1")
    assert "saved no reconstruction" not in tab.inner_text("#pane-a")


def test_panes_have_the_shape_of_the_image(visit, tmp_path):
    square = sample_image(1)
    wide = square.crop((0, 0, square.width, square.height // 2))
    runs = [write_run(tmp_path, "m", "layer1", originals=[sample_image(0), wide])]
    tab = visit(write_page(runs, tmp_path / "page.html", title="t"))
    for number, image in enumerate((square, wide)):
        tab.locator("#strip button").nth(number).click()
        shown(tab, f"image-00{number}.")
        box = tab.locator("#pane-a .stage").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(image.width / image.height, rel=0.02)


def test_a_fused_run_shows_its_weights(visit, tmp_path):
    originals = [sample_image(seed) for seed in range(2)]
    sources = ("resnet34.tv_in1k:layer1", f"{HOSTILE[0]}:{HOSTILE[1]}", f"vgg16:{HOSTILE[2]}")
    runs = [
        write_fused(tmp_path, sources, originals),
        write_run(tmp_path, "m", "layer1", originals=originals),
    ]
    tab = visit(write_page(runs, tmp_path / "page.html", title="t"))
    tab.select_option("#encoder-a", "fusion")
    tab.wait_for_selector("#pane-a .weights canvas >> nth=2")
    assert tab.locator("#pane-a .weights li").count() == 3
    words = tab.inner_text("#pane-a .weights")
    assert "layer1 0.50" in words and HOSTILE[1] in words and words.count("0.25") == 2
    label = tab.get_attribute("#pane-a .weights canvas >> nth=1", "aria-label")
    assert label == f"Weight of {sources[1]} on image-000: mean 0.25, highest 1.00 of all sources"
    brightness = pixels(tab, "#pane-a .weights canvas", size=8).astype(int).sum(-1)
    assert (np.diff(brightness, axis=1) > 0).all() and (brightness == brightness[0]).all()
    tab.locator("#strip button").nth(1).click()
    shown(tab, "image-001.")
    tab.wait_for_selector("#pane-a .weights canvas[aria-label*='image-001']")
    tab.select_option("#encoder-a", "m")
    shown(tab, "m · layer1 · linear")
    assert tab.locator(".weights").count() == 0
    view(tab, "runs")
    tab.select_option("#encoder-b", "fusion")
    tab.wait_for_selector("#pane-b .weights canvas >> nth=2")


def test_a_fused_run_without_a_map_of_the_image_says_so(visit, tmp_path):
    run = write_fused(tmp_path, ("m:a", "m:b"), [sample_image(0), sample_image(1)])
    index = run.file("reconstructions") / "index.json"
    write_json(index, [{k: v for k, v in e.items() if k != "fusion_maps"} for e in read_json(index)])
    tab = visit(write_page([run], tmp_path / "page.html", title="t"))
    tab.wait_for_selector(".weights")
    tab.wait_for_function("document.querySelector('.weights').textContent.includes('no maps of this image')")
    assert not tab.is_visible(".weights canvas") and "a 0.50" in tab.inner_text(".weights")
