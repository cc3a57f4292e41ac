"""Cache of image files' digests and sides, by path, size and times, which spares a second run reading the files."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from afterimage.config import shown
from afterimage.data.decode import check_header
from afterimage.runs.files import atomic_file

logger = logging.getLogger("afterimage")

_ROW = np.dtype([("key", "<u8"), ("sha256", "u1", (32,)), ("sides", "<i4", (2,))])


class Content(NamedTuple):
    """Digest and size of an image before it is decoded.

    Attributes:
        sha256: digest of the bytes or of the recipe that the image is made from, in hexadecimal
        width: width in pixels
        height: height in pixels
    """

    sha256: str
    width: int
    height: int


class FileDigests:
    """Stored digests of one source, 48 bytes an image.

    Args:
        cache: folder of the cache
        root: folder or name of the source, from which the name of the file of digests is derived
    """

    def __init__(self, cache: Path, root: Path) -> None:
        name = hashlib.sha256(os.fsencode(root)).hexdigest()[:24]
        self._file = cache / "digests" / f"{name}.npz"
        self._known = self._load()
        self._keys = np.ascontiguousarray(self._known["key"])
        self._new = bytearray()

    def of(self, state: str, read: Callable[[], bytes], name: str) -> Content:
        """Return the digest and size of an image, as stored for its `state` or from its bytes.

        Args:
            state: text that changes with the image's bytes, such as path, size and times
            read: returns the image's bytes
            name: name of the image, for the error

        Raises:
            BadImage: the image cannot be read, or its header is not that of an image
        """
        key = int.from_bytes(hashlib.sha256(state.encode()).digest()[:8], "little")
        place = np.searchsorted(self._keys, np.uint64(key))
        if place < len(self._keys) and self._keys[place] == key:
            _, digest, sides = self._known[place]
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
            logger.debug("cannot remember digests in %s: %s", shown(self._file), error)

    def _load(self) -> np.ndarray:
        try:
            with np.load(self._file, allow_pickle=False) as stored:
                table = stored["table"]
            if table.dtype != _ROW or (table["key"][1:] <= table["key"][:-1]).any():
                raise ValueError("its table is none of digests")
            return table
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning(
                "the digests in %s cannot be read (%s) and are taken anew", shown(self._file), error
            )
        return np.empty(0, _ROW)
