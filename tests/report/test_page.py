"""The page as a file: what it holds, what it escapes, how it keeps its size."""

import base64
import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from afterimage.config import RANDOM_WEIGHTS, AfterimageError
from afterimage.report.format import Finding
from afterimage.report.page import images as album
from afterimage.report.page.page import SCRIPTS, STYLES, TEMPLATES
from afterimage.runs.run import scan
from page_in_browser import FINDING, HOSTILE, rename_images, write_page
from report_study import BASELINES, RESNET, sample_image, write_run, write_study
from simulated_runs import edit


class Parsed(html.parser.HTMLParser):
    """Elements with their attributes, the text outside scripts, and the data of JSON scripts by id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements, self.text, self.data, self.current = [], "", {}, ("", {})
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.current = (tag, dict(attrs))
        self.elements.append(self.current)

    def handle_endtag(self, tag):
        self.current = ("", {})

    def handle_data(self, data):
        tag, attributes = self.current
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[attributes["id"]] = json.loads(data)
        elif tag not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def originals():
    return [sample_image(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def study(tmp_path_factory, originals):
    root = tmp_path_factory.mktemp("study")
    write_study(root, encoders=(RESNET,), baselines=("mean", "thumbnail-28"), originals=originals)
    return root


@pytest.fixture
def runs(study, tmp_path):
    """A copy of the study that a test may change."""
    return list(scan(shutil.copytree(study, tmp_path / "runs")))


def test_asks_the_network_for_nothing(runs, tmp_path):
    page = Parsed(write_page(runs, tmp_path / "page.html", title="Study", findings=[FINDING]))
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            tag,
            attributes,
        )
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    assert "unsafe" not in policy and policy.count("'sha256-") == 3
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "embed", "base"})


def test_scripts_are_small_and_build_text_only():
    for name in (*SCRIPTS, *STYLES, "theme.js"):
        text = (TEMPLATES / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 300, name
        assert "</" not in text, f"{name} would end its element"
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|fetch\(|XMLHttp|WebSocket|@import|url\(",
            text,
        )


def test_says_what_it_holds(runs, tmp_path):
    failed, done, *_ = [run for run in runs if run.result.kind == "decoder"]
    failed.set_state("failed", error="the loss is not finite at step 7")
    text = Parsed(write_page(runs, tmp_path / "page.html", title="A study", findings=[FINDING])).text
    for words in (
        "A study",
        "It falls by 3 dB.",
        "Always.",
        "supported",
        "All steps fall.",
        BASELINES["mean"][0],
        "not finite at step 7",
    ):
        assert words in text
    assert 'decoder]\nname = "attention"' in text and text.count("[recipe]") == 7, (
        "the configuration of every row"
    )
    for score, digits in zip(done.result.scores.values(), (2, 3, 3), strict=True):
        assert f"{score.mean:.{digits}f} ± {score.std:.{digits}f}" in text


def test_names_stay_text(runs, tmp_path):
    for run in runs:
        rename_images(run, HOSTILE)
    run = write_run(
        tmp_path / "runs", "x", HOSTILE[0], "linear", sources=(f"{HOSTILE[0]}:{HOSTILE[1]}",), notes=HOSTILE
    )
    rename_images(run, HOSTILE) if run.images else None
    finding = Finding(*HOSTILE, HOSTILE)
    without_random_controls = Parsed(
        write_page(runs, tmp_path / "honest.html", title="t", findings=[FINDING])
    )
    page = Parsed(write_page([*runs, run], tmp_path / "page.html", title=HOSTILE[2], findings=[finding]))
    count = [sum(tag == "script" for tag, _ in p.elements) for p in (without_random_controls, page)]
    assert count[0] == count[1]
    assert not [a for tag, a in page.elements if tag == "img" or a.get("onerror") or a.get("onload")]
    assert [p["id"] for p in page.data["data"]["images"][:3]] == list(HOSTILE), (
        "the data keeps the names as they are"
    )
    assert all(name in page.text for name in HOSTILE)


def test_small_studies_embed_the_files_themselves(runs, tmp_path):
    page = Parsed(write_page(runs, tmp_path / "page.html", title="t"))
    position = page.data["data"]["images"][2]["runs"][-1]
    uri = page.data["image-2"]["runs"][str(position)]
    by_name = {entry["name"]: i for i, entry in enumerate(page.data["data"]["runs"])}
    run = next(run for run in runs if "thumbnail-28" in run.name)
    assert position == by_name[run.result.label]
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == run.images[2][2].read_bytes()
    assert "the run folders’ own files" in page.text


def test_larger_studies_are_reencoded_and_say_so(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(album, "LOSSLESS_BYTES", 0)
    page = Parsed(write_page(runs, tmp_path / "page.html", title="t"))
    uris = [uri for i in range(6) for uri in page.data[f"image-{i}"]["runs"].values()]
    assert sum(uri.startswith("data:image/webp;base64,") for uri in uris) > 40
    assert "WebP copies (quality 85)" in page.text and "do not measure here" in page.text
    assert "embedded, to keep this file small" not in page.text


def test_too_many_images_are_left_out_and_the_page_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(album, "LOSSLESS_BYTES", 0)
    whole = write_page(runs, tmp_path / "whole.html", title="t")
    data = Parsed(whole).data
    sample_images = sum(
        len(json.dumps(data[f"image-{i}"]) + json.dumps(data["data"]["images"][i])) for i in range(6)
    )
    limit = whole.stat().st_size - sample_images // 2
    path = write_page(runs, tmp_path / "page.html", title="t", limit=limit)
    page = Parsed(path)
    kept = len(page.data["data"]["images"])
    assert 0 < kept < 6 and len(page.data) == kept + 1
    assert path.stat().st_size <= limit
    assert f"Only the first {kept} of 6 images are embedded" in page.text
    assert len(page.data["data"]["ids"]) == 20, "scores cover every image"
    page = Parsed(
        write_page(
            runs, tmp_path / "page.html", title="t", limit=whole.stat().st_size - sample_images + 5_000
        )
    )
    assert "None of the 6 saved images fits" in page.text
    with pytest.raises(AfterimageError, match="alone take more than the limit of 1,000 bytes"):
        write_page(runs, tmp_path / "none.html", title="t", limit=1000)


def test_the_same_id_from_another_data_set_is_another_image(tmp_path, originals):
    runs = [
        write_run(tmp_path / "a", "m", "layer1", originals=originals),
        write_run(tmp_path / "a", "m", "layer2", originals=originals),
    ]
    others = [
        write_run(tmp_path / "b", "m", "layer3", originals=[sample_image(seed) for seed in range(90, 93)])
    ]
    edit(others[0], data__digest="d2", data__test_digest="d2")
    data = Parsed(write_page([*runs, *others], tmp_path / "page.html", title="t")).data["data"]
    assert [p["runs"] for p in data["images"]] == [[0, 1]] * 6 + [[2]] * 3
    first, second, other = (entry["testSet"] for entry in data["runs"])
    assert first == second != other


def test_runs_on_the_same_images_compare_whether_they_saved_images_or_not(tmp_path, originals):
    runs = [
        write_run(tmp_path, "m", f"layer{i}", order=i, originals=originals[:n])
        for i, n in enumerate((6, 0, 2))
    ]
    edit(runs[2], data__digest="d1, first 2", data__test_digest="d1, first 2")
    edit(runs[1], data__digest="d1, other training images")
    data = Parsed(write_page(runs, tmp_path / "page.html", title="t")).data["data"]
    assert len({entry["testSet"] for entry in data["runs"]}) == 1


def test_unavailable_lpips_is_never_a_number(tmp_path, originals):
    runs = write_study(tmp_path, encoders=(RESNET,), originals=originals, lpips=None, baselines=("mean",))
    page = Parsed(write_page(runs, tmp_path / "page.html", title="t"))
    assert page.text.count("unavailable") >= len(runs) and "looked in AFTERIMAGE_WEIGHTS" in page.text
    assert {entry["scores"]["lpips"] for entry in page.data["data"]["runs"]} == {None}
    assert "option value=lpips" not in page.text


@pytest.mark.parametrize("kind", RANDOM_WEIGHTS)
def test_random_weights_are_labelled(kind, tmp_path):
    run = write_run(tmp_path, "resnet34.tv_in1k", "layer1", weights=kind)
    page = Parsed(
        write_page(
            [run, write_run(tmp_path, "resnet34.tv_in1k", "layer1")], tmp_path / "page.html", title="t"
        )
    )
    assert [entry["series"] for entry in page.data["data"]["runs"]] == [
        "resnet34",
        f"resnet34 ({kind} weights)",
    ]
    assert [entry["random"] for entry in page.data["data"]["runs"]] == ["", f"{kind.upper()} weights"]
    assert ("strong", {"class": "badge"}) in page.elements and f"{kind} weights" in page.text
    assert "These runs saved no reconstructions" in page.text


def test_figures_are_inlined(runs, tmp_path):
    figure = tmp_path / "quality_by_depth.png"
    Image.new("RGB", (4, 4)).save(figure)
    figures = [("By depth", figure), ("Another", figure)]
    page = Parsed(write_page(runs, tmp_path / "page.html", title="t", figures=figures))
    shown = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"] for a in shown] == ["By depth", "Another"]
    with pytest.raises(AfterimageError, match=r"gone\.png"):
        write_page(runs, tmp_path / "page.html", title="t", figures=[("Gone", tmp_path / "gone.png")])


def test_errors_name_the_file(runs, tmp_path):
    with pytest.raises(AfterimageError, match="no run"):
        write_page([], tmp_path / "page.html", title="t")
    broken = runs[0].images[1][2]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(AfterimageError, match=re.escape(str(broken))):
        write_page(runs, tmp_path / "page.html", title="t")
    broken.unlink()
    with pytest.raises(AfterimageError, match=re.escape(str(broken))):
        write_page(runs, tmp_path / "page.html", title="t")


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    one, other = (write_page(runs, tmp_path / f"{n}.html", title="t").read_bytes() for n in (1, 2))
    assert one == other
