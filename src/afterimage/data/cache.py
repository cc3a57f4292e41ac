"""The decode-once cache: every original is decoded once, whatever run, split or process asks for it.

A file of the cache holds one set of pictures under one transform and is named after their contents. It is
written whole or not at all, checked whenever it is opened, and built again where it is damaged. Pictures that
another file already holds are copied from there. Any file may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import numpy as np
import PIL

from afterimage.config import AfterimageError
from afterimage.data import decode
from afterimage.data.blob import Blob, Damaged, Slot, map_blob, write_blob
from afterimage.data.examine import Facts
from afterimage.data.files import locked, remove_leftovers, whole_file
from afterimage.data.originals import Original
from afterimage.data.parallel import Progress, in_parallel

logger = logging.getLogger("afterimage")

MEMORY_LIMIT = 4 * 2**30
FACTS = 1
"""Raised whenever what is kept of an image beside its pixels changes."""


def cached(
    wanted: Mapping[str, Original],
    size: int,
    folder: Path,
    broken: dict[str, decode.BadPicture],
    progress: Progress | None = None,
) -> Blob:
    """The pixels of the wanted pictures (by content digest), their shorter side `size`.

    Pictures that cannot be read are added to `broken` and missing from the result. A cache that cannot be
    written is no error: the pictures are then kept in memory, with a message.
    """
    transform = f"decode {decode.VERSION}, Pillow {PIL.__version__}, facts {FACTS}, shorter side {size}"
    path = folder / "pictures" / f"{size}-{_key(wanted, transform)}.pictures"
    blob = _open(path, wanted.keys())
    if blob is not None:
        return blob
    try:
        with locked(path.with_suffix(".lock"), "decoding the same pictures") as alone:
            blob = _open(path, wanted.keys())
            if blob is not None:
                return blob
            if alone:
                remove_leftovers(path)
            pictures = _decoded(wanted, size, transform, path.parent, broken, progress)
            with whole_file(path) as file:
                write_blob(file, pictures, transform)
            return map_blob(path)
    except OSError as error:
        problem = decode.reason(error)
        logger.warning(
            "cannot write the picture cache in %s (%s): the pictures are kept in memory, for this run only",
            path.parent,
            problem,
        )
    pictures = _decoded(wanted, size, transform, path.parent, broken, progress)
    return _in_memory(pictures, transform, path.parent)


def _key(contents: Mapping[str, object], transform: str) -> str:
    return hashlib.sha256("\n".join([transform, *sorted(contents)]).encode()).hexdigest()[:24]


def _open(path: Path, wanted: Set[str]) -> Blob | None:
    try:
        blob = map_blob(path)
        if not all(map(blob.sound, blob.slots)):
            raise Damaged("its pixels have a wrong checksum")
        # Pictures that could not be read are not in it; perhaps they can be now.
        return blob if wanted <= blob.slots.keys() else None
    except FileNotFoundError:
        return None
    except (Damaged, OSError) as error:
        logger.warning("the picture cache %s is damaged (%s) and is built again", path, error)
        return None


def _decoded(
    wanted: Mapping[str, Original],
    size: int,
    transform: str,
    folder: Path,
    broken: dict[str, decode.BadPicture],
    progress: Progress | None,
) -> Iterator[tuple[str, np.ndarray, Facts]]:
    """Every wanted picture that can be read, in their order, as `(content, (3, height, width) uint8, facts)`."""
    known = _elsewhere(wanted, transform, folder)

    def one(item: tuple[str, Original]) -> tuple[str, tuple[np.ndarray, Facts] | decode.BadPicture]:
        content, original = item
        if content in known and known[content].sound(content):
            return content, (known[content].picture(content), known[content].facts[content])
        try:
            picture, facts = original.examined(size, content)
        except decode.BadPicture as error:
            return content, error
        return content, (np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)), facts)

    for content, result in in_parallel(one, wanted.items(), len(wanted), "decoding pictures", progress):
        if isinstance(result, decode.BadPicture):
            broken[content] = result
        else:
            yield content, *result


def _elsewhere(wanted: Mapping[str, Original], transform: str, folder: Path) -> dict[str, Blob]:
    """Which files of the cache hold wanted pictures; a damaged one may still hold sound ones."""
    found: dict[str, Blob] = {}
    for path in sorted(folder.glob("*.pictures")):
        try:
            blob = map_blob(path)
        except (Damaged, OSError):
            continue
        if blob.transform == transform:
            found |= dict.fromkeys(wanted.keys() & blob.slots.keys(), blob)
    return found


def _in_memory(pictures: Iterator[tuple[str, np.ndarray, Facts]], transform: str, folder: Path) -> Blob:
    slots: dict[str, Slot] = {}
    facts: dict[str, Facts] = {}
    file = io.BytesIO()
    for content, pixels, own in pictures:
        facts[content] = own
        slots[content] = Slot(file.tell(), *pixels.shape[1:], zlib.crc32(pixels))
        if file.tell() + pixels.size > MEMORY_LIMIT:
            raise AfterimageError(
                f"the picture cache in {folder} cannot be written, and the pictures are too many for memory "
                f"(over {MEMORY_LIMIT / 2**30:.0f} GiB); set AFTERIMAGE_CACHE to a folder with more room"
            )
        file.write(pixels)
    return Blob(np.frombuffer(file.getbuffer(), np.uint8), slots, transform, facts)
