"""Atomic writes, and readers that name the file they could not read."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from afterimage.config import AfterimageError, printable_path, read_text

MAX_PIXELS = 2**26
"""Largest number of pixels of an image in a run folder."""

TEMPORARY_SUFFIX = ".part"
"""Suffix of files that are being written; one that remains was left by a killed process."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file completely or not at all: the block writes a temporary file, which is synced and then renamed.

    Args:
        path: the file; missing folders are created
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file's whole content as `atomic_file` does; raise an `AfterimageError` that names it if that fails."""
    # A name with undecodable bytes has lone surrogates, which UTF-8 cannot hold; the escape is also valid in JSON.
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        with atomic_file(Path(path)) as file:
            file.write(content)
    except OSError as error:
        raise AfterimageError(f"cannot write {printable_path(path)}: {error.strerror or error}") from error


def remove_temporary_files(folder: Path, names: Iterable[str] | None = None, *, min_age: float = 0.0) -> None:
    """Remove partly written files that did not change for `min_age` seconds.

    `names` are files in the folder, for those of these files alone; None means all at any depth.
    """
    own = None if names is None else frozenset(names)
    for path in folder.glob(f"{'**/' if own is None else ''}.*.*{TEMPORARY_SUFFIX}"):
        if own is None or path.name[1:].removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] in own:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= min_age:
                    path.unlink()


def _sync_folder(path: Path) -> None:
    """Sync a folder, so that renames in it survive a power cut, if the system supports that."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, dataclasses as objects; None is kept, so that every file has every key."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=dataclasses.asdict)
    write_atomic(path, text + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal; raise `AfterimageError` if it cannot be read."""
    if path.exists() and not path.is_file():
        raise AfterimageError(f"cannot read {printable_path(path)}: it is not a regular file")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error.strerror}") from None


# Lone surrogates, except those by which Python writes undecodable bytes in file names (PEP 383).
_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raise an `AfterimageError` that names it if it cannot be read or is invalid."""
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\u" in text and (half := _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False))):
            raise ValueError(f"{half[0]!r} is a lone surrogate")
        return value
    except (ValueError, RecursionError) as error:
        raise AfterimageError(f"{printable_path(path)} is not valid JSON: {error}") from None


def read_object(path: str | Path, version: str = "", expected: int = 0) -> dict[str, Any]:
    """Read a JSON object; remove its `version`, the key of the layout's version, which must be `expected`.

    Raises:
        AfterimageError: the file cannot be read, holds no object or has another version; the message names it
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise AfterimageError(f"{printable_path(path)} must hold a JSON object, got {values!r:.80}")
    if version and (found := values.pop(version, None)) != expected:
        raise AfterimageError(
            f"{printable_path(path)} has {version} {found!r:.80}; this version reads {expected}"
        )
    return values


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under a header with the first row's keys; None becomes an empty cell, floats keep every digit."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def write_image(path: str | Path, pixels: Any, texts: Mapping[str, str] | None = None) -> None:
    """Write uint8 pixels, `(H, W, 3)` or grey `(H, W)`, as a PNG file with embedded texts by keyword."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    buffer, info = io.BytesIO(), PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_itxt(keyword, text)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def read_image(path: str | Path, content: bytes | None = None) -> Any:
    """Read a PNG image of a run folder, or its bytes `content` if already read, as a loaded Pillow image.

    Raises:
        AfterimageError: the file is missing, damaged, of another format or too large; the message names it
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if content is not None else path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise AfterimageError(
                    f"cannot read the image {printable_path(path)}: it has over {MAX_PIXELS:,} pixels"
                )
            image.load()
            return image
    except AfterimageError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise AfterimageError(f"cannot read the image {printable_path(path)}: {error}") from None


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV file; numbers are converted, empty cells become None, and the column `id` stays text.

    Raises:
        AfterimageError: the file cannot be read, or a row has more or fewer cells than the header
    """
    rows = []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            if None in row or None in row.values():
                raise AfterimageError(
                    f"{printable_path(path)}, line {reader.line_num}: the row does not have the header's "
                    f"{len(reader.fieldnames or ())} cells"
                )
            rows.append({k: v if k == "id" else _number(v) for k, v in row.items()})
    except csv.Error as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error}") from None
    return rows


def check_number(path: Path, row: Mapping[str, Any], column: str) -> None:
    """Check that a cell of a CSV file holds a finite number; raise an `AfterimageError` that names it otherwise."""
    value = row.get(column)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise AfterimageError(
            f"{printable_path(path)}: {column} of image {row.get('id')!r:.200} is {value!r:.80}, not a finite number"
        )


def _number(cell: str | None) -> Any:
    if not cell:
        return None
    try:
        number = float(cell)
    except ValueError:
        return cell
    # Larger integers become floats; `from_dict` does not accept them.
    with contextlib.suppress(ValueError):
        return int(cell) if abs(number) < 2**63 else number
    return number
