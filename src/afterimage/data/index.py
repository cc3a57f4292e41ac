"""An index of many pictures in columns: no Python object a picture, about 60 bytes and its name.

A shard (a tar file, a Parquet file, a folder) is listed and read through once. What was found is kept in the cache
and used again for as long as the shard's size and times, or those of each file of a folder, are what they were.
"""

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afterimage.config import AfterimageError
from afterimage.data.decode import BadPicture, check_header, reason, shown
from afterimage.data.files import whole_file
from afterimage.data.parallel import Progress, in_parallel

logger = logging.getLogger("afterimage")

VERSION = 2
CHUNK = 64
_COLUMNS = {"names": np.uint8, "ends": np.int64, "place": np.int64, "size": np.int64, "content": np.uint8}
_COLUMNS |= {"side": np.int32}

Member = tuple[bytes, int, int]
"""Name, place and size in bytes of a picture; what the place means is the shard's own affair."""


class Shard(ABC):
    """A file or folder that holds many pictures. `prefix` is what their ids begin with."""

    path: Path
    prefix: str
    others: Counter[str]
    """Files in it that are not read, by kind, once `members` has come to its end."""

    @abstractmethod
    def state(self) -> list[int]:
        """What changes when the shard does; empty where each picture's place says whether it has changed."""

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """All pictures, without their content; raises `AfterimageError` for what is damaged or not safe to read."""

    @abstractmethod
    def read(self, name: bytes, place: int, size: int) -> bytes:
        """A picture's file; raises `BadPicture`. Any thread may call it."""

    def called(self, name: bytes) -> str:
        """What messages call a picture."""
        return f"{shown(self.path)}/{text(name)}"

    @property
    def blocks(self) -> list[int]:
        """Bytes of each part that can only be read whole; empty where every picture can be read by itself."""
        return []


@dataclass(frozen=True, eq=False)
class Block:
    """The pictures of one shard: `names` end to end, where each ends, place and size in the shard, SHA-256 `(n, 32)`,
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
    """The pictures of several shards as one list."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self._starts = np.cumsum([0, *map(len, blocks)])
        self.content = np.concatenate([block.content for block in blocks])
        self.side = np.concatenate([block.side for block in blocks])
        self.others = sum((Counter(block.others) for block in blocks), Counter())

    def __len__(self) -> int:
        return len(self.content)

    def at(self, row: int) -> tuple[Block, int]:
        """The block that holds a picture, and its row there."""
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.blocks[number], int(row - self._starts[number])

    def id(self, row: int) -> str:
        block, row = self.at(row)
        return block.shard.prefix + text(block.name(row))

    def name(self, row: int) -> str:
        block, row = self.at(row)
        return block.shard.called(block.name(row))

    def read(self, row: int) -> bytes:
        """A picture's file, the very bytes that were indexed; raises `BadPicture`."""
        block, own = self.at(row)
        content = block.read(own)
        if hashlib.sha256(content).digest() != self.content[row].tobytes():
            raise BadPicture(self.name(row), "has changed since it was indexed")
        return content

    def parts(self) -> tuple[np.ndarray, list[int]] | None:
        """For each picture the number of the part it can only be read with, and the bytes of each part."""
        sizes = [block.shard.blocks for block in self.blocks]
        if not any(sizes):
            return None
        first = np.cumsum([0, *map(len, sizes)])
        numbers = [start + (block.place >> 32) for start, block in zip(first, self.blocks, strict=False)]
        return np.concatenate(numbers).astype(np.int32), [size for own in sizes for size in own]


def text(name: bytes) -> str:
    """A picture's name as text that can always be printed."""
    try:
        decoded = name.decode()
        return decoded if decoded.isprintable() else shown(decoded)
    except UnicodeDecodeError:
        return shown(os.fsdecode(name))


def read_block(
    shard: Shard, cache: Path, what: str, broken: list[BadPicture], progress: Progress | None = None
) -> Block:
    """List a shard and read each of its pictures once, unless the cache knows it.

    Pictures that cannot be read, or whose first bytes are no picture's, are added to `broken` and missing from the
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

    def look(rows: np.ndarray) -> list[tuple[bytes, int] | BadPicture]:
        return [_look(block, int(row)) for row in rows]

    chunks = [new[i : i + CHUNK] for i in range(0, len(new), CHUNK)]
    for rows, results in zip(chunks, in_parallel(look, chunks, len(chunks), what, None), strict=True):
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, BadPicture):
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
    """The row of each picture in what is known, -1 for one that is not."""
    if known is None or not len(known["place"]):
        return np.full(len(block), -1)
    order = np.argsort(known["place"])
    at = order[np.searchsorted(known["place"], block.place, sorter=order).clip(max=len(order) - 1)]
    return np.where(known["place"][at] == block.place, at, -1)


def _look(block: Block, row: int) -> tuple[bytes, int] | BadPicture:
    """A picture's digest and shorter side."""
    try:
        content = block.read(row)
        size = check_header(content, block.shard.called(block.name(row)))
    except BadPicture as error:
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
        with whole_file(file) as out:
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
