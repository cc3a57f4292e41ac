"""Index shards of images so that any one can be read without the rest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import BadImage, check_header, decode, reason, shown
from afterimage.data.file_digests import FileDigests
from afterimage.data.records import Original
from afterimage.data.sampling import ShuffleBuffer, order
from afterimage.runs.files import atomic_file
from afterimage.runtime.threads import Progress, in_parallel

logger = logging.getLogger("afterimage")

VERSION = 2
CHUNK = 64
_COLUMNS = {"names": np.uint8, "ends": np.int64, "place": np.int64, "size": np.int64, "content": np.uint8}


_COLUMNS |= {"side": np.int32}


Member = tuple[bytes, int, int]
"""Name, place and size in bytes of an image; what the place means is the shard's own affair."""


class Shard(ABC):
    """A file or folder that holds many images. `prefix` is what their ids begin with."""

    path: Path
    prefix: str
    others: Counter[str]
    """Files in it that are not read, by kind, once `members` has come to its end."""

    @abstractmethod
    def state(self) -> list[int]:
        """What changes when the shard does; empty where each image's place says whether it has changed."""

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """All images, without their content; raises `AfterimageError` for what is damaged or not safe to read."""

    @abstractmethod
    def read(self, name: bytes, place: int, size: int) -> bytes:
        """An image's file; raises `BadImage`. Any thread may call it."""

    def called(self, name: bytes) -> str:
        """What messages call an image."""
        return f"{shown(self.path)}/{text(name)}"

    @property
    def blocks(self) -> list[int]:
        """Bytes of each part that can only be read whole; empty where every image can be read by itself."""
        return []


@dataclass(frozen=True, eq=False)
class Block:
    """The images of one shard: `names` end to end, where each ends, place and size in the shard, SHA-256 `(n, 32)`,
    shorter side in pixels. `others` counts the shard's other files by kind.
    """

    shard: Shard
    names: np.ndarray
    ends: np.ndarray
    place: np.ndarray
    size: np.ndarray
    content: np.ndarray
    side: np.ndarray
    others: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, row: int) -> bytes:
        return self.names[self.ends[row - 1] if row else 0 : self.ends[row]].tobytes()

    def read(self, row: int) -> bytes:
        return self.shard.read(self.name(row), int(self.place[row]), int(self.size[row]))


class Index:
    """The images of several shards as one list."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._starts = np.cumsum([0, *map(len, blocks)])
        self.content = np.concatenate([block.content for block in blocks])
        self.side = np.concatenate([block.side for block in blocks])
        self.others = sum((Counter(block.others) for block in blocks), Counter())

    def __len__(self) -> int:
        return len(self.content)

    def at(self, row: int) -> tuple[Block, int]:
        """The block that holds an image, and its row there."""
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.blocks[number], int(row - self._starts[number])

    def id(self, row: int) -> str:
        block, row = self.at(row)
        return block.shard.prefix + text(block.name(row))

    def name(self, row: int) -> str:
        block, row = self.at(row)
        return block.shard.called(block.name(row))

    def read(self, row: int) -> bytes:
        """An image's file, the very bytes that were indexed; raises `BadImage`."""
        block, own = self.at(row)
        content = block.read(own)
        if hashlib.sha256(content).digest() != self.content[row].tobytes():
            raise BadImage(self.name(row), "has changed since it was indexed")
        return content

    def parts(self) -> tuple[np.ndarray, list[int]] | None:
        """For each image the number of the part it can only be read with, and the bytes of each part."""
        sizes = [block.shard.blocks for block in self.blocks]
        if not any(sizes):
            return None
        first = np.cumsum([0, *map(len, sizes)])
        numbers = [start + (block.place >> 32) for start, block in zip(first, self.blocks, strict=False)]
        return np.concatenate(numbers).astype(np.int32), [size for own in sizes for size in own]


def text(name: bytes) -> str:
    """An image's name as text that can always be printed."""
    try:
        decoded = name.decode()
        return decoded if decoded.isprintable() else shown(decoded)
    except UnicodeDecodeError:
        return shown(os.fsdecode(name))


def read_block(
    shard: Shard, cache: Path, what: str, broken: list[BadImage], progress: Progress | None = None
) -> Block:
    """List a shard and read each of its images once, unless the cache knows it.

    Images that cannot be read, or whose first bytes are no image's, are added to `broken` and missing from the
    result. Raises `AfterimageError` where the shard itself is damaged.
    """
    key = hashlib.sha256(os.fsencode(shard.path.absolute())).hexdigest()[:24]
    file = cache / "index" / f"{key}.npz"
    state = shard.state()
    known = _remembered(file, state)
    if known is not None and state:
        return Block(shard, **known)
    columns = _listed(shard)
    count = len(columns["ends"])
    content, side = np.zeros((count, 32), np.uint8), np.zeros(count, _COLUMNS["side"])
    block = Block(shard, **columns, content=content, side=side, others=shard.others)
    old = _found(known, block)
    new = np.flatnonzero(old < 0)
    if known is not None:
        block.content[old >= 0] = known["content"][old[old >= 0]]
        block.side[old >= 0] = known["side"][old[old >= 0]]
    good = np.ones(len(block), bool)
    done = 0

    def look(rows: np.ndarray) -> list[tuple[bytes, int] | BadImage]:
        return [_look(block, int(row)) for row in rows]

    chunks = [new[i : i + CHUNK] for i in range(0, len(new), CHUNK)]
    for rows, results in zip(chunks, in_parallel(look, chunks, len(chunks), what, None), strict=True):
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, BadImage):
                good[row] = False
                broken.append(result)
            else:
                block.content[row], block.side[row] = np.frombuffer(result[0], np.uint8), result[1]
        done += len(rows)
        if progress is not None:
            progress(what, done, len(new))
    if shard.state() != state:
        raise AfterimageError(f"{shown(shard.path)} changed while it was being read")
    if good.all() or not state:
        block = block if good.all() else _kept(block, good)
        if known is None or len(new) or len(known["ends"]) != len(block):
            _remember(file, block, state)
    return block


def _listed(shard: Shard) -> dict[str, np.ndarray]:
    names, numbers = bytearray(), [array("q"), array("q"), array("q")]
    for name, place, size in shard.members():
        names += name
        for column, number in zip(numbers, (len(names), place, size), strict=True):
            column.append(number)
    ends, place, size = (np.frombuffer(column, np.int64) for column in numbers)
    return {"names": np.frombuffer(names, np.uint8), "ends": ends, "place": place, "size": size}


def _found(known: dict[str, np.ndarray] | None, block: Block) -> np.ndarray:
    """The row of each image in what is known, -1 for one that is not."""
    if known is None or not len(known["place"]):
        return np.full(len(block), -1)
    order = np.argsort(known["place"])
    at = order[np.searchsorted(known["place"], block.place, sorter=order).clip(max=len(order) - 1)]
    return np.where(known["place"][at] == block.place, at, -1)


def _look(block: Block, row: int) -> tuple[bytes, int] | BadImage:
    """An image's digest and shorter side."""
    try:
        content = block.read(row)
        size = check_header(content, block.shard.called(block.name(row)))
    except BadImage as error:
        return error
    return hashlib.sha256(content).digest(), min(size)


def _kept(block: Block, good: np.ndarray) -> Block:
    names = [block.name(row) for row in np.flatnonzero(good)]
    ends = np.cumsum(list(map(len, names)), dtype=np.int64)
    joined = np.frombuffer(b"".join(names), np.uint8)
    columns = (column[good] for column in (block.place, block.size, block.content, block.side))
    return Block(block.shard, joined, ends, *columns, block.others)


def _remember(file: Path, block: Block, state: list[int]) -> None:
    try:
        with atomic_file(file) as out:
            columns = {name: getattr(block, name) for name in _COLUMNS}
            others = np.frombuffer(json.dumps(block.others).encode(), np.uint8)
            np.savez(out, **columns, others=others, state=np.array([VERSION, *state], np.int64))
    except OSError as error:
        logger.warning(
            "cannot keep the index of %s in %s: %s", shown(block.shard.path), file.parent, reason(error)
        )


def _remembered(file: Path, state: list[int]) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            if stored["state"].tolist() != [VERSION, *state]:
                return None
            columns = {name: stored[name] for name in _COLUMNS}
            others = {str(kind): int(n) for kind, n in json.loads(stored["others"].tobytes()).items()}
    except FileNotFoundError:
        return None
    except (
        OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        logger.warning("the index %s is damaged (%s) and is built again", file, error)
        return None
    rows, ends = len(columns["ends"]), columns["ends"]
    shapes = {"names": (ends[-1] if rows else 0,), "content": (rows, 32)}
    sound = all(
        column.dtype == _COLUMNS[name] and column.shape == shapes.get(name, (rows,))
        for name, column in columns.items()
    )
    if not sound or (np.diff(ends, prepend=0) < 0).any():
        logger.warning("the index %s is damaged (its columns do not agree) and is built again", file)
        return None
    return columns | {"others": others}


WINDOW_BYTES = 128 * 2**20
"""So much of what can only be read in large parts is shuffled among itself."""


@dataclass(frozen=True, eq=False)
class IndexedOriginal(Original):
    """One image of an index."""

    index: Index
    row: int

    @property
    def id(self) -> str:
        return self.index.id(self.row)

    @property
    def name(self) -> str:
        return self.index.name(self.row)

    def content(self, digests: FileDigests, size: int) -> str:
        return self.index.content[self.row].tobytes().hex()

    def decoded(self, size: int, content: str) -> Image.Image:
        return decode(self.index.read(self.row), self.name)


class Lazy(Sequence[str]):
    """Texts that are made when they are asked for."""

    def __init__(self, make: Callable[[int], str], rows: np.ndarray) -> None:
        self._make, self._rows = make, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self._make(int(row)) for row in self._rows[item]]
        return self._make(int(self._rows[item]))

    def __iter__(self) -> Iterator[str]:
        return (self._make(int(row)) for row in self._rows)


class Rows(Sequence[Original]):
    """Some images of an index, by their `rows` in it."""

    def __init__(self, index: Index, rows: np.ndarray | None = None, seed: int | None = None) -> None:
        self.index = index
        self.rows = np.arange(len(index)) if rows is None else rows
        self._seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | slice) -> IndexedOriginal | Rows:
        if isinstance(item, slice):
            return Rows(self.index, self.rows[item], self._seed)
        return IndexedOriginal(self.index, int(self.rows[item]))

    @property
    def ids(self) -> Lazy:
        return Lazy(self.index.id, self.rows)

    @property
    def content(self) -> Lazy:
        return Lazy(lambda row: self.index.content[row].tobytes().hex(), self.rows)

    @property
    def digests(self) -> np.ndarray:
        """The SHA-256 of each original, `(n, 32)` uint8."""
        return self.index.content[self.rows]

    @property
    def sides(self) -> np.ndarray:
        """The shorter side of each original in pixels, `(n,)`."""
        return self.index.side[self.rows]

    def shuffled(self, seed: int) -> Rows:
        """The order of a split, as `split.shuffled` has it for a list; raises for ids that are there twice."""
        if self._seed == seed:
            return self
        draws = np.empty((len(self), 32), np.uint8)
        for number, identity in enumerate(self.ids):
            draws[number] = np.frombuffer(draw(seed, identity), np.uint8)
        keys = draws.view(">u8").astype(np.uint64)
        places = np.lexsort(keys.T[::-1])
        same = np.flatnonzero((keys[places[1:]] == keys[places[:-1]]).all(1))
        if len(same):
            names = [self[int(places[at])].name for at in (same[0], same[0] + 1)]
            raise AfterimageError(f"two images have one name: {names[0]} and {names[1]}; rename one of them")
        return Rows(self.index, self.rows[places], seed)

    def windows(self) -> ShuffleBuffer | None:
        """Which images are best read together; None where it does not matter."""
        parts = self.index.parts()
        if parts is None:
            return None
        return ShuffleBuffer(parts[0][self.rows], max(1, WINDOW_BYTES // max(parts[1])))

    def arranged(self, seed: int) -> Rows:
        """The same images, in an order in which they are best read where that matters."""
        windows = self.windows()
        return self if windows is None else Rows(self.index, self.rows[order(len(self), seed, 0, windows)])


def draw(seed: int, name: str) -> bytes:
    """What decides an image's place in a split: SHA-256 of the seed and its id."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
