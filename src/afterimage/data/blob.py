"""A file of decoded pictures, memory-mapped: one copy in memory for all processes that use it.

Planar `(3, height, width)` uint8 pixels one after the other, then an index in JSON (content digest, offset,
height, width, CRC-32, and the facts of the image before it was resized) and a footer that finds and checks the index.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from afterimage.data.examine import Facts

MAGIC = b"aftimg01"
RESIDENT_LIMIT = 4 * 2**30
_FOOTER = struct.Struct("<QQI8s")


class Damaged(Exception):
    """A cache file that does not hold what it should."""


class Slot(NamedTuple):
    """Where a picture lies among the pixels."""

    offset: int
    height: int
    width: int
    crc: int

    @property
    def size(self) -> int:
        return 3 * self.height * self.width


@dataclass(frozen=True, eq=False)
class Blob:
    """Pixels of many pictures, `(size,)` uint8, and the slot and the facts of each by its content digest."""

    pixels: np.ndarray
    slots: Mapping[str, Slot]
    transform: str
    facts: Mapping[str, Facts] = field(default_factory=dict)
    _resident: dict[torch.device, torch.Tensor | None] = field(default_factory=dict, repr=False)

    def picture(self, content: str) -> np.ndarray:
        """One picture, `(3, height, width)` uint8; a view, not a copy."""
        slot = self.slots[content]
        return self.pixels[slot.offset : slot.offset + slot.size].reshape(3, slot.height, slot.width)

    def sound(self, content: str) -> bool:
        """Whether a picture's pixels still have their checksum."""
        return zlib.crc32(self.picture(content)) == self.slots[content].crc

    def on(self, device: torch.device) -> torch.Tensor | None:
        """All pixels as a tensor on `device`, copied there once and kept; None where they would not fit."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._resident:
            # Half of what is free leaves room for the networks.
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else RESIDENT_LIMIT
            fits = self.pixels.size <= free // 2
            self._resident[device] = torch.from_numpy(self.pixels).to(device) if fits else None
        return self._resident[device]


def write_blob(file: BinaryIO, pictures: Iterable[tuple[str, np.ndarray, Facts]], transform: str) -> None:
    """Write pictures, `(content, (3, height, width) uint8, facts)`, as they come."""
    slots: dict[str, tuple[int, ...]] = {}
    for content, pixels, facts in pictures:
        slots[content] = (*Slot(file.tell(), *pixels.shape[1:], zlib.crc32(pixels)), *facts)
        file.write(pixels)
    start = file.tell()
    index = json.dumps({"transform": transform, "pictures": slots}).encode()
    file.write(index)
    file.write(_FOOTER.pack(start, len(index), zlib.crc32(index), MAGIC))


def map_blob(path: Path) -> Blob:
    """Map a file. Its length, footer and index are checked; its pixels are not (see `Blob.sound`)."""
    with open(path, "rb") as file:
        end = file.seek(0, 2) - _FOOTER.size
        if end < 0:
            raise Damaged("it is too short")
        file.seek(end)
        start, length, crc, magic = _FOOTER.unpack(file.read(_FOOTER.size))
        if magic != MAGIC or start + length != end:
            raise Damaged("it was cut short, or is no file of pictures")
        file.seek(start)
        text = file.read(length)
    if zlib.crc32(text) != crc:
        raise Damaged("its index has a wrong checksum")
    try:
        index = json.loads(text)
        transform = str(index["transform"])
        numbers = {content: list(map(int, own)) for content, own in index["pictures"].items()}
        slots = {content: Slot(*own[: len(Slot._fields)]) for content, own in numbers.items()}
        facts = {content: Facts(*own[len(Slot._fields) :]) for content, own in numbers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged("its index cannot be read") from error
    if any(min(s.offset, s.height - 1, s.width - 1) < 0 or s.offset + s.size > start for s in slots.values()):
        raise Damaged("its index points outside of it")
    # Mode "c": writable in memory, as torch wants it, but never on disk, and shared until written to.
    pixels = np.memmap(path, np.uint8, "c", shape=(start,)) if start else np.empty(0, np.uint8)
    return Blob(np.asarray(pixels), slots, transform, facts)
