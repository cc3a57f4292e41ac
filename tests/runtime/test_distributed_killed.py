import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afterimage.experiments.queue import train_runs
from afterimage.runs.files import read_csv
from afterimage.runs.run import Run
from afterimage.training.checkpoint import CHECKPOINT
from children import MODEL, small_configs
from rank_children import ends, run_ranks, start_ranks, train_ranks
from test_distributed import same

BOUND = 60
"""Seconds within which all ranks must have ended after one has, on a machine with much else to do."""


@pytest.fixture(scope="module")
def configs(sample_images):
    return small_configs(sample_images, "random-init", epochs=3)[::2]


@pytest.fixture(scope="module")
def whole(configs, cache, tmp_path_factory):
    """The runs of one process that was never stopped."""
    return train_runs(configs, tmp_path_factory.mktemp("whole"), cache=cache, accelerator="cpu")


def wait_for(path, text, seconds=120):
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"{path} never said {text!r}"
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_killed_ends_the_run_which_then_goes_on(configs, cache, tmp_path, whole, rank):
    said = tmp_path / "said"
    processes = start_ranks(3, train_ranks, configs, tmp_path / "runs", cache, said=said, pace=0.2)
    wait_for(said, "training")
    processes[rank].kill()
    codes = ends(processes, BOUND)
    assert codes[rank] == -signal.SIGKILL and all(code == 1 for i, code in enumerate(codes) if i != rank)
    text = said.read_text()
    speaker = 0 if rank else 1
    assert f"rank {speaker} says: rank {rank} (process {processes[rank].pid} on" in text
    assert "has ended; the same command, on any number of devices, goes on from the last checkpoint" in text
    runs = [Run(tmp_path / "runs" / config.name) for config in configs]
    # The leading rank, where it lives, has kept the steps up to that moment.
    assert [run.state for run in runs] == ["stopped" if rank else "running"] * len(runs)
    assert all(run.file(CHECKPOINT).exists() for run in runs) or not rank
    assert run_ranks(2, train_ranks, configs, tmp_path / "runs", cache, said=said) == [0, 0]
    assert "image" in said.read_text().partition("goes on after epoch")[2].partition("\n")[0] or not rank
    for run, expected in zip(runs, whole, strict=True):
        same(run, expected)


@pytest.mark.parametrize("to", ["one", "all, twice"])
def test_sigterm_is_a_clean_stop_of_all(configs, cache, tmp_path, to):
    said = tmp_path / "said"
    processes = start_ranks(2, train_ranks, configs[:1], tmp_path / "runs", cache, said=said, pace=0.2)
    wait_for(said, "training")
    for process in processes[1:] if to == "one" else processes * 2:
        process.terminate()
    assert ends(processes, BOUND) == [1, 1]
    run = Run(tmp_path / "runs" / configs[0].name)
    assert run.state == "stopped" and run.file(CHECKPOINT).exists()
    assert not list(run.path.glob("lock.*"))


@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_result(configs, cache, tmp_path, whole):
    draw, said = random.Random(11), tmp_path / "said"
    for _ in range(8):
        processes = start_ranks(3, train_ranks, configs, tmp_path / "runs", cache, said=said, pace=0.05)
        time.sleep(draw.uniform(1, 12))
        draw.choice(processes).kill()
        codes = ends(processes, BOUND)
        assert None not in codes
    assert run_ranks(3, train_ranks, configs, tmp_path / "runs", cache, said=said) == [0, 0, 0]
    for config, expected in zip(configs, whole, strict=True):
        run = Run(tmp_path / "runs" / config.name)
        same(run, expected)
        assert not [path for path in run.path.iterdir() if path.name.startswith(("lock", "checkpoint", "."))]


ARGUMENTS = [
    *("train", f"{MODEL}:layer2", "--weights", "random-init", "--decoders", "residual", "linear"),
    *("--data", "procedural:20", "--test", "procedural:5", "--resize", "48", "--crop", "32"),
    *("--batch-size", "3", "--device", "cpu"),
]


def command(folder, *more, torchrun=0):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)] if torchrun else []
    line = [sys.executable, *start, "-m", "afterimage", *ARGUMENTS, "--output-dir", "runs", *more]
    environment = os.environ | {"AFTERIMAGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=open(folder / "err", "w")
    )


def finish(process, folder, seconds=240):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output.decode(), (folder / "err").read_text()


def scores(folder):
    return {path.parent.name: read_csv(path) for path in folder.glob("runs/*/scores.csv")}


@pytest.mark.long
def test_the_command_line_gives_one_table_whatever_starts_it(tmp_path):
    tables = []
    for name, more in {"one": {}, "devices": {"devices": 2}, "torchrun": {"torchrun": 3}}.items():
        folder = tmp_path / name
        folder.mkdir()
        flags = ["--devices", "2"] if "devices" in more else []
        code, output, errors = finish(
            command(folder, "--epochs", "2", *flags, torchrun=more.get("torchrun", 0)), folder
        )
        assert code == 0, errors
        assert output.count("PSNR") == 1 and errors.count("training  ") >= 1
        tables.append(scores(folder))
    assert len(tables[0]) == 2
    for table in tables[1:]:
        for run, rows in tables[0].items():
            for row, other in zip(table[run], rows, strict=True):
                assert row["id"] == other["id"] and row["psnr"] == pytest.approx(other["psnr"], abs=0.02)


@pytest.mark.long
def test_a_rank_of_the_command_line_killed_and_stopped(tmp_path):
    process = command(tmp_path, "--epochs", "300", "--devices", "2")
    wait_for(tmp_path / "err", "training  ")
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    victim = next(pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    code, _, errors = finish(process, tmp_path, BOUND)
    assert code == 1 and f"rank 1 (process {victim}) was ended by SIGKILL" in errors
    assert "goes on from the last checkpoint" in errors and "Traceback" not in errors
    process = command(tmp_path, "--epochs", "300", "--devices", "2")
    wait_for(tmp_path / "err", "goes on after epoch")
    wait_for(tmp_path / "err", "training  ")
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process, tmp_path, BOUND)
    assert code == 128 + signal.SIGTERM and len(re.findall("afterimage: stopped; what is done", errors)) == 1
    assert {run.state for run in map(Run, (tmp_path / "runs").iterdir())} == {"stopped", "done"}
