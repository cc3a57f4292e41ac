"""The page's table, charts and looks in a real browser. Skips where there is no Chromium."""

import numpy as np
import pytest

from afterimage.report.format import Finding
from afterimage.report.page import images as album
from afterimage.report.page import page
from page_in_browser import HOSTILE, choose, find, rename_images, shown, view, write_page
from report_study import sample_image, write_run

pytest_plugins = ("page_fixtures",)


def test_table_sorts_filters_and_sends_rows_to_the_images(visit, study):
    runs, path = study
    tab = visit(path)

    def column(number: int) -> list[str]:
        return tab.eval_on_selector_all(
            "#table tbody tr:not([hidden])", f"rows => rows.map(row => row.cells[{number}].innerText.trim())"
        )

    assert len(column(0)) == len(runs) == 17
    for key, number, descending in (("psnr", 2, True), ("lpips", 4, False), ("parameters", 5, False)):
        for turn in (descending, not descending):
            tab.click(f"[data-sort={key}]")
            state = tab.get_attribute(f"th:has([data-sort={key}])", "aria-sort")
            assert state == ("descending" if turn else "ascending")
            cells = column(number)
            values = [float(cell.split()[0].replace(",", "")) for cell in cells if cell != "–"]
            assert values == sorted(values, reverse=turn)
            assert cells[len(values) :] == ["–"] * (len(cells) - len(values)), (
                "what is unavailable comes last"
            )
    tab.fill("#filter-text", "LAYER3 att")
    assert column(1) == ["attention"] and tab.inner_text("#filter-count") == "1 of 17 rows"
    tab.fill("#filter-text", "")
    tab.select_option("#filter-decoder", "linear")
    tab.uncheck("#filter-baselines")
    assert column(1) == ["linear"] * 8
    tab.select_option("#filter-series", "resnet34 (random weights)")
    assert len(column(0)) == 1 and "RANDOM WEIGHTS" in column(0)[0]
    tab.click("#table tbody tr:not([hidden]) [data-slot=b]")
    shown(tab, "resnet34 (random weights) · layer1 · linear")
    tab.wait_for_selector("#pane-b .badge")
    assert tab.get_attribute("#table tbody tr:not([hidden]) [data-slot=b]", "aria-pressed") == "true"
    tab.select_option("#filter-series", "vit_base_patch16_224")
    tab.click("#table tbody tr:not([hidden]) [data-slot=a]")
    shown(tab, "vit_base_patch16_224 · blocks.0 · linear")


def test_charts_answer_to_mouse_and_keys(visit, study):
    tab = visit(study[1])
    choose(tab, "resnet34", "linear", 0)
    assert (
        tab.locator("#depth-chart .point").count() == 15
        and tab.locator("#depth-chart .baseline-line").count() == 2
    )
    point = tab.locator("#depth-chart .point").nth(3)
    point.scroll_into_view_if_needed()
    box = point.locator(".mark").bounding_box()
    tab.mouse.move(box["x"] + 4, box["y"] + 9)
    label = point.get_attribute("aria-label")
    assert tab.inner_text("#tooltip strong") in label and "95 % interval" in tab.inner_text("#tooltip")
    tab.mouse.click(box["x"] + 4, box["y"] + 9)
    shown(tab, "layer4 · linear" if "linear" in label else "layer4 · attention")
    tab.locator("#depth-chart [tabindex='0']").focus()
    for _ in range(2):
        tab.keyboard.press("ArrowRight")
    assert tab.locator("#depth-chart .point:focus").count() == 1 and tab.is_visible("#tooltip")
    tab.keyboard.press("Enter")
    shown(tab, tab.locator("#depth-chart .point:focus").get_attribute("aria-label").split(" · ")[0])
    tab.click("#depth-legend button:has-text('linear')")
    assert tab.locator("#depth-chart .point").count() == 7
    tab.select_option("#metric", "lpips")
    assert "LPIPS" in tab.locator("#depth-chart .point").first.get_attribute("aria-label")


def test_scatter_pairs_images(visit, study):
    runs, path = study
    tab = visit(path)
    view(tab, "runs")
    choose(tab, "resnet34", "linear", 0)
    choose(tab, "resnet34", "attention", 0, slot="b")
    shown(tab, "layer1 · attention")
    a, b = (
        find(runs, f"resnet34.tv_in1k:layer1 · {decoder}").result.per_image
        for decoder in ("linear", "attention")
    )
    gaps = np.array([y["psnr"] - x["psnr"] for x, y in zip(a, b, strict=True)])
    caption = tab.inner_text("#scatter-caption")
    assert f"B is better on {(gaps > 0).sum()} of 20 images; mean of B − A: {gaps.mean():+.2f} dB" in caption
    assert tab.locator("#scatter-chart .point").count() == 20
    tab.locator("#scatter-chart .point[aria-label^='image-003']").press("Enter")
    shown(tab, "image-003.")
    choose(tab, "resnet34", "linear", 0, slot="b")
    tab.wait_for_function("document.getElementById('scatter-caption').textContent.includes('the same run')")


def test_hostile_names_are_only_text(visit, tmp_path):
    source = f"{HOSTILE[0]}:{HOSTILE[1]}"
    originals = [sample_image(seed) for seed in range(3)]
    runs = [
        write_run(tmp_path, "x", "y", decoder, sources=(source,), notes=HOSTILE, originals=originals)
        for decoder in ("linear", "attention")
    ]
    for run in runs:
        rename_images(run, HOSTILE)
    finding = Finding(*HOSTILE, HOSTILE)
    tab = visit(write_page(runs, tmp_path / "page.html", title=HOSTILE[2], findings=[finding]))
    view(tab, "runs")
    for number in range(3):
        tab.locator("#strip button").nth(number).click()
        shown(tab, HOSTILE[number])
    tab.locator("#scatter-chart .point").first.hover()
    tab.locator("#depth-chart .point").first.focus()
    tab.fill("#filter-text", "<img")
    tab.wait_for_timeout(200)
    assert tab.locator("img[src=x], svg[onload]").count() == 0 and tab.locator("script").count() == 6
    assert tab.title() == HOSTILE[2]


def test_dark_and_light(visit, study):
    background = "getComputedStyle(document.body).backgroundColor"
    tab = visit(study[1], color_scheme="dark")
    dark = tab.evaluate(background)
    assert tab.get_attribute("#theme", "aria-pressed") == "true"
    tab.click("#theme")
    assert tab.evaluate(background) != dark and tab.get_attribute("html", "data-theme") == "light"
    tab.reload()
    assert tab.get_attribute("html", "data-theme") == "light", "the choice lasts"


def test_on_a_phone(visit, study):
    tab = visit(study[1], 390, 844, has_touch=True, is_mobile=True, reduced_motion="reduce")
    assert tab.get_attribute("#viewer", "data-view") == "wipe"
    slider, stage = (tab.locator(s).bounding_box() for s in ("#layer-a", "#pane-wipe .stage"))
    assert slider["y"] + slider["height"] <= 844 and stage["width"] > 350, "image and slider share the screen"
    for name in ("layers", "runs", "wipe"):
        view(tab, name)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.eval_on_selector("#menu", "node => getComputedStyle(node).transitionDuration") == "0s"
    assert not tab.is_visible("#sections")
    tab.tap("#menu")
    tab.tap("#sections a[href='#results']")
    tab.wait_for_function("Math.abs(document.getElementById('results').getBoundingClientRect().top) < 120")
    assert not tab.is_visible("#sections")


def test_without_images_the_rest_still_works(visit, tmp_path):
    tab = visit(write_page([write_run(tmp_path, "m", "layer1")], tmp_path / "page.html", title="t"))
    assert tab.locator("#depth-chart .point").count() == 1
    tab.click("[data-sort=psnr]")
    tab.select_option("#metric", "ssim")
    assert "SSIM" in tab.locator("#depth-chart .point").get_attribute("aria-label")


@pytest.mark.long
def test_a_page_of_full_size_opens_in_little_more_than_it_takes_to_read(visit, tmp_path, monkeypatch):
    """60 runs x 100 images at the largest size a page may have; one real image, padded, over and over."""
    original = sample_image(0, size=224)
    runs = [
        write_run(tmp_path, "m", f"layer{i}", originals=[original], count=100, order=i) for i in range(60)
    ]
    one = album._encode(runs[0].images[0][1], 90)
    padding = (page.PAGE_BYTES - 1_500_000) // 6100 - len(one) - 10
    assert padding > 0, "the real image must not be larger than its share"
    uri = one + "A" * (padding - padding % 4)
    block = {"original": uri, "runs": {str(i): uri for i in range(60)}}
    thumbnail = {"width": 224, "height": 224, "runs": list(range(60)), "thumbnail": one}
    full = album.EmbeddedImages(
        100, [{"id": f"image-{i:03}", **thumbnail} for i in range(100)], [block] * 100, quality=90
    )
    monkeypatch.setattr(page, "embed", lambda *_: full)
    path = write_page(runs, tmp_path / "page.html", title="60 x 100")
    assert 55_000_000 < path.stat().st_size < 60_000_000
    blank = tmp_path / "blank.html"
    text = "A" * path.stat().st_size
    blank.write_text(
        f"<!doctype html><html data-ready='true'><title>blank</title><script type='text/plain'>{text}</script>"
    )
    loaded = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"
    taken = {blank: [], path: []}
    for page_path in [blank, path] * 3:
        tab = visit(page_path)
        tab.wait_for_function(loaded)
        taken[page_path].append(tab.evaluate(loaded))
    assert min(taken[path]) < 3 * min(taken[blank])
    tab.locator("#strip button").nth(99).click()
    shown(tab, "image-099.")
