"""The error class for problems that a user can put right, and helpers that write its messages."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

MAX_NAME = 200
"""Characters of an unknown name that are compared and shown: the time to compare grows with the square of the
length.
"""


class AfterimageError(Exception):
    """A problem that the user can put right. The command line prints its message without a traceback."""


def unknown(kind: str, name: str, valid: Iterable[str], *, limit: int = 40) -> AfterimageError:
    """Create the error for a name that does not exist, with near matches and the valid names.

    Args:
        kind: what the name stands for, for example `decoder`
        name: the unknown name
        valid: all valid names
        limit: how many valid names the message lists
    """
    valid, name = list(valid), name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    listed = ", ".join(valid[:limit]) + (f", … ({len(valid) - limit} more)" if len(valid) > limit else "")
    return AfterimageError(f"unknown {kind} {name!r}{hint} Valid: {listed}")


def shown(path: str | Path) -> str:
    """Return a path as printable text: undecodable bytes and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, or the name of its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
