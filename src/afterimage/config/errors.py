"""Errors that a user can put right, and the one for a name that does not exist."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


MAX_NAME = 200
"""Characters of a name that are looked at and shown where it is unknown: comparing takes the square of its length."""


class AfterimageError(Exception):
    """Something the user can put right. The command line prints it as one message, without a traceback."""


def unknown(kind: str, name: str, valid: Iterable[str], *, limit: int = 40) -> AfterimageError:
    """The error for a name that does not exist: it suggests near matches and lists what would be valid."""
    valid, name = list(valid), name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    listed = ", ".join(valid[:limit]) + (f", … ({len(valid) - limit} more)" if len(valid) > limit else "")
    return AfterimageError(f"unknown {kind} {name!r}{hint} Valid: {listed}")


def shown(path: str | Path) -> str:
    """A path as text that can always be printed: undecodable bytes and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line that another library's error says, or else its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
