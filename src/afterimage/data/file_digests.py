"""SHA-256 of files, remembered by path, size and times, so that a second start does not read them again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.data.decode import open_file, reason, shown
from afterimage.runs.files import atomic_file

logger = logging.getLogger("afterimage")


class FileDigests:
    """The digests of the files of one source, which `root` names; `save` keeps them for the next start."""

    def __init__(self, cache: Path, root: Path) -> None:
        name = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:24]
        self._file = cache / "digests" / f"{name}.json"
        self._changed = False
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None  # nothing remembered, or not readable: every file is read once more
        self._known: dict[str, list] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """The SHA-256 of a file's bytes, in hexadecimal; raises `BadImage` where it cannot be read."""
        key = os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")
        with open_file(path) as file:
            seen = _seen(os.fstat(file.fileno()))
            match self._known.get(key):
                case [*known, str(digest)] if known == seen:
                    return digest
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[key] = [*seen, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        if not self._changed:
            return
        try:
            with atomic_file(self._file) as file:
                file.write(json.dumps(self._known).encode())
        except OSError as error:
            logger.debug("cannot remember digests in %s: %s", self._file, error)


def file_state(path: Path) -> list[int]:
    """What changes when a file does; raises `AfterimageError` where it cannot be looked at."""
    try:
        return _seen(path.stat())
    except OSError as error:
        raise AfterimageError(f"cannot read {shown(path)}: {reason(error)}") from None


def _seen(state: os.stat_result) -> list[int]:
    """Size and times; the change time too, so that a file swapped for one of the same size and age is seen."""
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
