"""Real processes for tests of resuming and of locks: torch is imported once, by the server they are forked from."""

import json
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from afterimage.config import DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.runs.files import read_csv, sha256
from afterimage.runs.run import Run

MODEL = "test_resnet.r160_in1k"
TIMES = ("seconds", "images_per_second")


def small_images(folder: Path, count: int = 20) -> Path:
    """Smooth images of two colours each."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        first, second = random.uniform(0, 255, (2, 3))
        ramp = np.linspace(0, 1, 48)[:, None, None]
        pixels = (first * ramp + second * (1 - ramp)) * np.ones((1, 60, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


def small_configs(sample_images: Path, weights: str = "random", **recipe) -> list[RunConfig]:
    """Three runs that are trained together: gradient descent, closed form, and both after each other."""
    base = RunConfig(
        (f"{MODEL}:layer2",),
        weights=weights,
        data=DataConfig(f"folder:{sample_images}", resize=48, crop=32),
        recipe=RecipeConfig(**{"epochs": 2, "batch_size": 4} | recipe),
    )
    kinds = [("transposed", "layer2", {}), ("linear", "layer1", {}), ("residual", "layer1", {"blocks": 1})]
    return [
        replace(base, sources=(f"{MODEL}:{layer}",), decoder=DecoderConfig(name, options=options))
        for name, layer, options in kinds
    ]


def context() -> multiprocessing.context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["afterimage.experiments.queue", "afterimage.experiments.study", "timm", "children"]
    )
    return server


def die_after(calls: int) -> None:
    """Kill this very process, as `kill -9` does, at its so-many-th call of any function, Python's or C's."""
    left = calls

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left <= 0 and event in ("call", "c_call"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def count_calls(file: Path) -> None:
    """Write down, at the end, how many events `die_after` would have counted."""
    total = 0

    def count(frame, event, argument):
        nonlocal total
        total += 1

    sys.setprofile(count)
    import atexit

    atexit.register(lambda: (sys.setprofile(None), file.write_text(str(total))))


def train_child(configs, root, cache, *, calls=None, counted=None, said=None, checkpoint_seconds=0.0) -> None:
    """What a child does: train the runs; `said` is a file that takes what progress says."""
    import torch

    from afterimage.experiments.queue import train_runs

    torch.set_num_threads(1)
    lines = []

    def progress(what, done, total, **figures):
        if said is not None and total == 1:
            lines.append(what)
            with open(said, "a", encoding="utf-8") as file:
                file.write(what + "\n")

    if calls is not None:
        die_after(calls)
    if counted is not None:
        count_calls(counted)
    train_runs(
        configs,
        root,
        cache=cache,
        accelerator="cpu",
        progress=progress,
        checkpoint_seconds=checkpoint_seconds,
    )
    if counted is not None:
        import atexit

        atexit._run_exitfuncs()


def result(run: Run) -> dict:
    """All of a run that must come out the same again: everything but times."""
    summary = {key: value for key, value in run.summary.items() if key != "train_seconds"}
    history = [{k: v for k, v in row.items() if k not in TIMES} for row in run.history]
    return {
        "decoder": sha256(run.file("decoder.safetensors")),
        "history": history,
        "scores": read_csv(run.file("scores.csv")),
        "summary": json.dumps(summary, sort_keys=True),
    }


def study_child(study, root, cache, log: Path, *, pause: float = 0.0) -> None:
    """Run a study; `log` takes a line for each run that this process begins, and what it says of others' runs."""
    import time

    import torch

    from afterimage.evaluation import baselines as references
    from afterimage.experiments.joint_run import JointRun
    from afterimage.experiments.study import run_study

    torch.set_num_threads(1)

    def note(line):
        with open(log, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    begin, summary = JointRun._member, references._summary

    def member(self, run, config):
        note(f"begins {run.name}")
        time.sleep(pause)
        return begin(self, run, config)

    def reference(name):
        note(f"begins {name}")
        return summary(name)

    JointRun._member, references._summary = member, reference
    run_study(
        study,
        root,
        cache=cache,
        accelerator="cpu",
        progress=lambda what, done, total, **_: note(what) if total == 1 else None,
    )


def hold(folder: Path, ready: Path) -> None:
    """Hold a folder's lock until killed."""
    import time

    from afterimage.runs.lock import Lock

    assert Lock(folder).acquire()
    ready.touch()
    time.sleep(600)


def take_turns(folder: Path, inside: Path, turns: int, failed: Path, seed: int) -> None:
    """Take a lock `turns` times and look that nobody else is inside; now and then die with the lock held."""
    import random
    import time

    from afterimage.runs.lock import Lock

    draw = random.Random(seed)
    lock = Lock(folder)
    for turn in range(turns):
        while not lock.acquire():
            time.sleep(draw.uniform(0, 0.005))
        try:
            inside.mkdir()
        except FileExistsError:
            failed.touch()
        time.sleep(draw.uniform(0, 0.002))
        inside.rmdir()
        if turn == turns - 1 and seed % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        lock.release()
