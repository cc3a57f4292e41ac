"""A run's files on their way from a worker's machine: cut into pieces there, checked and put together here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.experiments.ray.post import Order, Piece
from afterimage.runs.failures import TRACEBACK
from afterimage.runs.files import sha256, write_atomic
from afterimage.runs.run import Run
from afterimage.training.checkpoint import CHECKPOINT, PREVIOUS

PIECE = 4 * 2**20
"""Bytes of a file that travel at once."""
STATUS = "status.json"
FILES = (
    "environment.json",
    "history.csv",
    "scores.csv",
    "summary.json",
    "decoder.safetensors",
    CHECKPOINT,
    TRACEBACK,
    STATUS,
)
IMAGE = re.compile(r"reconstructions/(\d{3,6})(\.original|\.weights\.\d{1,3})?\.png", re.ASCII)
INDEX = "reconstructions/index.json"
LIMITS = {".json": 64 * 2**20, ".txt": 2**24, ".csv": 2**30, ".png": 2**28, ".safetensors": 16 * 2**30}
"""Bytes that a file may have, by suffix."""


def is_allowed(name: str, keep: int) -> bool:
    """Whether a worker may send a file of this name, a path in the run folder; `keep` images belong to a run."""
    if name in FILES or name == INDEX:
        return True
    image = IMAGE.fullmatch(name)
    return image is not None and int(image[1]) < keep


def own_files(run: Run, keep: int) -> list[str]:
    """The names of the files in a run folder that go back, the status last: it says that the rest is there."""
    names = [path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()]
    return sorted((name for name in names if is_allowed(name, keep)), key=lambda name: (name == STATUS, name))


def pieces(order: Order, run: Run, name: str) -> Iterator[Piece]:
    """A file of a run in pieces, the same file throughout even where it is replaced meanwhile."""
    with open(run.file(name), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        file.seek(0)
        for offset in range(0, max(size, 1), PIECE):
            content = file.read(PIECE)
            yield Piece(order.number, order.attempt, run.name, name, size, digest, offset, content)


class Inbox:
    """The files of one attempt at a group, as they come in. `guard(run)` is called before anything is written."""

    def __init__(self, runs: Mapping[str, Run], keep: int, guard: Callable[[Run], None]) -> None:
        self.runs, self.keep, self.guard = runs, keep, guard
        self._open: tuple[Piece, bytearray] | None = None

    def add(self, piece: Piece) -> Path | None:
        """Take a piece in; the file's path once it is complete and written.

        Raises `AfterimageError` for a file that no worker may send: of an unknown run or name, too large, with
        pieces that do not fit together, or without the digest that it was announced with.
        """
        run = self._checked(piece)
        if piece.offset == 0:
            self._open = piece, bytearray()
        first, content = self._open or (None, bytearray())
        same = first is not None and (first.run, first.name, first.size, first.sha256) == (
            piece.run,
            piece.name,
            piece.size,
            piece.sha256,
        )
        if not same or piece.offset != len(content) or len(content) + len(piece.content) > piece.size:
            raise _refused(piece, "its pieces do not fit together")
        content += piece.content
        if len(content) < piece.size:
            return None
        self._open = None
        if hashlib.sha256(content).hexdigest() != piece.sha256:
            raise _refused(piece, "it does not have the digest that it was announced with")
        self.guard(run)
        write_atomic(
            run.file(piece.name),
            bytes(content),
            keep=run.file(PREVIOUS) if piece.name == CHECKPOINT else None,
        )
        return run.file(piece.name)

    def _checked(self, piece: Piece) -> Run:
        if piece.run not in self.runs:
            raise _refused(piece, "the group has no such run")
        if not is_allowed(piece.name, self.keep):
            raise _refused(piece, "no run has such a file")
        limit = LIMITS[Path(piece.name).suffix]
        if not 0 <= piece.size <= limit:
            raise _refused(piece, f"it has {piece.size:,} bytes, over the limit of {limit:,}")
        run = self.runs[piece.run]
        if not run.file(piece.name).parent.resolve().is_relative_to(run.path.resolve()):
            raise _refused(piece, "a link in the run folder leads out of it")
        return run


def check_result(run: Run, digest: str) -> None:
    """Raise `AfterimageError` unless a finished run's folder holds the result of the settings of that digest."""
    facts = run.summary.get("settings_sha256"), run.summary.get("decoder_sha256")
    if facts != (digest, sha256(run.file("decoder.safetensors"))):
        raise AfterimageError(f"{run.name}: what a worker sent back is not this run's result")


def _refused(piece: Piece, why: str) -> AfterimageError:
    return AfterimageError(f"a worker sent the file {piece.name!r:.100} of run {piece.run!r:.150}: {why}")
