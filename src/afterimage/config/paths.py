"""Make paths in settings absolute, so that one folder has one name."""

from __future__ import annotations

import glob
import os
import re
import urllib.parse
from pathlib import Path

from afterimage.config.errors import AfterimageError, shown


def absolute_path(path: str) -> str:
    """A path as it is the same from every working folder, however it was written: `x`, `./x` and `x/` are one.

    Links stay as they are named, except that `..` is resolved as the system would. A path that is not UTF-8 becomes a
    `file://` address, which every file of text can hold; `local_path` takes it back.
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
        return path  # a null byte: whoever opens it says so
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
    """A path of a configuration as the system takes it: a `file://` address decoded, `~` as the home folder."""
    if path.startswith("file://"):
        return os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix("file://")))
    return os.path.expanduser(path)


def absolute_source(source: str) -> str:
    """A source of images with its path, or its pattern of shards, made absolute; others stay as they are."""
    kind, _, path = source.partition(":")
    if not path or kind not in ("folder", "div2k", "webdataset", "parquet", "pairs"):
        return source
    if kind in ("webdataset", "parquet"):
        return f"{kind}:{_absolute_pattern(path)}"
    return f"{kind}:{absolute_path(path)}"


def _absolute_pattern(pattern: str) -> str:
    """A pattern with braces and globs; those in the working folder's own name are none."""
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
