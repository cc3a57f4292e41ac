"""Download, verify and unpack DIV2K.

pooch is not used because it restarts a download of 3.5 GB if the connection breaks.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from afterimage.config import AfterimageError, local_path, printable_path
from afterimage.data.decode import error_reason
from afterimage.data.originals import FileOriginal
from afterimage.data.sampling import Source
from afterimage.runs.files import sha256
from afterimage.runs.lock import hold_lock
from afterimage.runtime.terminal import Progress, no_progress

TIMEOUT = 30.0
ATTEMPTS = 4  # consecutive attempts without any progress
_CHUNK = 2**20
_IMAGE = re.compile(r"\d{4}\.png")


@dataclass(frozen=True)
class Archive:
    """Published zip file: name without `.zip` and of the folder in it, size in bytes, SHA-256, number of images."""

    name: str
    bytes: int
    sha256: str
    images: int


def download(archive: Archive, url: str, path: Path, progress: Progress = no_progress) -> None:
    """Download an archive from `url` to `path` and verify it.

    A lost connection is retried, and the bytes received so far are kept for a later call, in a file with the suffix
    `.part`.

    Raises:
        AfterimageError: the server refuses, does not answer, or has another file
        OSError: the disk cannot be written
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    while (before := _size(part)) < archive.bytes:
        try:
            _fetch(archive, url, part, progress)
            problem = "the connection was closed"
        except urllib.error.HTTPError as error:
            problem = f"the server says {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
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


def verify(archive: Archive, path: Path, progress: Progress = no_progress) -> None:
    """Check that a file has the size and the SHA-256 of an archive; raise an `AfterimageError` if not."""
    progress(f"verifying {archive.name}", 0, 1)
    size, digest = path.stat().st_size, sha256(path)
    progress(f"verifying {archive.name}", 1, 1)
    if (size, digest) != (archive.bytes, archive.sha256):
        raise AfterimageError(
            f"{printable_path(path)} is damaged or not the published {archive.name}.zip: it has {size:,} "
            "bytes and SHA-256 "
            f"{digest}; expected {archive.bytes:,} bytes and {archive.sha256}"
        )


def check_free_space(folder: Path, needed: int) -> None:
    """Check that a folder's disk has `needed` bytes free; raise an `AfterimageError` if not."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise AfterimageError(
            f"not enough room in {printable_path(folder)}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free; "
            "set AFTERIMAGE_CACHE to a folder on a disk with more"
        )


def _fetch(archive: Archive, url: str, part: Path, progress: Progress) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if response.status == 206 and resumed else 0
        length = response.headers.get("Content-Length")
        if length is not None and have + int(length) != archive.bytes:
            raise AfterimageError(
                f"{url} has the wrong size: {have + int(length):,} bytes instead of {archive.bytes:,}; "
                "is there a proxy or a login page in between?"
            )
        with open(part, "ab" if have else "wb") as file:
            while have < archive.bytes and (chunk := response.read1(min(_CHUNK, archive.bytes - have))):
                file.write(chunk)
                have += len(chunk)
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


def unpack(archive: Archive, path: Path, folder: Path, progress: Progress = no_progress) -> None:
    """Unpack the images of a verified archive into a folder that does not exist yet, completely or not at all.

    Members are written under their bare names. No further checks are needed, as the archive's digest is verified.

    Raises:
        AfterimageError: there is not enough room
        OSError: the disk cannot be written
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    with (
        zipfile.ZipFile(path) as file,
        tempfile.TemporaryDirectory(".part", f".{folder.name}.", folder.parent) as temporary,
    ):
        images = [member for member in file.infolist() if _IMAGE.fullmatch(Path(member.filename).name)]
        check_free_space(folder.parent, sum(member.file_size for member in images))
        whole = Path(temporary, folder.name)
        whole.mkdir()
        for done, member in enumerate(images, 1):
            with file.open(member) as source, open(whole / Path(member.filename).name, "wb") as out:
                shutil.copyfileobj(source, out, _CHUNK)
                out.flush()
                os.fsync(out.fileno())
            progress(f"unpacking {archive.name}", done, len(images))
        os.replace(whole, folder)


BASE_URL = "https://data.vision.ee.ethz.ch/cvl/DIV2K/"
# Sizes and SHA-256 of the official files, from TensorFlow Datasets.
_TRAIN = "9d0b9c463f6e35b6c62cc6a930ee2224f670b34c1df841a57670f9acf0f6c335"
_VALID = "20dd31fd84d777bc1cf5d6b7654a3f569c0aec74458ae094122ad1d0489900fc"
ARCHIVES = {
    "train": Archive("DIV2K_train_HR", 3_530_603_713, _TRAIN, 800),
    "test": Archive("DIV2K_valid_HR", 448_993_893, _VALID, 100),
}


def read_div2k(path: str, parts: Collection[str], cache: Path, progress: Progress = no_progress) -> Source:
    """List the images of DIV2K, after downloading them if necessary. Its validation images are the test split.

    Args:
        path: folder with the archives or their unpacked folders; empty to download them
        parts, cache, progress: see `read_source`

    Raises:
        AfterimageError: the archives are missing, damaged or incomplete, or cannot be downloaded or unpacked
    """
    given = Path(local_path(path)) if path else None
    if given is not None and not given.is_dir():
        raise AfterimageError(f"there is no folder {printable_path(given)}")
    found: dict[str, list[FileOriginal]] = {}
    for part, archive in ARCHIVES.items():
        if part not in parts:
            continue
        try:
            folder = _unpacked(archive, given, cache / "div2k", progress)
            files = sorted(f.name for f in folder.iterdir() if _IMAGE.fullmatch(f.name))
        except OSError as error:
            where = error.filename or cache / "div2k"
            raise AfterimageError(
                f"cannot get {archive.name}: {printable_path(where)}: {error_reason(error)}"
            ) from None
        if len(files) != archive.images:
            raise AfterimageError(
                f"{printable_path(folder)} holds {len(files)} images, {archive.name} has {archive.images}; "
                f"complete or remove it, or use it as it is with folder:{printable_path(folder)}"
            )
        found[part] = [FileOriginal(Path(file).stem, folder, file) for file in files]
    return Source(found.get("train", ()), None, found.get("test"), root=given or cache / "div2k")


def _unpacked(archive: Archive, given: Path | None, kept: Path, progress: Progress) -> Path:
    """Return the folder with the archive's images; if there is none, create it, in one process at a time."""
    if given is not None and (given / archive.name).is_dir():
        return given / archive.name
    file = (given or kept) / f"{archive.name}.zip"
    if given is not None and not file.is_file():
        raise AfterimageError(f"{given} holds neither the folder {archive.name} nor {archive.name}.zip")
    folder = kept / archive.name
    if folder.is_dir():
        return folder
    lock = kept / f"{archive.name}.lock"
    lock.mkdir(parents=True, exist_ok=True)
    with hold_lock(lock, lambda text: progress(text, 1, 1)):
        if folder.is_dir():
            return folder
        if file.is_file():
            verify(archive, file, progress)
        else:
            check_free_space(kept, 2 * archive.bytes)
            download(archive, BASE_URL + file.name, file, progress)
        unpack(archive, file, folder, progress)
        if given is None:
            file.unlink()
    return folder
