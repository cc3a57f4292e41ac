"""Faults at chosen moments: killed inside a checkpoint, in what ends a run, in a report; a disk that fills there."""

import errno
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

import report_study
from afterimage import AfterimageError, train_runs
from afterimage.config import RunConfig
from afterimage.config.study import StudyConfig
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.study import run_study
from afterimage.report.reading import read_rows
from afterimage.report.write import write_report
from afterimage.runs import files
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run, scan
from afterimage.training import checkpoint
from children import MODEL, context, result, small_configs, small_images, train_child


@pytest.fixture(scope="module")
def only(sample_images) -> RunConfig:
    return small_configs(sample_images)[0]


@pytest.fixture(scope="module")
def whole(whole):
    """The result of the run that nothing happened to."""
    return whole[0]


def child(function, *arguments):
    process = context().Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dies(place, name, *, after=False, skip=0):
    """Let `place.name` kill the process when it is called, or right after, once it was called `skip` times."""
    original, calls = getattr(place, name), [0]

    def deadly(*arguments, **options):
        calls[0] += 1
        if calls[0] <= skip:
            return original(*arguments, **options)
        if after:
            original(*arguments, **options)
        die()

    setattr(place, name, deadly)


def dies_writing(name):
    """Die when this file of the run is begun."""
    make = tempfile.mkstemp

    def deadly(*arguments, **options):
        if options.get("prefix") == f".{name}.":
            die()
        return make(*arguments, **options)

    files.tempfile.mkstemp = deadly


IN_A_CHECKPOINT = {
    "before anything": lambda: dies(files.tempfile, "mkstemp"),
    "empty": lambda: dies(files.tempfile, "mkstemp", after=True),
    "not yet on disk": lambda: dies(files.os, "fsync"),
    "on disk, the last one still there": lambda: dies(files.os, "replace"),
    "there": lambda: dies(files.os, "replace", after=True),
}


def dying_in_a_checkpoint(config, root, cache, number, point):
    """Train until the checkpoint `number`, and die at this point of its writing."""
    written = [0]

    def writing(path, content, **options):
        written[0] += 1
        if written[0] == number:
            IN_A_CHECKPOINT[point]()
        write_atomic(path, content, **options)

    checkpoint.write_atomic = writing
    train_child([config], root, cache)


def test_killed_inside_a_checkpoint_it_goes_on_to_the_same_bits(only, cache, whole, tmp_path):
    """Each next process goes on from what the one before has left, and dies a moment later in the writing."""
    run = Run(tmp_path / only.name)
    for number, point in enumerate(IN_A_CHECKPOINT):
        # The first one dies in its third checkpoint, so that there are two before it; the others each in their second.
        code = child(dying_in_a_checkpoint, only, tmp_path, cache, 2 if number else 3, point)
        assert code == -signal.SIGKILL, point
        assert checkpoint.load_checkpoint(run, lambda text: None), point
    assert child(train_child, [only], tmp_path, cache) == 0
    assert result(run) == whole
    left = [path.name for path in run.path.rglob("*")]
    assert not [name for name in left if name.startswith((".", "lock", "checkpoint"))]


def test_a_checkpoint_is_on_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    """The file first, then the names, then the folder: in another order a power cut could leave neither."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def noting(*arguments, name=name, original=original):
            kind = "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}") else "file"
            done.append(f"{name} {kind}" if name == "fsync" else f"replace {Path(arguments[1]).name}")
            return original(*arguments)

        monkeypatch.setattr(files.os, name, noting)
    write_atomic(tmp_path / "new", b"1")
    assert done[-3:] == ["fsync file", "replace new", "fsync folder"]
    assert (tmp_path / "new").read_bytes() == b"1"


IN_THE_END = {
    "in the evaluation": lambda: dies(Metrics, "compare"),
    "before the decoder": lambda: dies_writing("decoder.safetensors"),
    "among the images": lambda: dies_writing("001.png"),
    "before the scores": lambda: dies_writing("scores.csv"),
    "before the summary": lambda: dies_writing("summary.json"),
    "before it is done": lambda: dies(Run, "set_state", skip=1),
    "before it is tidy": lambda: dies(Run, "set_state", after=True, skip=1),
}


def dying_in_the_end(config, root, cache, point):
    IN_THE_END[point]()
    train_child([config], root, cache)


@pytest.mark.long
def test_killed_in_what_ends_a_run_it_goes_on_to_the_same_bits(only, cache, whole, tmp_path):
    run = Run(tmp_path / only.name)
    for point in IN_THE_END:
        assert child(dying_in_the_end, only, tmp_path, cache, point) == -signal.SIGKILL, point
    assert child(train_child, [only], tmp_path, cache) == 0
    assert run.state == "done" and result(run) == whole
    left = [path.name for path in run.path.rglob("*")]
    assert not [name for name in left if name.startswith((".", "lock", "checkpoint"))]


@pytest.mark.parametrize("name", ["config.toml", "checkpoint.safetensors", "decoder.safetensors", "history.csv",
                                  "000.png", "index.json", "scores.csv", "summary.json", "status.json"])  # fmt: skip
def test_a_disk_that_is_full_for_one_file_costs_nothing(only, cache, whole, tmp_path, monkeypatch, name):
    """The message names the file; the same command goes on to the same result once there is room."""
    make = tempfile.mkstemp

    def full(*arguments, **options):
        if options.get("prefix") == f".{name}.":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(*arguments, **options)

    options = {"cache": cache, "accelerator": "cpu", "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkstemp", full)
        with pytest.raises(AfterimageError, match=f"cannot write .*{name}: No space left on device"):
            train_runs(only, tmp_path, **options)
    run = Run(tmp_path / only.name)
    assert not list(run.path.glob("lock*")) and run.state != "done"
    (run,) = train_runs(only, tmp_path, **options)
    assert run.state == "done" and result(run) == whole


def reporting(root, out, deaths):
    """Write the report without figures, which take most of its time; die at the so-many-th file."""
    import afterimage.report.figures as figures

    figures.draw = lambda *_, **__: ()
    if deaths is not None:
        dies(files.os, "replace", skip=deaths)
    write_report(scan(root), out, title="Killed")


@pytest.mark.long
def test_killed_in_a_report_the_next_one_is_whole(tmp_path):
    """Every file is a whole one at any moment, and what the killed process left half written is taken away."""
    root, out = tmp_path / "study", tmp_path / "report"
    originals = [report_study.sample_image(0, 24)]
    for decoder in ("linear", "attention"):
        report_study.write_run(root, MODEL, "layer1", decoder, originals=originals)
    assert child(reporting, root, tmp_path / "expected", None) == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    for deaths in (0, 3, len(expected) - 1):
        assert child(reporting, root, out, deaths) == -signal.SIGKILL
        for path in out.iterdir():
            assert path.suffix == files.TEMPORARY_SUFFIX or path.read_bytes() == expected[path.name]
    for path in out.glob(f".*{files.TEMPORARY_SUFFIX}"):  # as if it had happened an hour ago
        os.utime(path, (0, 0))
    assert child(reporting, root, out, None) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


MOMENTS = {"decoding": "decoding images", "evaluating": "evaluating"}


def command_line(arguments, output, ready, moment):
    """The command line in a child that waits, once it has come to this moment, for what will happen to it."""
    import torch

    from afterimage.cli import main
    from afterimage.runtime.terminal import Display

    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    show = Display.__call__

    def waiting(self, what, *rest, **figures):
        show(self, what, *rest, **figures)
        if moment and what.startswith(moment) and not ready.exists():
            ready.touch()
            time.sleep(0.5)

    Display.__call__ = waiting
    torch.set_num_threads(1)
    main(arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_other_moment_stops_cleanly_too(only, sample_images, whole, tmp_path, moment, number):
    """While images are decoded there is no step to wait for; while scores are taken there is a checkpoint."""
    arguments = [
        "train", *only.sources, "--decoders", "transposed", "--weights", "random", "--resize", "48", "--crop", "32",
        "--data", only.data.source, "--epochs", "2", "--batch-size", "4", "--device", "cpu",
        "--output-dir", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    output, ready = tmp_path / "output", tmp_path / "ready"
    process = context().Process(target=command_line, args=(arguments, output, ready, MOMENTS[moment]))
    process.start()
    until = time.monotonic() + 60
    while not ready.exists():
        assert process.is_alive() and time.monotonic() < until, output.read_text()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    text = output.read_text()
    assert process.exitcode == 128 + number and "Traceback" not in text, text
    assert "the same command goes on from there" in text
    run = Run(tmp_path / "runs" / only.name)
    # A score is not left half taken: what is being evaluated is done first.
    assert run.state == ("done" if moment == "evaluating" else "new") and not list(run.path.glob("lock*"))
    assert child(command_line, arguments, output, ready, "") == 0
    assert result(run) == whole


def test_a_image_replaced_while_a_study_runs_is_said(tmp_path, monkeypatch):
    """Between the baselines and the decoders: the rows tell that they did not have the same images."""
    sample_images = small_images(tmp_path / "images", 21)
    spare = (sample_images / "20.png").read_bytes()
    (sample_images / "20.png").unlink()
    config = small_configs(sample_images)[1]
    train = train_runs

    def replacing(*arguments, **options):
        for path in sample_images.iterdir():
            if path.stem in ("03", "07"):
                path.write_bytes(spare if path.stem == "03" else spare + b"another end")
        return train(*arguments, **options)

    monkeypatch.setattr("afterimage.experiments.queue.train_runs", replacing)
    study = StudyConfig(
        sources=config.sources, decoders=(config.decoder,), weights="random",
        data=replace(config.data, limit_test=2), recipe=config.recipe,
    )  # fmt: skip
    found, failures = run_study(study, tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    assert not failures and len({run.result.data.digest for run in found}) == 2
    warnings = " ".join(read_rows(found).warnings)
    assert "had 2 sets of images: files changed between them" in warnings
