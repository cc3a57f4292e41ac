"""A folder of images, nested to any depth, with splits of its own or without."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from afterimage.config import AfterimageError, local_path
from afterimage.data.decode import EXTENSIONS, read_bytes, reason, shown
from afterimage.data.names import (
    PLAIN,
    SPLIT_WORDS,
    TEST,
    TRAINING,
    VALIDATION,
    count_kind,
    kind_of,
    left_out,
    listed,
    nested_split,
    pooled_names,
    split_names,
)
from afterimage.data.records import FileOriginal, Original
from afterimage.data.shard_index import Member, Rows, Shard
from afterimage.data.sources.shards import read_index
from afterimage.data.splits import Source
from afterimage.runtime.threads import Progress

WORDS = frozenset(word for words in SPLIT_WORDS.values() for word in words)


class FolderShard(Shard):
    """All images below `path`; names are paths below `root`. An image's place stands for its size and times."""

    prefix = ""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root, self.others = path, root, Counter()

    def state(self) -> list[int]:
        return []

    def members(self) -> Iterator[Member]:
        self.others.clear()
        found = False
        for file in _walk(self.path):
            if file.suffix.lower() not in EXTENSIONS:
                count_kind(self.others, file.name)
                continue
            found, size, times = True, 0, ""
            with contextlib.suppress(OSError):  # said when it is read
                state = file.stat()
                size, times = state.st_size, f"{state.st_mtime_ns}/{state.st_ctime_ns}"
            name = os.fsencode(file.relative_to(self.root))
            mark = hashlib.sha256(f"{size}/{times}/".encode() + name).digest()
            yield name, int.from_bytes(mark[:8], "big", signed=True), size
        if not found:
            raise _no_images(self.path, self.others)

    def read(self, name: bytes, place: int, size: int) -> bytes:
        return read_bytes(self.root / os.fsdecode(name))

    def called(self, name: bytes) -> str:
        return shown(self.root / os.fsdecode(name))


@dataclass(frozen=True)
class Layout:
    """How a folder is split: the folders of each part, all of it under `TRAINING` where it has no parts of its own.

    `count` is how many images they hold, `notes` and `pooled` are a `Source`'s.
    """

    root: Path
    parts: Mapping[str, Sequence[Path]]
    count: int
    notes: tuple[str, ...]
    pooled: tuple[str, ...] = ()

    def source(self, read: Callable[[Sequence[Path]], Sequence[Original]]) -> Source:
        """The source of which `read` reads the folders of a part."""
        found = (self.parts.get(part) for part in (TRAINING, VALIDATION, TEST))
        return Source(*(part and read(part) for part in found), self.root, self.notes, self.pooled)


def read_folder(path: str) -> Source:
    """All images below a folder, known by their file extension; hidden and other files are left out.

    Folders that are named after the parts of a split (`SPLIT_WORDS`), one for training and one for validation or test
    at least, are its split, at the first level where everything has a place in one; what lies beside them is left out.
    """
    return _listed(look_into(path))


def index_folder(path: str, cache: Path, progress: Progress | None = None) -> Source:
    """The same images as `read_folder` finds, read through and kept in an index."""
    return _indexed(look_into(path), cache, progress)


def open_folder(path: str, cache: Path, progress: Progress | None = None, *, above: int) -> Source:
    """`index_folder` where a folder holds more than so many images, else `read_folder`."""
    layout = look_into(path)
    return _indexed(layout, cache, progress) if layout.count > above else _listed(layout)


def _listed(layout: Layout) -> Source:
    return layout.source(lambda folders: list_images(folders, layout.root))


def _indexed(layout: Layout, cache: Path, progress: Progress | None) -> Source:
    def read(folders: Sequence[Path]) -> Rows:
        return Rows(read_index([FolderShard(folder, layout.root) for folder in folders], cache, progress))

    return layout.source(read)


def look_into(path: str) -> Layout:
    """Walk through a folder once: how it is split, and what is left out."""
    root = Path(local_path(path))
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if _is_folder(entry)]
    except (OSError, ValueError) as error:
        raise AfterimageError(f"cannot read the folder {shown(root)}: {reason(error)}") from None
    images, others = _survey(root)
    # One that is called `train` is meant to train, also where it is empty: that is an error, and says so.
    top = {name for name in names if name.lower() in WORDS} | {place[0] for place in images if place}
    depth, parts = (0, at_top) if (at_top := split_names(top)) else nested_split(images.keys()) or (0, {})
    if not parts:
        pooled = tuple(map(shown, pooled_names(images.keys())))
        return Layout(
            root, {TRAINING: [root]}, images.total(), tuple(left_out(_total(others.values()))), pooled
        )

    def part_of(place: tuple[str, ...]) -> str | None:
        return parts.get(place[depth]) if len(place) > depth else None

    places = {place[: depth + 1] for place in images} | ({(name,) for name in top} if depth == 0 else set())
    folders = {
        part: [root.joinpath(*place) for place in sorted(places) if part_of(place) == part]
        for part in SPLIT_WORDS
        if part in parts.values()
    }
    notes = left_out(_total(kinds for place, kinds in others.items() if part_of(place)))
    if depth or not PLAIN.issuperset(map(str.lower, parts)):
        told = {
            part: listed([shown(folder.relative_to(root)) for folder in own]) for part, own in folders.items()
        }
        what = "; ".join(f"{part} images from {own}" for part, own in told.items())
        notes.append(f"split by the names of folders: {what}")
    beside: Counter[str] = Counter()
    for place, count in images.items():
        if not part_of(place):
            beside[shown(os.path.join(*place[: depth + 1])) if place else "the folder itself"] += count
    if beside:
        told_beside = listed([f"{count:,} in {place}" for place, count in beside.most_common()])
        notes.append(f"left out beside the folders of the split: {beside.total():,} images, {told_beside}")
    count = sum(count for place, count in images.items() if part_of(place))
    return Layout(root, folders, count, tuple(notes))


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())


def _survey(root: Path) -> tuple[Counter[tuple[str, ...]], dict[tuple[str, ...], Counter[str]]]:
    """How many images and which other files lie in each folder, by its path below `root`."""
    images: Counter[tuple[str, ...]] = Counter()
    others: dict[tuple[str, ...], Counter[str]] = {}
    folder, place = root, ()
    for current, name in _entries(root, strict=False):
        if current is not folder:
            folder, place = current, current.relative_to(root).parts
        if kind_of(name) in EXTENSIONS:
            images[place] += 1
        else:
            count_kind(others.setdefault(place, Counter()), name)
    return images, others


def list_images(folders: Sequence[Path], root: Path) -> list[FileOriginal]:
    """The images below `folders`, sorted by id: the path below `root`. Raises where there are none."""
    found: dict[str, FileOriginal] = {}
    others: Counter[str] = Counter()
    for file in sorted(file for folder in folders for file in _walk(folder)):
        if file.suffix.lower() not in EXTENSIONS:
            count_kind(others, file.name)
            continue
        name = shown(file.relative_to(root)).replace(os.sep, "/")
        while name in found:  # two names that differ only in bytes that are no text
            name += "~"
        found[name] = FileOriginal(name, file)
    if not found:
        raise _no_images(folders[0], others)
    return [found[name] for name in sorted(found)]


def _no_images(folder: Path, others: Counter[str]) -> AfterimageError:
    kinds = ", ".join(f"{count} {shown(kind)}" for kind, count in others.most_common(5))
    return AfterimageError(
        f"there are no images in {shown(folder)} or below it; looked for {', '.join(EXTENSIONS)}"
        + (f" and found only {kinds}" if kinds else "")
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, in no order, never all in memory; raises for a folder that cannot be read."""
    return (current / name for current, name in _entries(folder))


def _entries(folder: Path, *, strict: bool = True) -> Iterator[tuple[Path, str]]:
    """Files below a folder, each as the folder it lies in and its name.

    Links to folders are followed, each folder once, so that a loop of links ends. Raises for a folder that cannot be
    read, unless `strict` is false.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        folders = []
        try:
            state = os.stat(current)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not _is_folder(entry):
                        yield current, entry.name
                    elif entry.name != "__MACOSX":
                        folders.append(current / entry.name)
        except OSError as error:
            if strict:
                what = f"cannot read the folder {shown(error.filename)}: {reason(error)}"
                raise AfterimageError(what) from None
        waiting += sorted(folders, reverse=True)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False
