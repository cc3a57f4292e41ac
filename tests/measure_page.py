"""Measure a full page: 60 runs x 100 images of 224 x 224, its size in MB and how long Chromium takes to open it.

python tests/measure_page.py [FOLDER]     # FOLDER holds photographs; without one the images are made up
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from page_fixtures import SWITCHES, find_browser
from PIL import Image, ImageOps
from playwright.sync_api import sync_playwright
from report_study import sample_image, write_run

from afterimage.report.page.page import write_page
from afterimage.runtime.progress import Display

LAYERS, DECODERS, IMAGES, SIZE = 20, ("linear", "attention", "residual"), 100, 224


def originals(folder: str | None) -> list[Image.Image]:
    if folder is None:
        return [sample_image(seed, SIZE) for seed in range(IMAGES)]
    files = [f for f in sorted(Path(folder).rglob("*")) if f.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if len(files) < IMAGES:
        sys.exit(f"{folder} holds {len(files)} images, {IMAGES} are needed")
    return [ImageOps.fit(Image.open(file).convert("RGB"), (SIZE, SIZE)) for file in files[:IMAGES]]


def main(folder: str | None = None) -> None:
    sample_images = originals(folder)
    os.fsync = lambda _: None  # 12,000 files that need not survive a power cut
    with tempfile.TemporaryDirectory() as root, sync_playwright() as driver:
        runs = [
            write_run(
                Path(root), "resnet34.tv_in1k", f"layer{i}", decoder, originals=sample_images, count=IMAGES,
                features=(64, 56, 1 - i / LAYERS), order=i,
            )
            for i in range(LAYERS)
            for decoder in DECODERS
        ]  # fmt: skip
        started = time.monotonic()
        with Display() as display:
            path = write_page(runs, Path(root) / "index.html", title="60 x 100", progress=display)
        print(f"{path.stat().st_size / 1e6:.1f} MB, written in {time.monotonic() - started:.0f} s")
        browser = driver.chromium.launch(executable_path=find_browser(), args=SWITCHES)
        for _ in range(3):
            tab = browser.new_context().new_page()
            started = time.monotonic()
            tab.goto(f"file://{path}", wait_until="commit")
            tab.wait_for_selector("#panes[data-ready]")
            shown = time.monotonic() - started
            tab.wait_for_load_state("load")
            loaded = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
            print(f"images shown after {shown:.2f} s, all loaded after {loaded:.2f} s")
        print(tab.inner_text("#encoding"))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
