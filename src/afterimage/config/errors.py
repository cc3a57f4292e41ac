"""The error class for problems that a user can put right, helpers that write its messages, and checks that raise it."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_NAME_LENGTH = 200
"""Longest name, in characters, that is compared with valid ones and shown in full: comparing takes quadratic time."""

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


def unknown_choice_error(kind: str, name: str, valid: Iterable[str], *, limit: int = 40) -> AfterimageError:
    """Create the error for an unknown name of a `kind`, with near matches and up to `limit` valid names."""
    valid, name = list(valid), name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    listed = ", ".join(valid[:limit]) + (f", … ({len(valid) - limit} more)" if len(valid) > limit else "")
    return AfterimageError(f"unknown {kind} {name!r}{hint} Valid: {listed}")


def join_names(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """Join at most `most` names by a separator: `a, b, c and 5 more`."""
    more, end = len(names) - most, " " if separator == ", " else separator
    return separator.join(names[:most]) + (f"{end}and {more:,} more" if more > 0 else "")


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as in `1 run` or `1,200 runs`; `plural` is an irregular plural."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def printable_path(path: str | Path) -> str:
    """Return a path as printable text, with undecodable bytes and control characters escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, or the name of its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_positive(owner: object, *names: str, most: int | float = math.inf) -> None:
    """Check that attributes of a config are greater than 0 and at most `most`; None passes.

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


def check_choice(kind: str, value: str, valid: Iterable[str]) -> None:
    """Check that a value is one of the valid ones; raise the error of `unknown_choice_error` if not."""
    if value not in (valid := list(valid)):
        raise unknown_choice_error(kind, value, valid)


def check_fraction(config: object, *names: str) -> None:
    """Check that attributes of a config lie between 0 and 1, both excluded."""
    for name in names:
        if not 0 < getattr(config, name) < 1:
            raise AfterimageError(
                f"{name} must lie between 0 and 1, both excluded, got {getattr(config, name)}"
            )


def check_range(name: str, value: int | float, low: int | float, high: int | float) -> None:
    """Check that a setting lies in `[low, high]`; raise an `AfterimageError` that names it if not."""
    if not low <= value <= high:  # true for NaN too
        raise AfterimageError(f"{name} must lie between {low:,} and {high:,}, got {value}")
