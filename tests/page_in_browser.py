"""What the tests of the page share: names that try to break out, and steps that a visitor takes."""

import numpy as np

from afterimage.runs.files import read_csv, read_json, write_csv, write_json
from afterimage.runs.run import Run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><svg onload=alert(3)>&amp;\u2028{{7*7}}",
)
FINDING = {
    "title": "H1",
    "verdict": "supported",
    "rule": "All steps fall.",
    "paragraphs": ["It falls by 3 dB.", "Always."],
}
# Reads a canvas as a list of bytes, from a copy: Chromium warns of a canvas that is read again and again.
PIXELS = """c => {
  const context = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(c, 0, 0);
  return [...context.getImageData(0, 0, c.width, c.height).data];
}"""


def shown(tab, text: str) -> None:
    """Wait until what a screen reader is told contains the text."""
    tab.wait_for_function("text => document.getElementById('announce').textContent.includes(text)", arg=text)


def find(runs, label: str) -> Run:
    return next(run for run in runs if run.summary["label"] == label and not run.name.endswith("random"))


def pixels(tab, selector: str, size: int = 64) -> np.ndarray:
    return np.array(tab.eval_on_selector(selector, PIXELS), dtype=np.uint8).reshape(size, size, 4)[..., :3]


def view(tab, name: str) -> None:
    tab.click(f"label:has(input[value={name}])")
    tab.wait_for_selector(f"#viewer[data-view={name}]")


def choose(tab, encoder: str, decoder: str, layer: int, slot: str = "a") -> None:
    tab.select_option(f"#encoder-{slot}", encoder)
    tab.select_option(f"#decoder-{slot}", decoder)
    tab.locator(f"#layer-{slot}").fill(str(layer))


def rename_images(run: Run, names) -> None:
    """Give a finished run's images other ids."""
    ids = [f"image-{i:03}" for i in range(len(names))]
    new = dict(zip(ids, names, strict=True))
    write_csv(
        run.file("scores.csv"),
        [{**row, "id": new.get(row["id"], row["id"])} for row in read_csv(run.file("scores.csv"))],
    )
    index = run.file("reconstructions") / "index.json"
    write_json(index, [{**entry, "id": new.get(entry["id"], entry["id"])} for entry in read_json(index)])
