"""The live page in a real browser, as a visitor uses it; what it shows is tested in `test_live.py`."""

import dataclasses
import threading

import pytest
from PIL import Image

from afterimage import train_runs
from afterimage.config import DataConfig
from afterimage.experiments.live_state import LiveState
from children import small_configs
from command_line import free_port

pytest_plugins = ("page_fixtures",)
pytestmark = pytest.mark.long
pytest.importorskip("gradio", reason="the live page is drawn by Gradio")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A page of two `linear` decoders of a small random encoder, for images of 32 x 32."""
    from afterimage.experiments.live import LiveDecoder
    from afterimage.experiments.live_page import LivePage

    folder = tmp_path_factory.mktemp("live")
    config = small_configs(folder, weights="random-init")[1]
    config = dataclasses.replace(config, data=DataConfig("photographs", resize=48, crop=32))
    (model, _) = config.sources[0].split(":")
    configs = [dataclasses.replace(config, sources=(f"{model}:{layer}",)) for layer in ("layer1", "layer2")]
    runs = train_runs(configs, folder / "runs", cache=folder / "cache", accelerator="cpu")
    return LivePage([LiveDecoder(run, max_pixels=4_000_000) for run in runs])


@pytest.fixture(scope="module")
def address(live):
    page, address = live.serve(host="127.0.0.1", port=free_port(), max_waiting=10, max_megabytes=4)
    yield address
    page.close(verbose=False)


@pytest.fixture
def visit(browser, address):
    """Open the page; errors and whatever it asks of other machines fail the test at its end."""
    contexts, trouble = [], []

    def visit(query="", width=1280, height=900, address=address, ready=".cards figure", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(30_000)
        tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        tab.on(
            "request",
            lambda r: None if r.url.startswith((address, "data:", "blob:")) else trouble.append(r.url),
        )
        tab.goto(address + query)
        tab.wait_for_selector(ready)
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []


def scores(tab, cards="#cards") -> list[float]:
    return [float(text.split()[0]) for text in tab.locator(f"{cards} dd").all_inner_texts() if "dB" in text]


def wait_for_new(tab, before: list[float]) -> list[float]:
    tab.wait_for_function(
        "before => { const now = [...document.querySelectorAll('#cards dd')].map(e => e.innerText)"
        ".filter(t => t.includes('dB')).map(parseFloat); return now.length && String(now) != String(before); }",
        arg=before,
    )
    return scores(tab)


def test_a_slider_moves_the_images_the_link_and_the_address(visit):
    tab = visit()
    before = scores(tab)
    assert len(before) == 2 and tab.locator("#cards figure").count() == 3
    slider = tab.locator("#bits input[type=range]")
    slider.focus()
    tab.keyboard.press("Home")  # the keyboard alone: one bit
    now = wait_for_new(tab, before)
    assert all(a < b for a, b in zip(now, before, strict=True))
    assert "sent as 1bit" in tab.inner_text("#cards") and "what the change did" in tab.inner_text("#cards")
    tab.wait_for_url("**?bits=1")
    assert tab.input_value("#link textarea, #link input") == tab.url
    again = visit("?bits=1")
    assert scores(again) == now and again.input_value("#bits input[type=number]") == "1"


def test_a_wrong_link_says_what_is_wrong_and_shows_the_default(visit):
    tab = visit("?change=burn")
    assert "change" in tab.inner_text(".message") and "average" in tab.inner_text(".message")
    assert scores(tab) == scores(visit())


def test_an_image_of_ones_own_and_a_text_file_named_jpg(visit, tmp_path):
    tab = visit()
    before = scores(tab)
    Image.linear_gradient("L").save(tmp_path / "mine.png")
    tab.set_input_files("#upload-image input[type=file]", tmp_path / "mine.png")
    mine = wait_for_new(tab, before)
    tab.wait_for_url("**?image=own")
    tab.locator("#examples-image button").nth(2).click()
    tab.wait_for_url("**?image=coffee")
    assert mine != scores(tab) != before
    for name, reason in (
        ("text.jpg", "text.jpg: is not an image"),
        ("large.png", "large.png: has 5.0 megapixels"),
    ):
        tab = visit()
        (tmp_path / "text.jpg").write_text("no image")
        Image.new("1", (2500, 2000)).save(tmp_path / "large.png")
        tab.set_input_files("#upload-image input[type=file]", tmp_path / name)
        tab.wait_for_selector(".message")
        assert tab.inner_text(".message").startswith(reason)


def test_a_refinement_is_watched(visit):
    tab = visit()
    tab.locator("#steps input[type=number]").fill("16")
    tab.click("#refine")
    tab.wait_for_selector("#refined figcaption:has-text('pass 16 of 16')")
    decoded, refined = scores(tab, "#refined")
    assert decoded == scores(tab)[0] and refined > decoded


def test_a_card_names_the_passes_that_are_searched(live, monkeypatch):
    import afterimage.experiments.live_page as page

    monkeypatch.setattr(page, "refined_html", lambda *given: f"pass {given[2]} of {given[3]}")
    monkeypatch.setattr(live.decoders[0], "refine", lambda *_, steps: iter([(steps, None)]))
    settings = [getattr(LiveState(), name) for name in live.fields]
    for asked, searched in ((1000, 200), (-3, 1), (16, 16)):
        assert list(live._refine(0, asked, None, None, *settings)) == [f"pass {searched} of {searched}"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_and_dark_is_dark(visit, scheme):
    tab = visit("?change=swap&left=50", width=390, height=844, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.split("(")[1].split(",")[0])
    assert (red < 64) == (scheme == "dark")


def test_a_photograph_is_taken_with_the_webcam(visit):
    tab = visit(permissions=["camera"])
    before = scores(tab)
    tab.click("#upload-image button[aria-label='Capture from camera']")
    tab.click("#upload-image button:has-text('Click to Access Webcam')")
    tab.wait_for_function("() => document.querySelector('#upload-image video')?.readyState > 2")
    tab.click("#upload-image button[aria-label='capture photo']")
    wait_for_new(tab, before)
    tab.wait_for_url("**?image=own")


def test_a_full_queue_is_said_and_the_page_lives_on(visit, live, monkeypatch):
    """One visitor is served and one may wait; the third is told, as is a visitor who comes then."""
    decoder, free = live.decoders[0], threading.Event()
    search = decoder.refine

    def slow(*arguments, **options):
        free.wait(60)
        yield from search(*arguments, **options)

    monkeypatch.setattr(decoder, "refine", slow)
    page, address = live.serve(host="127.0.0.1", port=free_port(), max_waiting=1, max_megabytes=4)
    try:
        first, second, third = (visit(address=address) for _ in range(3))
        for tab, state in ((first, "processing"), (second, "queue: 1/1"), (third, "Error")):
            tab.click("#refine")
            tab.wait_for_selector(f"#refined :text('{state}')")
        fourth = visit(address=address, ready=".toast-body")
        for tab in (third, fourth):
            assert "busy" in tab.inner_text(".toast-body")
        assert "choose an image again in a moment" in fourth.inner_text("#cards")
        free.set()
        for tab in (first, second):
            tab.wait_for_selector("#refined figcaption:has-text('of 64')")
        third.click("#refine")
        third.wait_for_selector("#refined figcaption:has-text('of 64')")
        fourth.locator("#examples-image button").nth(2).click()
        fourth.wait_for_selector(".cards figure")
    finally:
        free.set()
        page.close(verbose=False)
