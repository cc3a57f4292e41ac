"""The error class for problems that a user can put right, helpers that write its messages, and checks that raise it."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_NAME = 200
"""Number of characters of an unknown name that are compared and shown: comparing takes quadratic time."""

MAX_SEED = 2**63 - 1
"""Largest seed: TOML's largest integer, which every random generator accepts."""

MAX_SIDE = 8192
"""Largest side of resized images, in pixels."""
MAX_EPOCHS = 10**6
MAX_BATCH = 2**20
MAX_STEPS = 10**7
MAX_PROCESSES = 10**6
MAX_IMAGES = 10**9
MAX_CHANNELS = 2**16
"""Upper bounds of settings, far above any useful value: they stop a mistyped number before memory runs out."""


class AfterimageError(Exception):
    """A problem that the user can put right. The command line prints its message without a traceback."""


def unknown(kind: str, name: str, valid: Iterable[str], *, limit: int = 40) -> AfterimageError:
    """Create the error for a name that does not exist, with near matches and the valid names.

    Args:
        kind: what the name stands for, for example `decoder`
        name: the unknown name
        valid: all valid names
        limit: largest number of valid names that the message lists
    """
    valid, name = list(valid), name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    listed = ", ".join(valid[:limit]) + (f", … ({len(valid) - limit} more)" if len(valid) > limit else "")
    return AfterimageError(f"unknown {kind} {name!r}{hint} Valid: {listed}")


def listed(names: Sequence[str], most: int = 8) -> str:
    """Join at most `most` names with commas: `a, b, c and 5 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(number: int, noun: str, several: str = "") -> str:
    """Return a number with its noun, as in `1 run` or `1,200 runs`; `several` is an irregular plural."""
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def shown(path: str | Path) -> str:
    """Return a path as printable text, with undecodable bytes and control characters escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, or the name of its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_positive(owner: object, *names: str, most: int | float = math.inf) -> None:
    """Check that attributes of a config are finite and greater than 0; None passes.

    Args:
        owner: the config
        names: names of its attributes
        most: largest allowed value

    Raises:
        AfterimageError: an attribute is out of range; the message names it
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if not value > 0 or value == math.inf:  # false for NaN too
            finite = "" if value <= 0 else " and finite"
            raise AfterimageError(f"{name} must be greater than 0{finite}, got {value}")
        if value > most:
            raise AfterimageError(f"{name} must be at most {most:,}, got {value}")


def check_range(name: str, value: int | float, low: int | float, high: int | float) -> None:
    """Check that a setting lies in `[low, high]`.

    Args:
        name: name of the setting, for the message
        value: its value
        low: smallest allowed value
        high: largest allowed value

    Raises:
        AfterimageError: the value lies outside
    """
    if not low <= value <= high:  # true for NaN too
        raise AfterimageError(f"{name} must lie between {low:,} and {high:,}, got {value}")
