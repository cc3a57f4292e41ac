"""Ray tasks on a worker: training of one group of runs, and search for one measured bound."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError, RunConfig
from afterimage.config.study import StudyConfig
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run
from afterimage.runtime.terminal import Progress

MESSAGE_SECONDS = 0.5
"""Minimum seconds between two progress messages of a group; more frequent ones could not be read."""
Folders = Mapping[str, Mapping[str, bytes]]
"""Contents of the files of run folders, by the run's name and then by the file's path in the run folder."""


@dataclass
class GroupOutcome:
    """Outcome of an attempt to train a group.

    Attributes:
        failures: errors of the group's runs
        skipped: names of runs that other processes are training
        stopped: whether training stopped because it was asked to
        folders: files of run folders that the driver cannot see
    """

    failures: list[AfterimageError] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    stopped: bool = False
    folders: Folders = field(default_factory=dict)


def folder_identity(root: str, config: RunConfig) -> tuple[int, int] | None:
    """Identify a folder by a run's `config.toml` in it, to tell equal paths on two machines apart.

    Args:
        root: folder of the run folders
        config: a run whose folder the driver has created

    Returns:
        the file's inode number and modification time in nanoseconds; None if there is no such file
    """
    try:
        state = Path(root, config.name, "config.toml").stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def run_task(
    work: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    number: int,
    threads: int,
    messages: Any,
    cwd: str,
    command: Sequence[str],
    environment: Mapping[str, str],
) -> Any:
    """Do a piece of work as the driver would: this is the Ray task.

    Args:
        work: `train_group` or `find_bound`
        arguments: arguments of `work`, which also gets `progress`
        number: number of the task, sent with every message
        threads: number of PyTorch threads
        messages: Ray's queue of messages to the driver
        cwd, command, environment: those of the driver, see `driver_context`
    """
    import torch

    if os.path.isdir(cwd):
        os.chdir(cwd)
    sys.argv[:] = command
    for name, value in environment.items():
        os.environ.setdefault(name, value)  # variables that are set on this machine take precedence
    torch.set_num_threads(threads)
    return work(progress=_send_to(messages, number), **arguments)


def train_group(
    configs: Mapping[str, RunConfig],
    root: str,
    *,
    folder: tuple[int, int] | None,
    sent: Folders,
    options: Mapping[str, Any],
    progress: Progress,
) -> GroupOutcome | None:
    """Train a group of runs on a worker, as `queue.train_runs` does locally.

    A failed run is recorded in its folder. Ray cancels a task with the effect of Ctrl-C: training then stops after the
    current step, with a checkpoint.

    Args:
        configs: the runs, by the digest of their settings as the driver computes it
        root: the driver's folder of run folders
        folder: identity of `root` on the driver (see `folder_identity`); None trains in a temporary folder of this
            machine
        sent: initial files of the run folders, if they are temporary
        options: options of `queue.train_runs`
        progress: callback for progress and messages

    Returns:
        the outcome; None if this machine does not see the driver's folder, in which case nothing was done

    Raises:
        AfterimageError: this machine computes other digests, since its version of afterimage differs
    """
    runs = list(configs.values())
    if folder is not None and folder_identity(root, runs[0]) != folder:
        return None
    if any(config.digest != digest for digest, config in configs.items()):
        raise AfterimageError(
            f"{socket.gethostname()} has another version of afterimage: it reads the runs' settings differently"
        )
    from afterimage.experiments.queue import train_runs
    from afterimage.runtime.process import Stopped

    outcome = GroupOutcome()
    skipped: list[Run] = []
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
            train_runs(runs, root, progress=progress, failures=outcome.failures, skipped=skipped, **options)
        except Stopped:
            outcome.stopped = True
        outcome.skipped = [run.name for run in skipped]
        if folder is None:
            outcome.folders = {config.name: pack(Run(Path(root, config.name))) for config in runs}
    return outcome


def find_bound(
    name: str,
    study: StudyConfig,
    root: str,
    *,
    folder: tuple[int, int] | None,
    options: Mapping[str, Any],
    progress: Progress,
) -> tuple[list[str], list[AfterimageError]] | None:
    """Find the measured bound of one run on a worker, as `study.find_bounds` does locally.

    Args:
        name: name of the run's folder in `root`
        study: number of test images to invert, and settings of the inversion
        root, folder, progress: as for `train_group`
        options: options of `study.find_bounds`

    Returns:
        names of the finished inversions, and the failures; None if this machine does not see the driver's folder
    """
    run = Run(Path(root, name))
    if folder is None or not run.file("config.toml").exists() or folder_identity(root, run.config) != folder:
        return None
    from afterimage.experiments.study import find_bounds

    failures: list[AfterimageError] = []
    progress(f"is searched on {socket.gethostname()}: the bound of {name}", 1, 1)
    found = find_bounds([run], study, root, failures, progress=progress, **options)
    return [run.name for run in found], failures


def driver_context() -> dict[str, Any]:
    """Return `cwd`, `command` and `environment` of the driver, so that relative paths, settings and records agree."""
    own = {key: value for key, value in os.environ.items() if key.startswith("AFTERIMAGE_")}
    return {"cwd": os.getcwd(), "command": sys.argv, "environment": own}


def _send_to(messages: Any, number: int) -> Progress:
    """Return a progress callback that sends progress and messages to the driver."""
    from ray.exceptions import RayError

    sent_at = 0.0

    def progress(what: str, done: int, total: int, **figures: Any) -> None:
        nonlocal sent_at
        if done < total and time.monotonic() - sent_at < MESSAGE_SECONDS:
            return
        sent_at = time.monotonic()
        figures = {name: value() if callable(value) else value for name, value in figures.items()}
        with contextlib.suppress(
            RayError
        ):  # a driver that was killed reads no messages, but the work goes on
            messages.put((number, what, done, total, figures))

    return progress


def pack(run: Run) -> dict[str, bytes]:
    """Read the files of a run folder; `status.json` comes last, since it marks the other files as complete."""
    files = sorted(run.path.rglob("*"), key=lambda path: (path.name == "status.json", path))
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in files if path.is_file()}


def unpack(run: Run, files: Mapping[str, bytes]) -> None:
    """Write files into a run folder, in the given order."""
    for name, content in files.items():
        write_atomic(run.file(name), content)
