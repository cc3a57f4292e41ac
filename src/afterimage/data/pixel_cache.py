"""Cache of decoded images: each image is decoded once, into one memory-mapped file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import torch

from afterimage.config import AfterimageError, shown, size_text
from afterimage.data import decode
from afterimage.data.examine import Facts
from afterimage.data.records import Original
from afterimage.runs.files import atomic_file, remove_leftovers
from afterimage.runs.lock import CannotLock, held
from afterimage.runtime.process import in_parallel
from afterimage.runtime.terminal import Progress, silent

logger = logging.getLogger("afterimage")

MEMORY_LIMIT = 4 * 2**30
"""Largest size in bytes of the images that are kept in memory if the cache cannot be written."""
RESIDENT_LIMIT = 4 * 2**30
"""Number of bytes that are taken to be free on a device other than a GPU; images may fill half of them."""
FACTS = 1
"""Version of the stored `Facts`: increase it whenever their fields or meaning change."""
MAGIC = b"aftimg01"
"""Last bytes of a cache file."""
_FOOTER = struct.Struct("<QQI8s")  # start, length and CRC-32 of the index, and MAGIC


def cached(
    wanted: Mapping[str, Original],
    box: tuple[int, int],
    folder: Path,
    broken: dict[str, decode.BadImage],
    progress: Progress = silent,
) -> Blob:
    """Return the pixels of images, from the cache if it has them.

    A cache that cannot be written is no error: the images are then kept in memory, with a warning.

    Args:
        wanted: the images, by the SHA-256 of their contents
        box: height and width of the box that the images are resized to cover
        folder: folder of the cache
        broken: receives the errors of images that cannot be read; these images are missing from the result
        progress: called with the name of the current task, the amount done, and the total

    Raises:
        AfterimageError: the cache cannot be written, and the images are too many for memory
    """
    sides = size_text(box)
    how = f"shorter side {sides}" if sides.isdecimal() else f"covering {sides}"
    transform = f"decode {decode.VERSION}, Pillow {PIL.__version__}, facts {FACTS}, {how}"
    path = folder / "images" / f"{sides}-{_key(wanted, transform)}.images"
    blob = _open(path, wanted.keys())
    if blob is not None:
        return blob
    try:
        lock = path.with_suffix(".lock")
        lock.mkdir(parents=True, exist_ok=True)
        with held(lock, lambda text: progress(text, 1, 1)):
            blob = _open(path, wanted.keys())
            if blob is not None:
                return blob
            remove_leftovers(path.parent, [path.name])
            images = _decoded(wanted, box, transform, path.parent, broken, progress)
            with atomic_file(path) as file:
                write_blob(file, images, transform)
            return map_blob(path)
    except (OSError, CannotLock) as error:
        problem = decode.reason(error.__cause__ or error)
        logger.warning(
            "cannot write the image cache in %s (%s): the images are kept in memory, for this run only",
            shown(path.parent),
            problem,
        )
    images = _decoded(wanted, box, transform, path.parent, broken, progress)
    return _in_memory(images, transform, path.parent)


def _key(contents: Mapping[str, object], transform: str) -> str:
    return hashlib.sha256("\n".join([transform, *sorted(contents)]).encode()).hexdigest()[:24]


def _open(path: Path, wanted: Set[str]) -> Blob | None:
    try:
        blob = map_blob(path)
        if not all(map(blob.sound, blob.slots)):
            raise Damaged("its pixels have a wrong checksum")
        # The file lacks images that could not be read when it was written; they may be readable now.
        return blob if wanted <= blob.slots.keys() else None
    except FileNotFoundError:
        return None
    except (Damaged, OSError) as error:
        logger.warning("the image cache %s is damaged (%s) and is built again", shown(path), error)
        return None


def _decoded(
    wanted: Mapping[str, Original],
    box: tuple[int, int],
    transform: str,
    folder: Path,
    broken: dict[str, decode.BadImage],
    progress: Progress,
) -> Iterator[tuple[str, np.ndarray, Facts]]:
    """Yield every wanted image that can be read, in order: `(content, (3, height, width) uint8, facts)`."""
    known = _elsewhere(wanted, transform, folder)

    def one(item: tuple[str, Original]) -> tuple[str, tuple[np.ndarray, Facts] | decode.BadImage]:
        content, original = item
        if content in known and known[content].sound(content):
            return content, (known[content].image(content), known[content].facts[content])
        try:
            image, facts = original.examined(box, content)
        except decode.BadImage as error:
            return content, error
        return content, (np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), facts)

    for content, result in in_parallel(one, wanted.items(), len(wanted), "decoding images", progress):
        if isinstance(result, decode.BadImage):
            broken[content] = result
        else:
            yield content, *result


def _elsewhere(wanted: Mapping[str, Original], transform: str, folder: Path) -> dict[str, Blob]:
    """Find the cache file that holds each wanted image, if any; its pixels may be damaged and must be checked."""
    found: dict[str, Blob] = {}
    for path in sorted(folder.glob("*.images")):
        try:
            blob = map_blob(path)
        except (Damaged, OSError):
            continue
        if blob.transform == transform:
            found |= dict.fromkeys(wanted.keys() & blob.slots.keys(), blob)
    return found


def _in_memory(images: Iterator[tuple[str, np.ndarray, Facts]], transform: str, folder: Path) -> Blob:
    slots: dict[str, Slot] = {}
    facts: dict[str, Facts] = {}
    file = io.BytesIO()
    for content, pixels, own in images:
        facts[content] = own
        slots[content] = Slot(file.tell(), *pixels.shape[1:], zlib.crc32(pixels))
        if file.tell() + pixels.size > MEMORY_LIMIT:
            raise AfterimageError(
                f"the image cache in {shown(folder)} cannot be written, and the images are too many for memory "
                f"(over {MEMORY_LIMIT / 2**30:.0f} GiB); set AFTERIMAGE_CACHE to a folder with more room"
            )
        file.write(pixels)
    return Blob(np.frombuffer(file.getbuffer(), np.uint8), slots, transform, facts)


class Damaged(Exception):
    """Cache file with wrong content; the message gives the fault."""


class Slot(NamedTuple):
    """Place of an image among the pixels of many.

    Attributes:
        offset: index of its first byte
        height: height in pixels
        width: width in pixels
        crc: CRC-32 of its pixels
    """

    offset: int
    height: int
    width: int
    crc: int

    @property
    def size(self) -> int:
        """Number of bytes of the image."""
        return 3 * self.height * self.width


@dataclass(frozen=True, eq=False)
class Blob:
    """Pixels of many images.

    Attributes:
        pixels: `(size,)` uint8, one image after the other
        slots: place of each image, by the SHA-256 of its content
        transform: description of how the images were decoded and resized
        facts: `Facts` of each image, by the SHA-256 of its content
    """

    pixels: np.ndarray
    slots: Mapping[str, Slot]
    transform: str
    facts: Mapping[str, Facts] = field(default_factory=dict)
    _resident: dict[torch.device, torch.Tensor | None] = field(default_factory=dict, repr=False)

    def image(self, content: str) -> np.ndarray:
        """Return an image, `(3, height, width)` uint8, as a view."""
        slot = self.slots[content]
        return self.pixels[slot.offset : slot.offset + slot.size].reshape(3, slot.height, slot.width)

    def sound(self, content: str) -> bool:
        """Return whether an image's pixels have the stored checksum."""
        return zlib.crc32(self.image(content)) == self.slots[content].crc

    def on(self, device: torch.device) -> torch.Tensor | None:
        """Return all pixels on a device, copied there once and kept; None if they do not fit."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._resident:
            # Use at most half of the free memory, to leave room for the networks.
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else RESIDENT_LIMIT
            fits = self.pixels.size <= free // 2
            self._resident[device] = torch.from_numpy(self.pixels).to(device) if fits else None
        return self._resident[device]


def write_blob(file: BinaryIO, images: Iterable[tuple[str, np.ndarray, Facts]], transform: str) -> None:
    """Write a cache file.

    Args:
        file: file to write to
        images: SHA-256 of the content, pixels `(3, height, width)` uint8, and facts of each image
        transform: description of how the images were decoded and resized
    """
    slots: dict[str, tuple[int, ...]] = {}
    for content, pixels, facts in images:
        slots[content] = (*Slot(file.tell(), *pixels.shape[1:], zlib.crc32(pixels)), *facts)
        file.write(pixels)
    start = file.tell()
    index = json.dumps({"transform": transform, "images": slots}).encode()
    file.write(index)
    file.write(_FOOTER.pack(start, len(index), zlib.crc32(index), MAGIC))


def map_blob(path: Path) -> Blob:
    """Map a cache file into memory. Only its index is checked, not its pixels (see `Blob.sound`).

    Raises:
        Damaged: length, footer or index are wrong
        OSError: the file cannot be read
    """
    with open(path, "rb") as file:
        end = file.seek(0, 2) - _FOOTER.size
        if end < 0:
            raise Damaged("it is too short")
        file.seek(end)
        start, length, crc, magic = _FOOTER.unpack(file.read(_FOOTER.size))
        if magic != MAGIC or start + length != end:
            raise Damaged("it was cut short, or is no file of images")
        file.seek(start)
        text = file.read(length)
    if zlib.crc32(text) != crc:
        raise Damaged("its index has a wrong checksum")
    try:
        index = json.loads(text)
        transform = str(index["transform"])
        numbers = {content: list(map(int, own)) for content, own in index["images"].items()}
        slots = {content: Slot(*own[: len(Slot._fields)]) for content, own in numbers.items()}
        facts = {content: Facts(*own[len(Slot._fields) :]) for content, own in numbers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged("its index cannot be read") from error
    if any(min(s.offset, s.height - 1, s.width - 1) < 0 or s.offset + s.size > start for s in slots.values()):
        raise Damaged("its index points outside of it")
    # Mode "c" (copy on write): writable in memory, as torch requires, but the file never changes.
    pixels = np.memmap(path, np.uint8, "c", shape=(start,)) if start else np.empty(0, np.uint8)
    return Blob(np.asarray(pixels), slots, transform, facts)
