"""Downloads that go on from where they stopped and are verified before they are used."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from afterimage.config import AfterimageError
from afterimage.data.parallel import Progress

TIMEOUT = 30.0
ATTEMPTS = 4  # without any progress, one after the other
_CHUNK = 2**20


@dataclass(frozen=True)
class Archive:
    """A zip file as its publisher made it: size, digest and how many pictures it holds."""

    name: str
    bytes: int
    sha256: str
    pictures: int


def download(archive: Archive, url: str, path: Path, progress: Progress | None = None) -> None:
    """Download to `path`, by way of `path`.part, and verify size and SHA-256.

    A lost connection is tried again; what has arrived is kept for the next try, in this run or a later one.
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    while (before := _size(part)) < archive.bytes:
        try:
            _fetch(archive, url, part, progress)
            problem = "the connection was closed"
        except urllib.error.HTTPError as error:
            problem = f"the server says {error.code} {error.reason}"
            if error.code == 416:
                part.unlink()  # more is here than the server has
            elif error.code < 500 and error.code not in (408, 429):
                raise _failed(url, part, problem) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # the disk, not the network
            problem = str(getattr(error, "reason", None) or error or type(error).__name__)
        failures = 0 if _size(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise _failed(url, part, problem)
        if failures:
            time.sleep(2 ** (failures - 1))
    try:
        verify(archive, part, progress)
    except AfterimageError as error:
        part.unlink()
        raise AfterimageError(f"{error}. It was removed: run the same again") from None
    os.replace(part, path)


def verify(archive: Archive, path: Path, progress: Progress | None = None) -> None:
    """Raise where a file's size or SHA-256 is not that of the archive."""
    digest, done = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(16 * _CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"verifying {archive.name}", done, max(archive.bytes, done))
    if (done, digest.hexdigest()) != (archive.bytes, archive.sha256):
        raise AfterimageError(
            f"{path} is damaged or not the published {archive.name}.zip: it has {done:,} bytes and SHA-256 "
            f"{digest.hexdigest()}; expected {archive.bytes:,} bytes and {archive.sha256}"
        )


def need_room(folder: Path, needed: int) -> None:
    """Raise where a folder's disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AfterimageError(
            f"not enough room in {folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
            "set AFTERIMAGE_CACHE to a folder with more"
        )


def _fetch(archive: Archive, url: str, part: Path, progress: Progress | None) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if response.status == 206 and resumed else 0
        length = response.headers.get("Content-Length")
        if length is not None and have + int(length) != archive.bytes:
            raise AfterimageError(
                f"{url} is not what it should be: {have + int(length):,} bytes instead of {archive.bytes:,}; "
                "is there a proxy or a login page in between?"
            )
        with open(part, "ab" if have else "wb") as file:
            while have < archive.bytes and (chunk := response.read1(min(_CHUNK, archive.bytes - have))):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(f"downloading {archive.name}", have, archive.bytes)
            file.flush()
            os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _failed(url: str, part: Path, problem: str) -> AfterimageError:
    kept = _size(part)
    hint = f"; {kept:,} bytes are kept in {part} and the next try goes on from there" if kept else ""
    return AfterimageError(
        f"cannot download {url}: {problem}{hint}. "
        "Or get the archives by other means and name their folder: div2k:PATH"
    )
