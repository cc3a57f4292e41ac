"""Fixtures of the page's browser tests: Chromium, a page to visit, and a tab that reports all trouble."""

import shutil

import pytest
from page_in_browser import FINDING
from report_study import RESNET, VIT, sample_image, write_run, write_study

from afterimage.report.page.page import write_page

SWITCHES = [
    f"--{name}"
    for name in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    )
]


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("needs a browser: no chromium, chromium-browser or google-chrome on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Runs and their page: two encoders, two decoders, baselines, random weights; five images."""
    root = tmp_path_factory.mktemp("study")
    originals = [sample_image(seed) for seed in range(5)]
    runs = write_study(root, encoders=(RESNET, VIT), originals=originals, references=("mean", "thumbnail-28"))
    runs.append(
        write_run(
            root, RESNET[0], "layer1", features=RESNET[1]["layer1"], weights="random", originals=originals
        )
    )
    return runs, write_page(runs, root / "page.html", title="Two encoders", findings=[FINDING])


@pytest.fixture
def visit(browser):
    """Open a page; whatever it logs, throws or asks the network for fails the test at its end."""
    contexts, trouble = [], []

    def visit(path, width=1440, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: trouble.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on(
            "request",
            lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else trouble.append(r.url),
        )
        tab.goto(f"file://{path}")
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []
