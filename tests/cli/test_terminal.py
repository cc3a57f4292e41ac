import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import afterimage
from afterimage.cli import main
from afterimage.config import printable_path
from afterimage.config.audit import AuditConfig
from afterimage.runs.files import read_json, write_atomic, write_csv, write_json
from afterimage.runs.run import Run, scan
from afterimage.runtime.terminal import (
    Display,
    Writer,
    always_writable,
    console,
    print_error,
    print_lines,
    printable,
)

SOURCE = Path(afterimage.__file__).parent
MODEL = "test_resnet.r160_in1k"
ENCODINGS = ("utf-8", "cp1252", "cp437", "ascii", "latin-1", "utf-16", "shift_jis")
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def written(text, encoding):
    raw = io.BytesIO()
    writer = Writer(io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
    writer.write(text)
    writer.flush()
    assert writer.failure is None
    return raw.getvalue().decode(encoding)


@given(st.text(st.characters(), max_size=40), st.sampled_from(ENCODINGS))
def test_any_text_can_be_written_in_any_encoding(text, encoding):
    got = written(text, encoding)
    assert got == text or any(c in got for c in "\\^v<>-+|.x"), (text, got)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_an_encoding_lacks_is_told_in_other_characters(encoding):
    text = "PSNR↑ 24.31¹ ± 2.80 × 3 → … 名"
    got = written(text, encoding)
    kept = text if encoding.startswith("utf") else got
    assert got == kept and got.isprintable()
    if encoding == "ascii":
        assert got == "PSNR^ 24.31^1 +- 2.80 x 3 -> ... \\u540d"


@given(st.text(st.characters(), max_size=60))
def test_nothing_that_is_said_steers_the_terminal(text):
    safe = printable(text)
    assert all(c in "\n\t" or c.isprintable() or c.isspace() for c in safe) and "\x1b" not in safe
    assert printable(safe) == safe
    safe.encode()
    if text.isascii() and text.isprintable():
        assert safe == text


def test_names_are_escaped_in_messages_tables_and_progress(capsys):
    name = os.fsdecode(b"a\xff\x1b[31m\n/[bold]:smile:")
    print_lines(printable_path(name))
    screen = console(80)
    screen.print(name)
    Display()(name, 1, 1)
    print_error("afterimage", f"cannot read {name}\nafterimage: done")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\udcff" not in out + err
    assert out.startswith("a\\xff\\x1b[31m\\n/[bold]:smile:\n") and err.count("[bold]:smile:") == 2
    assert "\n  afterimage: done" in err, "a further line cannot pass for a message"


def test_tables_are_drawn_in_what_the_encoding_has(monkeypatch):
    from rich.table import Table

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    table = Table("SSIM↑")
    table.add_row("0.5")
    console(40).print(table)
    assert "SSIM^" in raw.getvalue().decode("cp1252") and "\\u" not in raw.getvalue().decode("cp1252")


def test_all_output_goes_through_the_one_writer():
    for path in SOURCE.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "id", getattr(called, "attr", ""))
            assert name != "Console" and not (isinstance(called, ast.Name) and name == "print"), path
            if (
                isinstance(called, ast.Attribute)
                and name == "write"
                and isinstance(called.value, ast.Attribute)
            ):
                assert called.value.attr not in ("stdout", "stderr"), path


class Gone(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BrokenPipeError(), ""),
        (OSError(28, "No space left on device"), "No space left"),
        (ValueError("closed"), "closed"),
    ],
)
def test_output_that_cannot_be_written_ends_nothing_and_is_told_by_the_exit_code(
    monkeypatch, capsys, error, message
):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    done = []
    with pytest.raises(SystemExit) as ended, always_writable():
        print_lines("a line")
        console(40).print("a line")
        done.append("went on")
    assert done and ended.value.code == 1
    assert message in capsys.readouterr().err


def test_a_log_that_cannot_be_written_changes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Gone(OSError(28, "No space left on device")))
    with always_writable():
        print_error("afterimage", "lost")
        Display()("training", 1, 1)
        print_lines("kept")
    assert capsys.readouterr().out == "kept\n"
    with pytest.raises(SystemExit) as ended, always_writable():
        raise SystemExit(3)
    assert ended.value.code == 3


def test_text_that_is_no_character_is_written_and_read_back(tmp_path):
    name = os.fsdecode(b"\xff.png")
    write_json(tmp_path / "a.json", {"command": [name]})
    assert read_json(tmp_path / "a.json") == {"command": [name]}
    write_csv(tmp_path / "a.csv", [{"id": name}])
    write_atomic(tmp_path / "a.md", f"# {name}\n")
    for file in ("a.csv", "a.md"):
        assert "\\udcff.png" in (tmp_path / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder whose own name and whose images' names are no text, or steer a terminal."""
    folder = tmp_path_factory.mktemp("odd") / os.fsdecode(b"images \xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no name that is not text")
    random = np.random.default_rng(0)
    for i in range(10):
        pixels = np.kron(random.integers(0, 256, (5, 6, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / os.fsdecode(b"\x1b[31m\xfe %d.png" % i))
    return folder


def command(folder, *arguments, **environment):
    known = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIOENCODING", "LC_", "LANG"))}
    known |= {"AFTERIMAGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    known.pop("AFTERIMAGE_WEIGHTS", None)
    return {
        "args": [sys.executable, "-m", "afterimage", *map(str, arguments)],
        "env": known | environment, "cwd": folder,
    }  # fmt: skip


def test_odd_names_and_a_windows_log_from_training_to_a_report(odd, tmp_path, monkeypatch, capsys):
    arguments = [
        "train", f"{MODEL}:layer1", "--decoders", "linear", "--weights", "random", "--resize", 48, "--crop", 32,
        "--device", "cpu", "--data", f"folder:{odd}",
    ]  # fmt: skip
    log = tmp_path / "log.txt"
    with open(log, "wb") as out, open(FULL if FULL.exists() else os.devnull, "wb") as full:
        ended = subprocess.run(
            **command(tmp_path, *arguments, PYTHONIOENCODING="cp1252"), stdout=out, stderr=full, timeout=600
        )
    assert ended.returncode == 0
    text = log.read_bytes().decode("cp1252")
    assert "run: " in text and "PSNR" in text and "\\u" not in text
    (run,) = [run for run in scan(tmp_path / "runs") if run.state == "done"]
    assert run.config.data.source.startswith("file") is False and "%FF" in run.config.data.source
    assert read_json(run.file("environment.json"))["command"][-1] == f"folder:{odd}"

    monkeypatch.chdir(odd)  # another working folder than the run was made in
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    sample_images = sorted(odd.iterdir())[:2]
    for arguments, told in (
        (
            ["evaluate", run.path, "--output", tmp_path / os.fsdecode(b"scores \xff.csv")],
            "scores \\xff.csv",
        ),
        (["verify", run.path, "--device", "cpu"], "1 of 1 runs hold"),
        (["reconstruct", sample_images[0], run.path, "--output", tmp_path / "one.png"], "PSNR"),
        (
            ["reconstruct", *sample_images, run.path, "--output", tmp_path / "two.png"],
            "\\x1b[31m\\xfe 0",
        ),
        (["report", run.path, "--output-dir", tmp_path / os.fsdecode(b"report \xff")], "report \\xff"),
    ):
        main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert told in out, (arguments, out, err)
        assert "\x1b" not in out + err and "\udcff" not in out + err
    assert (tmp_path / os.fsdecode(b"report \xff") / "report.md").read_text(encoding="utf-8")


def test_tables_in_the_encoding_of_the_locale(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        **command(tmp_path, "layers", MODEL, **environment), capture_output=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    assert b"layer1" in ended.stdout and b"\\u25" not in ended.stdout
    ended = subprocess.run(**command(tmp_path, "--help", **environment), capture_output=True, timeout=600)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr


def test_a_reader_that_leaves_ends_nothing(tmp_path):
    child = subprocess.Popen(**command(tmp_path, "study"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(600) == 1 and err == b""


@needs_full
def test_a_full_disk_is_told(tmp_path):
    with open(FULL, "wb") as full:
        ended = subprocess.run(**command(tmp_path, "study"), stdout=full, stderr=subprocess.PIPE, timeout=600)
    assert ended.returncode == 1
    assert (
        ended.stderr == b"afterimage: standard output could not be written in full: No space left on device\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_output_that_is_closed_from_the_start(tmp_path):
    given = command(tmp_path, "study")
    line = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *given.pop("args")]
    assert subprocess.run(line, **given, timeout=600).returncode == 0
    assert Run(tmp_path).state == "new"


def test_files_of_tensors_are_read_whatever_their_path(odd):
    import torch
    from safetensors.numpy import save
    from safetensors.torch import save as save_torch

    from afterimage.analysis.audit.target import load_stored_pairs
    from afterimage.models.weight_files import read_named_tensors
    from afterimage.training.checkpoint import load_tensors

    folder = odd.parent / os.fsdecode(b"tensors \xff")
    folder.mkdir()
    tensors = {"conv.weight": torch.arange(6.0).reshape(2, 3)}
    for name in ("a.safetensors", "b.pth"):
        path = folder / name
        path.write_bytes(save_torch(tensors))
        if name == "b.pth":
            with open(path, "wb") as file:
                torch.save(tensors, file)
        else:
            assert torch.equal(load_tensors(path)[0]["conv.weight"], tensors["conv.weight"])
        assert torch.equal(read_named_tensors(path).tensors["conv.weight"], tensors["conv.weight"])
    sample_images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    arrays = {"images": sample_images, "features": np.zeros((10, 4), np.float32)}
    (folder / "pairs.safetensors").write_bytes(save(arrays))
    _, store = load_stored_pairs(AuditConfig(pairs=str(folder / "pairs.safetensors")).pairs)
    assert [spec.source for spec in store.specs.values()] == ["pairs.safetensors:features"]
