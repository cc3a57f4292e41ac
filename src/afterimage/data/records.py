"""Originals: the images of a source before they are decoded, each with a stable id and a content digest."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import BadImage, decode, read_bytes, reason, shorter_side, shown
from afterimage.data.examine import Facts, examine
from afterimage.data.file_digests import Content, FileDigests


class Original(ABC):
    """One image of a source.

    `id` is stable and unique in its source, `name` is what messages call it, `group` names what a split must
    not tear apart, and images of a lower `rank` come first in a split.
    """

    __slots__ = ()
    id: str
    rank: int = 0

    @property
    def name(self) -> str:
        return self.id

    @property
    def group(self) -> str:
        return self.id

    @abstractmethod
    def content(self, digests: FileDigests, size: int) -> Content:
        """SHA-256 of what the image is made from, a file's bytes or the recipe of a generated image, and its sides."""

    @abstractmethod
    def decoded(self, size: int, content: str) -> Image.Image:
        """The image as RGB, at its own size or, where it has none, at `size`; raises `BadImage`."""

    def image(self, size: int, content: str) -> Image.Image:
        """The image as RGB, its shorter side `size` pixels long; raises `BadImage`."""
        return shorter_side(self.decoded(size, content), size)

    def examined(self, size: int, content: str) -> tuple[Image.Image, Facts]:
        """`image`, and the facts of what it was before it was resized."""
        whole = self.decoded(size, content)
        return shorter_side(whole, size), examine(whole)


class EncodedOriginal(Original):
    """An image that is stored as the bytes of an image file, wherever these lie."""

    __slots__ = ()

    @abstractmethod
    def state(self) -> str:
        """Where the bytes lie and what changes when they do; raises `BadImage`."""

    @abstractmethod
    def read(self) -> bytes:
        """The bytes; raises `BadImage`. Any thread may call it."""

    def content(self, digests: FileDigests, size: int) -> Content:
        return digests.of(self.state(), self.read, self.name)

    def decoded(self, size: int, content: str) -> Image.Image:
        file = self.read()
        if hashlib.sha256(file).hexdigest() != content:
            raise BadImage(self.name, "changed since it was first read")
        return decode(file, self.name)


@dataclass(frozen=True, slots=True)
class FileOriginal(EncodedOriginal):
    """An image file, `file` below the folder `root`: two strings an image, of which the first may be the id."""

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
        """Size and times; the change time too, so that a file swapped for one of the same size and age is seen."""
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
    """One cell of a grid over an image file: `cell` is its column, its row and the grid's size in both."""

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
    """One error for all files that cannot be read: the first 20 with their reasons, and how many more."""
    lines = sorted(set(map(str, broken)))
    if len(lines) == 1:
        return AfterimageError(f"{lines[0]}. Mend the file or take it out")
    more = f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else ""
    return AfterimageError(
        f"{len(lines)} images cannot be read; mend the files or take them out:\n  "
        + "\n  ".join(lines[:20])
        + more
    )
