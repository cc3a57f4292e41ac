"""Handling of exceptions, so that each ends one part of the work while the rest continues.

An exception of any type ends the run, row or image set in which it occurs and everything that depends on that, but
nothing else. The run's folder stores the traceback and the state `failed`; the terminal shows one line.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from afterimage.config import AfterimageError
from afterimage.runtime.terminal import printable

Item = TypeVar("Item")
EVERYTHING, ENCODERS = "everything", "encoders"
"""Scopes that an exception may affect beyond its own part of the work; see `error_scope`."""


class UnexpectedError(AfterimageError):
    """Error for an exception that the code does not expect, in one line; `traceback_text` is its traceback."""

    def __init__(self, message: str, traceback_text: str = "") -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


@contextlib.contextmanager
def set_error_scope(what: str) -> Iterator[None]:
    """Mark exceptions raised in this block with the scope `what` that they affect, unless they have one already."""
    try:
        yield
    except Exception as error:
        if not error_scope(error):
            error.concerns = what
        raise


def error_scope(error: BaseException) -> str:
    """Return the scope that an exception affects beyond its own part of the work.

    That is `EVERYTHING` if it ends all work, as a lost rank does, and `ENCODERS` if it ends all rows that share them.
    """
    return getattr(error, "concerns", "") if isinstance(error, Exception) else EVERYTHING


@contextlib.contextmanager
def collect_failures(failures: list[AfterimageError], what: str) -> Iterator[None]:
    """Catch an exception of this block, and append it to `failures` as the error of `what`.

    Raises:
        Exception: the exception affects more than this block, see `error_scope`
    """
    try:
        yield
    except Exception as error:
        if error_scope(error):
            raise
        failures.append(to_afterimage_error(error, what))
        clear_error_frames(error)


def run_all_or_each(
    work: Callable[[list[Item]], None], items: Sequence[Item], on_failure: Callable[[Item, Exception], None]
) -> None:
    """Do `work` for all items at once or, if that raises, for each item alone.

    Args:
        work: called with all items, or with one
        items: the items
        on_failure: called with an item that fails alone, and its error

    Raises:
        Exception: an error that concerns everything, see `error_scope`
    """
    if not items:
        return
    try:
        work(list(items))
        return
    except Exception as error:
        if error_scope(error) == EVERYTHING:
            raise
        if len(items) == 1:
            on_failure(items[0], error)
            return
        clear_error_frames(error)
    for item in items:
        run_all_or_each(work, [item], on_failure)


def protect_callback(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a caller's callback so that its exceptions end all work, because they belong to the caller."""

    def called(*arguments: Any, **options: Any) -> Any:
        with set_error_scope(EVERYTHING):
            return callback(*arguments, **options)

    return called


def one_line(error: BaseException) -> str:
    """Return an exception as one line, such as `IndexError: index 5 is out of bounds`, of at most 500 characters."""
    known = isinstance(error, AfterimageError)
    text = str(error) if known else "".join(traceback.format_exception_only(error))
    return printable(f"{' '.join(text.split()):.500}")


def traceback_text(error: BaseException) -> str:
    """Return an exception's traceback; for one of another rank or machine, the traceback from there."""
    return printable(getattr(error, "traceback_text", "") or "".join(traceback.format_exception(error)))


def is_expected(error: BaseException) -> bool:
    """Return whether an exception explains itself to the user, so that a traceback would add nothing."""
    if isinstance(error, AfterimageError):
        return not isinstance(error, UnexpectedError)
    return is_out_of_memory(error)


def error_message(error: Exception) -> str:
    """Return an exception's message, on one line unless `is_expected`."""
    if not is_expected(error):
        return one_line(error)
    known = isinstance(error, AfterimageError)
    return str(error) if known else f"out of memory ({str(error) or 'MemoryError':.200})"


def to_afterimage_error(error: Exception, name: str, file: Path | None = None) -> AfterimageError:
    """Turn an exception into an `AfterimageError` that names what it ended.

    Args:
        error: the exception
        name: name of the run, row or image set that it ended
        file: file that holds the traceback
    """
    text = error_message(error)
    text = text if name in text else f"{name}: {text}"
    if is_expected(error):
        found = AfterimageError(text)
    else:
        found = UnexpectedError(
            text if file is None else f"{text} (traceback: {file})", traceback_text(error)
        )
    found.__cause__ = error
    return found


def clear_error_frames(error: BaseException | None) -> None:
    """Free the objects in an exception's frames, such as a network and its features, once it has been handled.

    Its marks are removed too, because some libraries keep an exception and raise it again.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        for mark in ("concerns", "known_to_all_ranks"):
            vars(error).pop(mark, None)
        error = error.__cause__ or error.__context__


_SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
"""Parts of a RuntimeError's message that mean that memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out; on a CPU PyTorch raises a plain RuntimeError then."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
