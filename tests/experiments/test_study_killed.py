"""A study that is killed at random moments and started again ends with the table of one that was not."""

import csv
import io
import os
import random
import signal
import sys
import time

import pytest

from afterimage.report.reading import read_rows
from afterimage.report.tables import csv_table
from afterimage.runs.run import scan
from children import MODEL, context, small_images

KILLS = 4
STUDY = """
title = "Killed"
sources = ["{model}:layer1", "{model}:layer3"]
decoders = ["linear", "transposed", "residual"]
weights = "random"

[data]
source = "folder:{images}"
resize = 48
crop = 32

[recipe]
epochs = 4
batch_size = 4

[[rows]]
sources = ["{model}:layer1", "{model}:layer2"]
fusion = {{ name = "attention", channels = 8 }}
decoders = ["transposed"]
"""


def run(file, root, cache):
    """What a child does."""
    import torch

    from afterimage.config.study import load_study
    from afterimage.experiments.study import run_study

    # Here and not in the parent: the server of later tests' children would start without it.
    os.environ.pop("AFTERIMAGE_WEIGHTS", None)
    torch.set_num_threads(1)
    _, failures = run_study(load_study(str(file)), root, cache=cache, accelerator="cpu")
    sys.exit(len(failures))


@pytest.fixture
def start(tmp_path):
    """Starts a process that runs the study in a folder; returns when it has begun."""
    file = tmp_path / "killed.toml"
    file.write_text(STUDY.format(model=MODEL, images=small_images(tmp_path / "images")))

    def start(root):
        (root / "study.toml").unlink(missing_ok=True)
        process = context().Process(target=run, args=(file, root, tmp_path / "cache"))
        process.start()
        while process.is_alive() and not (root / "study.toml").exists():
            time.sleep(0.005)
        return process

    return start


def table(root):
    """The report's table: every column of every row but times."""
    rows = csv.DictReader(io.StringIO(csv_table(read_rows(scan(root)))))
    return [{k: v for k, v in row.items() if k != "train_seconds"} for row in rows]


@pytest.mark.long
def test_killed_at_random_it_ends_with_the_same_table(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process, started = start(whole), time.monotonic()
    process.join(600)
    seconds = time.monotonic() - started
    assert process.exitcode == 0

    draw, kills = random.Random(3), 0
    for _ in range(KILLS):
        process = start(killed)
        process.join(draw.uniform(0, 0.6) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    assert kills >= 2, "the study was faster than expected: nothing was tested"
    process = start(killed)
    process.join(600)
    assert process.exitcode == 0
    assert table(killed) == table(whole) and len(table(whole)) == 2 * 3 + 1 + 5
    for done in scan(whole):
        assert (killed / done.name / "scores.csv").read_bytes() == done.file("scores.csv").read_bytes()
