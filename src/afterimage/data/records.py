"""Originals: the images of a source before they are decoded, each with a stable id."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import BadImage, cover, decode, read_bytes, reason, shown
from afterimage.data.examine import Facts, examine
from afterimage.data.file_digests import Content, FileDigests


class Original(ABC):
    """One image of a source.

    Attributes:
        id: name that is stable, and unique in the source
        rank: images of a lower rank come first in a split
    """

    __slots__ = ()
    id: str
    rank: int = 0

    @property
    def name(self) -> str:
        """Name of the image in messages."""
        return self.id

    @property
    def group(self) -> str:
        """Name of what a split must not divide, such as a photograph and its parts."""
        return self.id

    @abstractmethod
    def content(self, digests: FileDigests, size: int) -> Content:
        """Return the digest of the file's bytes or of the recipe that the image is made from, and its sides.

        Args:
            digests: stored digests of the source
            size: side in pixels of an image that has no size of its own

        Raises:
            BadImage: the image cannot be read
        """

    @abstractmethod
    def decoded(self, size: int, content: str) -> Image.Image:
        """Return the image as RGB, not resized.

        Args:
            size: side in pixels of an image that has no size of its own
            content: digest that the image must still have

        Raises:
            BadImage: the image cannot be decoded or has changed
        """

    def image(self, box: tuple[int, int], content: str) -> Image.Image:
        """Return the image as RGB, resized to cover a box, `(height, width)`; errors as for `decoded`."""
        return cover(self.decoded(max(box), content), box)

    def examined(self, box: tuple[int, int], content: str) -> tuple[Image.Image, Facts]:
        """Return the image as `image` does, and the facts about it before it was resized."""
        whole = self.decoded(max(box), content)
        return cover(whole, box), examine(whole)


class EncodedOriginal(Original):
    """An image that is stored as the bytes of an image file."""

    __slots__ = ()

    @abstractmethod
    def state(self) -> str:
        """Return where the bytes are, and what changes when they do, as text.

        Raises:
            BadImage: there is no such file
        """

    @abstractmethod
    def read(self) -> bytes:
        """Return the bytes. Any thread may call this.

        Raises:
            BadImage: they cannot be read
        """

    def content(self, digests: FileDigests, size: int) -> Content:
        return digests.of(self.state(), self.read, self.name)

    def decoded(self, size: int, content: str) -> Image.Image:
        file = self.read()
        if hashlib.sha256(file).hexdigest() != content:
            raise BadImage(self.name, "changed since it was first read")
        return decode(file, self.name)


@dataclass(frozen=True, slots=True)
class FileOriginal(EncodedOriginal):
    """An image file: two strings an image, of which the first may be the id.

    Attributes:
        id: name of the image
        root: folder of the source
        file: path of the file below it
    """

    id: str
    root: Path
    file: str

    @property
    def path(self) -> Path:
        return self.root / self.file

    @property
    def name(self) -> str:
        return shown(self.path)

    def state(self) -> str:
        """Return path, size and times; the change time shows a file replaced by one of the same size and age."""
        path = self.path
        try:
            now = path.stat()
        except (OSError, ValueError) as error:
            raise BadImage(self.name, reason(error)) from None
        return f"{shown(path.absolute())} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"

    def read(self) -> bytes:
        return read_bytes(self.path)


@dataclass(frozen=True, slots=True)
class PartOriginal(Original):
    """One cell of a grid over an image file.

    Attributes:
        id: name of the image
        whole: the image file
        cell: column and row of the cell, and numbers of columns and rows of the grid
        rank: parts come after whole images in a split
    """

    id: str
    whole: FileOriginal
    cell: tuple[int, int, int, int]
    rank: int = 1

    @property
    def group(self) -> str:
        return self.whole.id

    def content(self, digests: FileDigests, size: int) -> Content:
        file, width, height = self.whole.content(digests, size)
        digest = hashlib.sha256(f"{file} cell {self.cell}".encode()).hexdigest()
        return Content(digest, width // self.cell[2], height // self.cell[3])

    def decoded(self, size: int, content: str) -> Image.Image:
        column, row, columns, rows = self.cell
        image = decode(self.whole.read(), self.whole.name)
        width, height = image.width // columns, image.height // rows
        left, top = column * width, row * height
        return image.crop((left, top, left + width, top + height))


def broken_images(broken: Sequence[BadImage]) -> AfterimageError:
    """Create one error for all images that cannot be read: the first 20 with their reasons, and how many more."""
    lines = sorted(set(map(str, broken)))
    if len(lines) == 1:
        return AfterimageError(f"{lines[0]}. Mend the file or take it out")
    more = f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else ""
    return AfterimageError(
        f"{len(lines)} images cannot be read; mend the files or take them out:\n  "
        + "\n  ".join(lines[:20])
        + more
    )
