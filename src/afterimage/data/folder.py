"""A folder of pictures, nested to any depth, with splits of its own or without."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.data.decode import EXTENSIONS, read_bytes, reason, shown
from afterimage.data.index import Member, Shard
from afterimage.data.originals import FileOriginal
from afterimage.data.parallel import Progress
from afterimage.data.rows import Rows
from afterimage.data.shards import read_index
from afterimage.data.split import Source

MOST_KINDS = 1000
"""Kinds of other files that are counted: a file without an extension is a kind of its own."""
_VALIDATION = ("validation", "val", "valid")


class FolderShard(Shard):
    """All pictures below `path`; names are paths below `root`. A picture's place stands for its size and times."""

    prefix = ""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root

    def state(self) -> list[int]:
        return []

    def members(self) -> Iterator[Member]:
        others: Counter[str] = Counter()
        found = False
        for file in _walk(self.path):
            if file.suffix.lower() not in EXTENSIONS:
                if len(others) < MOST_KINDS:
                    others[file.suffix.lower() or file.name] += 1
                continue
            found, size, times = True, 0, ""
            with contextlib.suppress(OSError):  # said when it is read
                state = file.stat()
                size, times = state.st_size, f"{state.st_mtime_ns}/{state.st_ctime_ns}"
            name = os.fsencode(file.relative_to(self.root))
            mark = hashlib.sha256(f"{size}/{times}/".encode() + name).digest()
            yield name, int.from_bytes(mark[:8], "big", signed=True), size
        if not found:
            raise _no_pictures(self.path, others)

    def read(self, name: bytes, place: int, size: int) -> bytes:
        return read_bytes(self.root / os.fsdecode(name))

    def called(self, name: bytes) -> str:
        return shown(self.root / os.fsdecode(name))


def read_folder(path: str) -> Source:
    """All pictures below a folder, known by their file extension; hidden and other files are left out.

    A folder with a `train` folder and a `test` or `validation` (or `val`, `valid`) folder is split by these,
    and what lies beside them is left out.
    """
    root, parts = _parts(path)
    return Source(*(part and list_pictures(part, root) for part in parts), root=root)


def index_folder(path: str, cache: Path, progress: Progress | None = None) -> Source:
    """The same pictures as `read_folder` finds, read through and kept in an index."""
    root, parts = _parts(path)
    found = (part and Rows(read_index([FolderShard(part, root)], cache, progress)) for part in parts)
    return Source(*found, root=root)


def more_pictures_than(path: str, count: int) -> bool:
    """Whether a folder holds more pictures than so many."""
    _, parts = _parts(path)
    files = (file for part in parts if part is not None for file in _walk(part))
    pictures = (file for file in files if file.suffix.lower() in EXTENSIONS)
    return next(islice(pictures, count, None), None) is not None


def _parts(path: str) -> tuple[Path, list[Path | None]]:
    """The folder, and its parts to train, to validate and to test on where it has them, else itself."""
    root = Path(os.path.expanduser(path))
    try:
        with os.scandir(root) as entries:
            folders = sorted(entry.name for entry in entries if _is_folder(entry))
        names = {name.lower(): root / name for name in folders}
    except (OSError, ValueError) as error:
        raise AfterimageError(f"cannot read the folder {shown(root)}: {reason(error)}") from None
    train, test = names.get("train"), names.get("test")
    validation = next((names[name] for name in _VALIDATION if name in names), None)
    if train is None or (test is None and validation is None):
        return root, [root, None, None]
    return root, [train, validation, test]


def list_pictures(folder: Path, root: Path) -> list[FileOriginal]:
    """The pictures below `folder`, sorted by id: the path below `root`. Raises where there are none."""
    found: dict[str, FileOriginal] = {}
    others: Counter[str] = Counter()
    for file in sorted(_walk(folder)):
        if file.suffix.lower() not in EXTENSIONS:
            others[file.suffix.lower() or file.name] += 1
            continue
        name = shown(file.relative_to(root)).replace(os.sep, "/")
        while name in found:  # two names that differ only in bytes that are no text
            name += "~"
        found[name] = FileOriginal(name, file)
    if not found:
        raise _no_pictures(folder, others)
    return [found[name] for name in sorted(found)]


def _no_pictures(folder: Path, others: Counter[str]) -> AfterimageError:
    kinds = ", ".join(f"{count} {shown(kind)}" for kind, count in others.most_common(5))
    return AfterimageError(
        f"there are no pictures in {shown(folder)} or below it; looked for {', '.join(EXTENSIONS)}"
        + (f" and found only {kinds}" if kinds else "")
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, in no order, never all in memory.

    Links to folders are followed, each folder once, so that a loop of links ends.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    try:
        while waiting:
            current = waiting.pop()
            state = os.stat(current)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            folders = []
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not _is_folder(entry):
                        yield current / entry.name
                    elif entry.name != "__MACOSX":
                        folders.append(current / entry.name)
            waiting += sorted(folders, reverse=True)
    except OSError as error:
        raise AfterimageError(f"cannot read the folder {shown(error.filename)}: {reason(error)}") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False
