"""Originals: the images of a source before they are decoded, each with a stable id and a content digest."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from afterimage.config import AfterimageError
from afterimage.data.decode import BadImage, decode, read_bytes, shorter_side, shown
from afterimage.data.examine import Facts, examine
from afterimage.data.file_digests import FileDigests


class Original(ABC):
    """One image of a source.

    `id` is stable and unique in its source, `name` is what messages call it, `group` names what a split must
    not tear apart, and images of a lower `rank` come first in a split.
    """

    id: str
    rank: int = 0

    @property
    def name(self) -> str:
        return self.id

    @property
    def group(self) -> str:
        return self.id

    @abstractmethod
    def content(self, digests: FileDigests, size: int) -> str:
        """SHA-256 of what the image is made from: a file's bytes, or the recipe of a generated image."""

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


@dataclass(frozen=True)
class FileOriginal(Original):
    """An image file."""

    id: str
    path: Path

    @property
    def name(self) -> str:
        return shown(self.path)

    def content(self, digests: FileDigests, size: int) -> str:
        return digests.of(self.path)

    def decoded(self, size: int, content: str) -> Image.Image:
        file = read_bytes(self.path)
        if hashlib.sha256(file).hexdigest() != content:
            raise BadImage(self.name, "changed while it was being read")
        return decode(file, self.name)


@dataclass(frozen=True)
class PartOriginal(Original):
    """One cell of a grid over an image file: `cell` is its column, its row and the grid's size in both."""

    id: str
    path: Path
    cell: tuple[int, int, int, int]
    whole: str
    rank: int = 1

    @property
    def group(self) -> str:
        return self.whole

    def content(self, digests: FileDigests, size: int) -> str:
        return hashlib.sha256(f"{digests.of(self.path)} cell {self.cell}".encode()).hexdigest()

    def decoded(self, size: int, content: str) -> Image.Image:
        column, row, columns, rows = self.cell
        image = decode(read_bytes(self.path), shown(self.path))
        width, height = image.width // columns, image.height // rows
        left, top = column * width, row * height
        return image.crop((left, top, left + width, top + height))


def broken_images(broken: Sequence[BadImage]) -> AfterimageError:
    """One error for all files that cannot be read: the first 20 with their reasons, and how many more."""
    lines = sorted(set(map(str, broken)))
    if len(lines) == 1:
        return AfterimageError(f"{lines[0]}. Mend the file or take it out of the folder")
    more = f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else ""
    return AfterimageError(
        f"{len(lines)} images cannot be read; mend the files or take them out of the folder:\n  "
        + "\n  ".join(lines[:20])
        + more
    )
