"""Absolute paths for settings, so that each folder has one name, and access to paths of any bytes."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from afterimage.config.errors import AfterimageError, shown


def absolute_path(path: str) -> str:
    """Return a path that is valid from every working folder; `x`, `./x` and `x/` give the same one.

    Symbolic links keep their names, except that `..` is resolved as the operating system does. A path that is
    not UTF-8 becomes a `file://` address, which any text file can hold; `local_path` decodes it.
    """
    try:
        absolute = Path(local_path(path))
        absolute = absolute if absolute.is_absolute() else Path(_working_folder(), absolute)
        parts = absolute.parts
        if ".." in parts:
            end = len(parts) - parts[::-1].index("..")
            if not any(sign in part for part in parts[:end] for sign in "*?[{"):
                absolute = Path(os.path.realpath(Path(*parts[:end])), *parts[end:])
    except ValueError:
        return path  # a null byte: opening the file raises the error
    text = str(absolute)
    try:
        text.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(absolute))
    return text


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise AfterimageError(f"the working folder is gone: {error.strerror}") from None


def local_path(path: str) -> str:
    """Return a path of a configuration in the operating system's form: `file://` decoded, `~` expanded."""
    if path.startswith("file://"):
        return os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix("file://")))
    return os.path.expanduser(path)


def absolute_source(source: str) -> str:
    """Return a source of images with its path or its pattern of shards made absolute.

    Sources without a path stay as they are.
    """
    kind, _, path = source.partition(":")
    if not path or kind not in ("folder", "div2k", "webdataset", "parquet", "pairs"):
        return source
    if kind in ("webdataset", "parquet"):
        return f"{kind}:{_absolute_pattern(path)}"
    return f"{kind}:{absolute_path(path)}"


def _absolute_pattern(pattern: str) -> str:
    """Make a pattern with braces and globs absolute; glob characters in the working folder's own name are escaped."""
    plain = local_path(pattern)
    if os.path.isabs(plain) or re.match(r"\{[^{}]*(?<![^{,])[/~]", plain):
        return absolute_path(pattern) if os.path.isabs(plain) else pattern
    here = _working_folder()
    if re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}", here):
        raise AfterimageError(
            f"the working folder {shown(here)} has braces in its name, which a pattern of shards takes for its own; "
            "start from another folder"
        )
    return absolute_path(os.path.join(glob.escape(here), plain))


@contextlib.contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """Yield a UTF-8 path to a file, valid inside the block, for libraries that refuse other paths."""
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield text
