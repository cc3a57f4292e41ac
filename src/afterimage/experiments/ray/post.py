"""What workers and the driver tell each other while a group is trained: the letters, and the office that keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afterimage.config import RunConfig

CAPACITY = 64 * 2**20
"""Bytes of file parts that wait for the driver; who would put more waits."""


@dataclass(frozen=True)
class Order:
    """One attempt at a group: what a worker is to do, and where the driver stands.

    `probe` is a file in the run folders' root with `token` in it: who sees it writes there, anyone else, and
    everyone with `fetch`, works in a folder of its own whose files go back by post.
    """

    number: int
    attempt: int
    configs: tuple[RunConfig, ...]
    digests: tuple[str, ...]
    root: str
    probe: str
    token: str
    fetch: bool
    cwd: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    cache: str | None
    accelerator: str
    keep: int
    threads: int
    checkpoint_seconds: float
    fetch_seconds: float


@dataclass(frozen=True)
class Answer:
    """How an attempt ended. `left` names runs that another process is at; `unseen`: nothing was done, since the
    worker does not see the driver's folder."""

    failures: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    unseen: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class Started:
    """A worker on `machine` has begun."""

    number: int
    attempt: int
    machine: str
    fetch: bool


@dataclass(frozen=True)
class Said:
    """A call of a worker's progress."""

    number: int
    attempt: int
    what: str
    done: int
    total: int
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Piece:
    """A part of one of a run's files: `size` and `sha256` are the whole file's."""

    number: int
    attempt: int
    run: str
    name: str
    size: int
    sha256: str
    offset: int
    content: bytes


class Post:
    """The office between workers and the driver; a Ray actor on the driver's machine."""

    def __init__(self) -> None:
        self._letters: list[Any] = []
        self._bytes = 0
        self._stopped = False

    def put(self, letters: Sequence[Any], size: int = 0) -> tuple[bool, bool]:
        """Whether the letters, with `size` bytes of files, were taken in, and whether workers are to stop."""
        if size and self._bytes and self._bytes + size > CAPACITY:
            return False, self._stopped
        self._letters += letters
        self._bytes += size
        return True, self._stopped

    def take(self) -> list[Any]:
        """What came in since the last call, in order."""
        letters, self._letters, self._bytes = self._letters, [], 0
        return letters

    def stop(self) -> None:
        """Tell every worker to stop after the step under way."""
        self._stopped = True
