"""What runs on a worker: one group, trained as the local executor does, with word of it sent to the driver."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError
from afterimage.experiments.ray.post import Answer, Order, Said, Started

BEAT = 0.5
"""Seconds between two letters."""

Sent = Sequence[tuple[str, str, Sequence[Any]]]
"""Files that a worker is given: run, name, and references to the pieces."""


def train_group(order: Order, post: Any, checkpoints: Sent) -> Answer:
    """The Ray task: train the order's runs. Errors of runs are recorded in their folders and told in the answer."""
    _settle(order)
    if not order.fetch and not _sees(order):
        return Answer(unseen=True)
    if [config.digest for config in order.configs] != list(order.digests):
        raise AfterimageError(
            f"{socket.gethostname()} has another version of afterimage: it reads the runs' settings differently"
        )
    import torch

    from afterimage.experiments.queue import train_runs
    from afterimage.runs.run import Run
    from afterimage.runtime.signals import GracefulShutdown, Stopped

    torch.set_num_threads(order.threads)
    stop, failures, left, stopped = GracefulShutdown(), [], [], False
    with _folder(order) as root:
        runs = [Run.create(root, config) for config in order.configs]
        known = _unpack(root, checkpoints)
        with Courier(order, post, stop, runs if order.fetch else (), known) as courier:
            try:
                train_runs(
                    order.configs,
                    root,
                    cache=None if order.cache is None else Path(order.cache),
                    accelerator=order.accelerator,
                    progress=courier.progress,
                    keep=order.keep,
                    failures=failures,
                    checkpoint_seconds=order.checkpoint_seconds,
                    stop=stop,
                    left=left,
                )
            except Stopped:
                stopped = True
    return Answer(tuple(map(str, failures)), tuple(run.name for run in left), stopped=stopped)


def _settle(order: Order) -> None:
    """Stand where the driver stands, so that relative paths, settings and records mean the same."""
    if os.path.isdir(order.cwd):
        os.chdir(order.cwd)
    for name, value in order.environment.items():
        os.environ.setdefault(name, value)  # what a machine says of itself counts
    sys.argv[:] = order.command


def _sees(order: Order) -> bool:
    try:
        return Path(order.root, order.probe).read_text(encoding="utf-8") == order.token
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _folder(order: Order) -> Iterator[Path]:
    """Where the run folders are: the driver's own, or a folder of this machine that is removed afterwards."""
    if not order.fetch:
        yield Path(order.root)
        return
    root = Path(tempfile.mkdtemp(prefix="afterimage-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _unpack(root: Path, files: Sent) -> dict[Path, tuple[int, int]]:
    """Write the checkpoints that an earlier attempt left; returns their state, so that they are not sent back."""
    import ray

    known = {}
    for run, name, references in files:
        path = root / run / name
        with open(path, "wb") as file:
            for reference in references:
                file.write(ray.get(reference))
        known[path] = _sign(path)
    return known


def _sign(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ino


class Courier:
    """Sends the driver what progress says and, of `fetched` runs, the files; learns whether to stop.

    A thread does: a step never waits for the network. It ends with the last files when the block is left.
    """

    def __init__(
        self, order: Order, post: Any, stop: Any, fetched: Iterable[Any], known: dict[Path, Any]
    ) -> None:
        self.order, self.post, self.stop = order, post, stop
        self.fetched, self._known = list(fetched), known
        self._said: list[Any] = [Started(*self._key, socket.gethostname(), order.fetch)]
        self._shown, self._fetched_at = 0.0, time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def _key(self) -> tuple[int, int]:
        return self.order.number, self.order.attempt

    def progress(self, what: str, done: int, total: int, **figures: Any) -> None:
        now = time.monotonic()
        if done < total and now - self._shown < BEAT:
            return
        self._shown = now
        figures = {name: value() if callable(value) else value for name, value in figures.items()}
        said = Said(*self._key, what, done, total, figures)
        with self._lock:
            last = self._said[-1] if self._said else None
            if isinstance(last, Said) and last.done < last.total and last.what == what:
                self._said.pop()
            self._said.append(said)

    def __enter__(self) -> Courier:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while not self._over.wait(BEAT):
                self._send_said()
                if self.fetched and time.monotonic() - self._fetched_at >= self.order.fetch_seconds:
                    self._send_checkpoints()
                    self._fetched_at = time.monotonic()
            self._send_said()
            for run in self.fetched:
                self._send_result(run)
        except (
            BaseException
        ) as error:  # the driver is gone, or this thread is wrong: either way nobody listens
            self._error = error
            self.stop.number = self.stop.number or signal.SIGTERM

    def _send_said(self) -> None:
        with self._lock:
            letters, self._said = self._said, []
        self._put(letters)

    def _send_checkpoints(self) -> None:
        from afterimage.training.checkpoint import CHECKPOINT

        for run in self.fetched:
            if (sign := _sign(run.file(CHECKPOINT))) not in (None, self._known.get(run.file(CHECKPOINT))):
                self._send(run, CHECKPOINT)
                self._known[run.file(CHECKPOINT)] = sign

    def _send_result(self, run: Any) -> None:
        from afterimage.experiments.ray.files import own_files

        for name in own_files(run, self.order.keep):
            if _sign(run.file(name)) != self._known.get(run.file(name)):
                self._send(run, name)

    def _send(self, run: Any, name: str) -> None:
        from afterimage.experiments.ray.files import pieces

        with contextlib.suppress(FileNotFoundError):  # a checkpoint goes when its run is done
            for piece in pieces(self.order, run, name):
                self._put([piece], len(piece.content))

    def _put(self, letters: Sequence[Any], size: int = 0) -> None:
        import ray

        while True:
            accepted, stop = ray.get(self.post.put.remote(letters, size))
            if stop:
                self.stop.number = self.stop.number or signal.SIGTERM
            if accepted:
                return
            time.sleep(0.1)
