"""Run folders from strangers that no mutation finds: links, pipes, devices, names; and what must never be called."""

import ast
import os
import shutil
from pathlib import Path

import pytest

import afterimage
import report_study
from afterimage import AfterimageError
from afterimage.report.page.images import collect_images
from afterimage.report.reading import read_rows
from afterimage.report.write import write_report
from afterimage.runs.files import read_csv, read_json, sha256
from afterimage.runs.run import Run, scan
from afterimage.training.checkpoint import load_tensors


@pytest.fixture
def run(tmp_path) -> Run:
    return report_study.write_run(
        tmp_path / "study", "a", "layer1", originals=[report_study.sample_image(0, 24)], count=3
    )


@pytest.mark.parametrize("what", ["image", "folder"])
def test_a_link_out_of_a_run_folder_is_not_followed(run, tmp_path, what):
    """What somebody else's link points to must not end up in a page that is passed on."""
    place = run.file("reconstructions") / "000.png" if what == "image" else run.file("reconstructions")
    moved = tmp_path / "private"
    shutil.move(place, moved)
    place.symlink_to(moved)
    with pytest.raises(AfterimageError, match="which is not a file of its folder"):
        collect_images(read_rows([run]).all)


def test_images_of_a_run_are_png_and_no_program_is_started_for_others(run, monkeypatch):
    monkeypatch.setattr("afterimage.report.figures.draw", lambda *_, **__: ())
    (run.file("reconstructions") / "000.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )
    written = write_report([run], run.path.parent / "report")
    assert "index.html" not in written
    assert "cannot read the image" in written["report.md"].read_text()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, endless, Path.mkdir])
@pytest.mark.parametrize("name", ["summary.json", "scores.csv", "config.toml", "status.json"])
def test_what_is_no_regular_file_is_an_error_not_a_wait(run, name, make):
    run.file(name).unlink()
    make(run.file(name))
    with pytest.raises(AfterimageError, match=name):
        read_rows([run])
    with pytest.raises(AfterimageError, match="not a regular file"):
        getattr(run, {"config.toml": "config", "status.json": "status"}.get(name, "result"))


@pytest.mark.parametrize("read", [read_json, read_csv, load_tensors, sha256])
def test_a_pipe_is_never_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AfterimageError, match="not a regular file"):
        read(tmp_path / "pipe")


@pytest.mark.long
def test_a_folder_of_any_name_is_reported(run):
    """Bytes that are no text, control characters of terminals, markup, and what a shell or a spreadsheet would run."""
    root = run.path.parent
    for name in (
        b"\xff\xfe",
        b"\x1b]0;x\x07",
        b"<script>alert(1)<",
        b"=1+1",
        b"-rf",
        b"a|b`c`$(d)",
        b"\\input{x}",
    ):
        shutil.copytree(os.fsencode(run.path), os.fsencode(root) + b"/" + name)
    runs = list(scan(root))
    assert len(runs) == 8 and all(run.name.isprintable() for run in runs)
    written = write_report(runs, root / "report")
    for name in ("report.md", "index.html", "table.tex", "table.csv", "findings.json"):
        text = written[name].read_text()
        assert "\x1b" not in text, name
        assert "<script>alert" not in text or name in ("table.csv", "findings.json"), (
            name
        )  # data, not documents
    assert (
        "'=1+1" in written["table.csv"].read_text() and "\\input{x}" not in written["table.tex"].read_text()
    )


def test_a_number_too_large_for_a_float_is_not_finite(run):
    lines = run.file("scores.csv").read_text().splitlines()
    first, _, rest = lines[1].split(",", 2)
    run.file("scores.csv").write_text("\n".join([lines[0], f"{first},{'9' * 400},{rest}", *lines[2:]]) + "\n")
    with pytest.raises(AfterimageError, match=r"scores\.csv: .* is inf, not a finite number"):
        read_rows([run])


def test_half_a_character_is_no_text(run):
    run.file("summary.json").write_text(
        run.file("summary.json").read_text().replace('"a:layer1', r'"\ud800:layer1')
    )
    with pytest.raises(AfterimageError, match=r"summary\.json is not valid JSON"):
        read_rows([run])


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            yield (owner.id if isinstance(owner, ast.Name) else ""), node.func.attr, options


def test_nothing_is_unpickled_anywhere():
    sources = list(Path(afterimage.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    seen = 0
    for path in sources:
        for owner, name, options in calls(ast.parse(path.read_text())):
            where = f"{path}: {owner}.{name}"
            if (owner, name) == ("torch", "load"):
                assert options["weights_only"] is True, where
                seen += 1
            if (owner, name) in (("np", "load"), ("numpy", "load")):
                assert options["allow_pickle"] is False, where
                seen += 1
            assert owner not in ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"), where
            assert name not in ("read_pickle", "load_state_dict_from_url", "extractall"), where
    assert seen >= 2  # the two there are
