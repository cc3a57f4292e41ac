"""Train one group of runs on a worker, as `experiments.queue` does locally."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, RunConfig
from afterimage.config.study import StudyConfig
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run
from afterimage.runtime.progress import Progress

MESSAGE_SECONDS = 0.5
"""Least time between two messages that only say how far a group is; nobody reads faster."""
Folders = Mapping[str, Mapping[str, bytes]]
"""Files of run folders: by the run's name, then by the file's path in its folder."""


@dataclass
class Answer:
    """The outcome of an attempt at a group.

    Attributes:
        failures: errors of its runs
        left: names of runs that other processes are training
        stopped: whether it was asked to stop
        folders: files of run folders that the driver cannot see
    """

    failures: list[AfterimageError] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    stopped: bool = False
    folders: Folders = field(default_factory=dict)


class Messages:
    """Keeps messages of workers until the driver takes them; a Ray actor on the driver's machine."""

    def __init__(self) -> None:
        self._kept: list[tuple] = []

    def put(self, message: tuple) -> None:
        """Add a message."""
        self._kept.append(message)

    def arrived(self) -> None:
        """Return when everything that the caller has put before is here."""

    def take(self) -> list[tuple]:
        """Return the messages since the last call."""
        kept, self._kept = self._kept, []
        return kept


def identify(root: str, config: RunConfig) -> tuple[int, int] | None:
    """Identify a folder by a file that the driver has made in it, to tell equal paths on two machines apart.

    Returns:
        the file's device and number; None if it is not there
    """
    try:
        state = Path(root, config.name, "config.toml").stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def train_group(
    number: int,
    configs: Mapping[str, RunConfig],
    root: str,
    *,
    folder: tuple[int, int] | None,
    sent: Folders,
    threads: int,
    options: Mapping[str, Any],
    cwd: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    messages: Any,
) -> Answer | None:
    """Train a group of runs; the Ray task.

    A run that fails is recorded in its folder. Ray cancels a task as Ctrl-C would: training then stops after the
    current step, with a checkpoint.

    Args:
        number: number of the group, which goes with every message
        configs: the runs, by the digest that the driver reads in their settings
        root: the driver's folder of run folders
        folder: identifies `root` (see `identify`); None trains the runs in a folder of this machine
        sent: files that a folder of this machine begins with
        threads: number of PyTorch's threads
        options: options of `queue.train_runs`
        cwd, command, environment: the driver's own, so that relative paths, settings and records agree
        messages: the actor that takes messages to the driver

    Returns:
        the outcome; None if this machine does not see the folder, and nothing was done
    """
    _take_after(cwd, command, environment)
    runs = list(configs.values())
    if folder is not None and identify(root, runs[0]) != folder:
        return None
    if any(config.digest != digest for digest, config in configs.items()):
        raise AfterimageError(
            f"{socket.gethostname()} has another version of afterimage: it reads the runs' settings differently"
        )
    import ray
    import torch

    from afterimage.experiments.queue import train_runs
    from afterimage.runtime.signals import Stopped

    torch.set_num_threads(threads)
    progress = _send_to(messages, number)
    answer = Answer()
    left: list[Run] = []
    with contextlib.ExitStack() as stack:
        where = "in the shared folder"
        if folder is None:
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="afterimage-"))
            where = "in a folder of its own, which is sent back at the end"
            for config in runs:
                unpack(Run.create(root, config), sent.get(config.name, {}))
        names = ", ".join(config.name for config in runs)
        progress(f"is trained on {socket.gethostname()} {where}: {names}", 1, 1)
        try:
            train_runs(runs, root, progress=progress, failures=answer.failures, left=left, **options)
        except Stopped:
            answer.stopped = True
        answer.left = [run.name for run in left]
        if folder is None:
            answer.folders = {config.name: pack(Run(Path(root, config.name))) for config in runs}
    ray.get(messages.arrived.remote())  # what was sent before the answer arrives before it
    return answer


def find_bound(
    number: int,
    name: str,
    study: StudyConfig,
    root: str,
    *,
    folder: tuple[int, int] | None,
    threads: int,
    options: Mapping[str, Any],
    cwd: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    messages: Any,
) -> tuple[list[str], list[AfterimageError]] | None:
    """Find the measured bound of one run; the Ray task.

    Args:
        number: number of the run, which goes with every message
        name: the run's folder in `root`
        study: how many of its images are inverted, and how
        root: the driver's folder of run folders
        folder: identifies `root` (see `identify`)
        threads: number of PyTorch's threads
        options: options of `study.find_bounds`
        cwd, command, environment, messages: as for `train_group`

    Returns:
        the names of the finished inversions, and the failures; None if this machine does not see the folder
    """
    _take_after(cwd, command, environment)
    run = Run(Path(root, name))
    if folder is None or not run.file("config.toml").exists() or identify(root, run.config) != folder:
        return None
    import ray
    import torch

    from afterimage.experiments.study import find_bounds

    torch.set_num_threads(threads)
    progress, failures = _send_to(messages, number), []
    progress(f"is searched on {socket.gethostname()}: the bound of {name}", 1, 1)
    found = find_bounds([run], study, root, failures, progress=progress, **options)
    ray.get(messages.arrived.remote())
    return [run.name for run in found], failures


def driver_context() -> dict[str, Any]:
    """Return what workers take over from the driver: the arguments `cwd`, `command` and `environment` of a task."""
    own = {key: value for key, value in os.environ.items() if key.startswith("AFTERIMAGE_")}
    return {"cwd": os.getcwd(), "command": sys.argv, "environment": own}


def _take_after(cwd: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Take over what relative paths, settings and records depend on."""
    if os.path.isdir(cwd):
        os.chdir(cwd)
    sys.argv[:] = command
    for name, value in environment.items():
        os.environ.setdefault(name, value)  # what a machine says of itself counts


def _send_to(messages: Any, number: int) -> Progress:
    """A progress callback that sends what it is told to the driver, and does not wait for that."""
    sent_at = 0.0

    def progress(what: str, done: int, total: int, **figures: Any) -> None:
        nonlocal sent_at
        if done < total and time.monotonic() - sent_at < MESSAGE_SECONDS:
            return
        sent_at = time.monotonic()
        figures = {name: value() if callable(value) else value for name, value in figures.items()}
        messages.put.remote((number, what, done, total, figures))

    return progress


def pack(run: Run) -> dict[str, bytes]:
    """Read the files of a run folder; the status comes last, since it says that the rest is there."""
    files = sorted(run.path.rglob("*"), key=lambda path: (path.name == "status.json", path))
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in files if path.is_file()}


def unpack(run: Run, files: Mapping[str, bytes]) -> None:
    """Write files into a run folder, in their order."""
    for name, content in files.items():
        write_atomic(run.file(name), content)
