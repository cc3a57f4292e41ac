"""Originals: the still encoded images of a source, each with a stable id."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from afterimage.config import AfterimageError, join_names, printable_path
from afterimage.data.decode import BadImage, check_header, decode, error_reason, read_bytes
from afterimage.runs.files import atomic_file

logger = logging.getLogger("afterimage")

CHANGED = "changed since it was first read"
_ROW = np.dtype([("key", "<u8"), ("sha256", "u1", (32,)), ("sides", "<i4", (2,))])


class Content(NamedTuple):
    """SHA-256 of the file or of the recipe that an image is made from, in hexadecimal, and its sides in pixels."""

    sha256: str
    width: int
    height: int


class FileDigests:
    """Cache of one source's digests and sides, 48 bytes an image, which spares a second run reading the files.

    The source's folder or name, `root`, decides the file's name in the folder `cache`.
    """

    def __init__(self, cache: Path, root: Path) -> None:
        name = hashlib.sha256(os.fsencode(root)).hexdigest()[:24]
        self._file = cache / "digests" / f"{name}.npz"
        self._known = self._load()
        self._keys = np.ascontiguousarray(self._known["key"])
        self._new = bytearray()

    def of(self, fingerprint: str, read: Callable[[], bytes], name: str) -> Content:
        """Return the digest and size of an image, as stored for its fingerprint or from the bytes that `read` returns.

        Args:
            fingerprint: text that changes with the image's bytes, such as path, size and times
            read: returns the image's bytes
            name: name of the image, for the error

        Raises:
            BadImage: the image cannot be read, or its header is not that of an image
        """
        key = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:8], "little")
        row = np.searchsorted(self._keys, np.uint64(key))
        if row < len(self._keys) and self._keys[row] == key:
            _, digest, sides = self._known[row]
            return Content(digest.tobytes().hex(), *sides.tolist())
        file = read()
        found = Content(hashlib.sha256(file).hexdigest(), *check_header(file, name))
        row = (key, np.frombuffer(bytes.fromhex(found.sha256), np.uint8), found[1:])
        self._new += np.array(row, _ROW).tobytes()
        return found

    def save(self) -> None:
        """Store new digests for later runs, if the cache can be written."""
        if not self._new:
            return
        table = np.concatenate([self._known, np.frombuffer(self._new, _ROW)])
        table = table[np.unique(table["key"], return_index=True)[1]]
        try:
            with atomic_file(self._file) as file:
                np.savez(file, table=table)
        except OSError as error:
            logger.debug("cannot remember digests in %s: %s", printable_path(self._file), error)

    def _load(self) -> np.ndarray:
        try:
            with np.load(self._file, allow_pickle=False) as stored:
                table = stored["table"]
            if table.dtype != _ROW or (table["key"][1:] <= table["key"][:-1]).any():
                raise ValueError("it holds no table of digests")
            return table
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged archive raises anything
            logger.warning(
                "the digests in %s cannot be read (%s) and are computed again",
                printable_path(self._file),
                error,
            )
        return np.empty(0, _ROW)


class Original(ABC):
    """One image of a source.

    Attributes:
        id: stable name, unique in the source
        priority: images of a lower priority come first in a split
    """

    __slots__ = ()
    id: str
    priority: int = 0

    @property
    def name(self) -> str:
        """Name of the image in messages."""
        return self.id

    @property
    def group(self) -> str:
        """Name of the group of images that a split must not divide, such as a photograph and its parts."""
        return self.id

    @abstractmethod
    def content(self, digests: FileDigests, size: int) -> Content:
        """Return the digest of the file's bytes or of the recipe that the image is made from, and its sides.

        `size` is the shorter side in pixels of an image without a size of its own, such as a procedural one.

        Raises:
            BadImage: the image cannot be read
        """

    @abstractmethod
    def decode_image(self, size: int, content: str) -> Image.Image:
        """Return the image as RGB, not resized; `size` as for `content`, the digest that the image must still have.

        Raises:
            BadImage: the image cannot be decoded or has changed
        """


class EncodedOriginal(Original):
    """Image that is stored as the bytes of an image file."""

    __slots__ = ()

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that names where the bytes are and changes when they do, such as path, size and times.

        Raises:
            BadImage: there is no such file
        """

    @abstractmethod
    def read(self) -> bytes:
        """Return the bytes. This is safe to call from any thread.

        Raises:
            BadImage: they cannot be read
        """

    def content(self, digests: FileDigests, size: int) -> Content:
        return digests.of(self.fingerprint(), self.read, self.name)

    def decode_image(self, size: int, content: str) -> Image.Image:
        file = self.read()
        if hashlib.sha256(file).hexdigest() != content:
            raise BadImage(self.name, CHANGED)
        return decode(file, self.name)


@dataclass(frozen=True, slots=True)
class FileOriginal(EncodedOriginal):
    """Image in the file `root / file`.

    `id` and `file` may be the same string object, which saves memory for millions of images.
    """

    id: str
    root: Path
    file: str

    @property
    def path(self) -> Path:
        return self.root / self.file

    @property
    def name(self) -> str:
        return printable_path(self.path)

    def fingerprint(self) -> str:
        """Return path, size and times; the change time reveals a file replaced by one of equal size and time."""
        path = self.path
        try:
            now = path.stat()
        except (OSError, ValueError) as error:
            raise BadImage(self.name, error_reason(error)) from None
        return f"{printable_path(path.absolute())} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"

    def read(self) -> bytes:
        return read_bytes(self.path)


@dataclass(frozen=True, slots=True)
class PartOriginal(Original):
    """Image that is one cell of a grid over an image file; parts come after whole images in a split.

    `cell` has column and row of the cell, and numbers of columns and rows of the grid.
    """

    id: str
    whole: FileOriginal
    cell: tuple[int, int, int, int]
    priority: int = 1

    @property
    def group(self) -> str:
        return self.whole.id

    def content(self, digests: FileDigests, size: int) -> Content:
        file, width, height = self.whole.content(digests, size)
        return Content(self._digest(file), width // self.cell[2], height // self.cell[3])

    def _digest(self, file: str) -> str:
        """Return the digest of this cell of a file with the digest `file`."""
        return hashlib.sha256(f"{file} cell {self.cell}".encode()).hexdigest()

    def decode_image(self, size: int, content: str) -> Image.Image:
        column, row, columns, rows = self.cell
        file = self.whole.read()
        if self._digest(hashlib.sha256(file).hexdigest()) != content:
            raise BadImage(self.whole.name, CHANGED)
        image = decode(file, self.whole.name)
        width, height = image.width // columns, image.height // rows
        left, top = column * width, row * height
        return image.crop((left, top, left + width, top + height))


def broken_images_error(broken: Sequence[BadImage]) -> AfterimageError:
    """Return one error for all unreadable images: the first 20 with their reasons, and the number of others."""
    lines = sorted(set(map(str, broken)))
    if len(lines) == 1:
        return AfterimageError(f"{lines[0]}. Repair or remove the file")
    listed = join_names(lines, 20, "\n  ")
    return AfterimageError(f"{len(lines)} images cannot be read; repair or remove the files:\n  {listed}")
