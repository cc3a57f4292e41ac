"""Pictures of an index as a sequence of originals, which exist only while they are looked at; split in columns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import decode
from afterimage.data.digests import FileDigests
from afterimage.data.index import Index
from afterimage.data.originals import Original
from afterimage.data.sampling import Windows, order

WINDOW_BYTES = 128 * 2**20
"""So much of what can only be read in large parts is shuffled among itself."""


@dataclass(frozen=True, eq=False)
class IndexedOriginal(Original):
    """One picture of an index."""

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
    """Some pictures of an index, by their `rows` in it."""

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
            raise AfterimageError(
                f"two pictures have one name: {names[0]} and {names[1]}; rename one of them"
            )
        return Rows(self.index, self.rows[places], seed)

    def windows(self) -> Windows | None:
        """Which pictures are best read together; None where it does not matter."""
        parts = self.index.parts()
        if parts is None:
            return None
        return Windows(parts[0][self.rows], max(1, WINDOW_BYTES // max(parts[1])))

    def arranged(self, seed: int) -> Rows:
        """The same pictures, in an order in which they are best read where that matters."""
        windows = self.windows()
        return self if windows is None else Rows(self.index, self.rows[order(len(self), seed, 0, windows)])


def draw(seed: int, name: str) -> bytes:
    """What decides a picture's place in a split: SHA-256 of the seed and its id."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
