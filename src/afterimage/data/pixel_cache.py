"""Cache of decoded images: each image is decoded once, into one memory-mapped file.

A file holds the pixels of its images one after the other, then an index as JSON, then a footer.
"""

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
from typing import NamedTuple

import numpy as np
import PIL
import torch

from afterimage.config import AfterimageError, printable_path, size_text
from afterimage.data import decode
from afterimage.data.decode import ImageStatistics, examine
from afterimage.data.originals import Original
from afterimage.runs.files import atomic_file, remove_temporary_files
from afterimage.runs.lock import LockUnavailable, hold_lock
from afterimage.runtime.process import parallel_map
from afterimage.runtime.terminal import Progress

logger = logging.getLogger("afterimage")

MEMORY_LIMIT = 4 * 2**30
"""Largest size in bytes of the images that are kept in memory if the cache cannot be written."""
RESIDENT_LIMIT = 4 * 2**30
"""Number of bytes that are taken to be free on a device other than a GPU; images may fill half of them."""
FACTS = 1
"""Version of the stored `ImageStatistics`: increase it whenever their fields or meaning change."""
MAGIC = b"aftimg01"
"""Last bytes of a cache file."""
_FOOTER = struct.Struct("<QQI8s")  # start, length and CRC-32 of the index, and MAGIC


class CorruptCacheError(Exception):
    """Cache file with wrong content; the message gives the fault."""


class Slot(NamedTuple):
    """An image among the pixels of many: its first byte, height, width, CRC-32, and facts before it was resized."""

    offset: int
    height: int
    width: int
    crc: int
    facts: ImageStatistics


@dataclass(frozen=True, eq=False)
class PixelStore:
    """Pixels of many images, one after the other, `(size,)` uint8, and each one's slot by the SHA-256 of its content.

    `transform` describes how the images were decoded and resized.
    """

    pixels: np.ndarray
    slots: Mapping[str, Slot]
    transform: str
    _resident: dict[torch.device, torch.Tensor | None] = field(default_factory=dict, repr=False)

    def image(self, content: str) -> np.ndarray:
        """Return an image, `(3, height, width)` uint8, as a view."""
        offset, height, width, *_ = self.slots[content]
        return self.pixels[offset : offset + 3 * height * width].reshape(3, height, width)

    def has_valid_checksum(self, content: str) -> bool:
        """Return whether an image's pixels have the stored checksum."""
        return zlib.crc32(self.image(content)) == self.slots[content].crc

    def to_device(self, device: torch.device) -> torch.Tensor | None:
        """Return all pixels on a device, copied there once and kept; None if they do not fit."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._resident:
            # Use at most half of the free memory, to leave room for the networks.
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else RESIDENT_LIMIT
            fits = self.pixels.size <= free // 2
            self._resident[device] = torch.from_numpy(self.pixels).to(device) if fits else None
        return self._resident[device]


def load_or_decode(
    wanted: Mapping[str, Original],
    box: tuple[int, int],
    folder: Path,
    broken: dict[str, decode.BadImage],
    progress: Progress,
) -> PixelStore:
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
    key = hashlib.sha256("\n".join([transform, *sorted(wanted)]).encode()).hexdigest()[:24]
    path = folder / "images" / f"{sides}-{key}.images"
    if (blob := _open(path, wanted.keys())) is not None:
        return blob
    try:
        lock = path.with_suffix(".lock")
        lock.mkdir(parents=True, exist_ok=True)
        with hold_lock(lock, lambda text: progress(text, 1, 1)):
            if (blob := _open(path, wanted.keys())) is not None:
                return blob
            remove_temporary_files(path.parent, [path.name])
            with atomic_file(path) as file:
                write_blob(file, _decoded(wanted, box, transform, path.parent, broken, progress), transform)
            return map_blob(path)
    except (OSError, LockUnavailable) as error:
        logger.warning(
            "cannot write the image cache in %s (%s): the images are kept in memory, for this run only",
            printable_path(path.parent),
            decode.error_reason(error.__cause__ or error),
        )
    memory = io.BytesIO()
    slots = _append(memory, _decoded(wanted, box, transform, path.parent, broken, progress), MEMORY_LIMIT)
    return PixelStore(np.frombuffer(memory.getbuffer(), np.uint8), slots, transform)


def _open(path: Path, wanted: Set[str]) -> PixelStore | None:
    try:
        blob = map_blob(path)
        if not all(map(blob.has_valid_checksum, blob.slots)):
            raise CorruptCacheError("its pixels have a wrong checksum")
        # The file lacks images that could not be read when it was written; they may be readable now.
        return blob if wanted <= blob.slots.keys() else None
    except FileNotFoundError:
        return None
    except (CorruptCacheError, OSError) as error:
        logger.warning("the image cache %s is damaged (%s) and is built again", printable_path(path), error)
        return None


def _decoded(
    wanted: Mapping[str, Original],
    box: tuple[int, int],
    transform: str,
    folder: Path,
    broken: dict[str, decode.BadImage],
    progress: Progress,
) -> Iterator[tuple[str, np.ndarray, ImageStatistics]]:
    """Yield every wanted image that can be read, in order: `(content, (3, height, width) uint8, facts)`."""
    known = _find_in_other_files(wanted, transform, folder)

    def one(item: tuple[str, Original]) -> tuple[str, np.ndarray, ImageStatistics] | None:
        content, original = item
        if content in known and known[content].has_valid_checksum(content):
            return content, known[content].image(content), known[content].slots[content].facts
        try:
            whole = original.decode_image(max(box), content)
        except decode.BadImage as error:
            broken[content] = error
            return None
        pixels = np.asarray(decode.resize_to_cover(whole, box)).transpose(2, 0, 1)
        return content, np.ascontiguousarray(pixels), examine(whole)

    return filter(None, parallel_map(one, wanted.items(), len(wanted), "decoding images", progress))


def _find_in_other_files(
    wanted: Mapping[str, Original], transform: str, folder: Path
) -> dict[str, PixelStore]:
    """Find the cache file that holds each wanted image, if any; its pixels may be damaged and must be checked."""
    found: dict[str, PixelStore] = {}
    for path in sorted(folder.glob("*.images")):
        try:
            blob = map_blob(path)
        except (CorruptCacheError, OSError):
            continue
        if blob.transform == transform:
            found |= dict.fromkeys(wanted.keys() & blob.slots.keys(), blob)
    return found


def _append(
    file: io.BufferedIOBase,
    images: Iterable[tuple[str, np.ndarray, ImageStatistics]],
    room: int | None = None,
) -> dict[str, Slot]:
    """Write the pixels of images, at most `room` bytes, and return their slots."""
    slots: dict[str, Slot] = {}
    for content, pixels, facts in images:
        slots[content] = Slot(file.tell(), *pixels.shape[1:], zlib.crc32(pixels), facts)
        if room is not None and file.tell() + pixels.size > room:
            raise AfterimageError(
                "the image cache cannot be written, and the images are too many for memory "
                f"(over {room / 2**30:.0f} GiB); set AFTERIMAGE_CACHE to a folder with more room"
            )
        file.write(pixels)
    return slots


def write_blob(
    file: io.BufferedIOBase, images: Iterable[tuple[str, np.ndarray, ImageStatistics]], transform: str
) -> None:
    """Write a cache file of images: SHA-256 of the content, pixels `(3, height, width)` uint8, and facts of each."""
    slots = _append(file, images)
    numbers = {content: [*place, *facts] for content, (*place, facts) in slots.items()}
    index = json.dumps({"transform": transform, "images": numbers}).encode()
    file.write(index + _FOOTER.pack(file.tell(), len(index), zlib.crc32(index), MAGIC))


def map_blob(path: Path) -> PixelStore:
    """Map a cache file into memory. Only its index is checked, not its pixels (see `PixelStore.has_valid_checksum`).

    Raises:
        Damaged: length, footer or index are wrong
        OSError: the file cannot be read
    """
    with open(path, "rb") as file:
        end = file.seek(0, 2) - _FOOTER.size
        if end < 0:
            raise CorruptCacheError("it is too short")
        file.seek(end)
        start, length, crc, magic = _FOOTER.unpack(file.read())
        if magic != MAGIC or start + length != end:
            raise CorruptCacheError("it is truncated or not an image cache")
        file.seek(start)
        text = file.read(length)
    if zlib.crc32(text) != crc:
        raise CorruptCacheError("its index has a wrong checksum")
    index = json.loads(text)
    slots = {content: Slot(*own[:4], ImageStatistics(*own[4:])) for content, own in index["images"].items()}
    # Mode "c" (copy on write): writable in memory, as torch requires, but the file never changes.
    pixels = np.memmap(path, np.uint8, "c", shape=(start,)) if start else np.empty(0, np.uint8)
    return PixelStore(np.asarray(pixels), slots, index["transform"])
