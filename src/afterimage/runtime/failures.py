"""Handle an exception that ends one part of the work while the rest continues.

Whatever its type, an exception ends the run, row or image set in which it occurs and nothing that does not
depend on it. The run's folder stores the traceback and the state `failed`; the terminal shows one line.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError
from afterimage.runtime.terminal import printable

EVERYTHING, ENCODERS = "everything", "encoders"
"""What an exception may affect beside the part of the work in which it is raised; see `concerns`."""


class Unexpected(AfterimageError):
    """An exception of a kind that the code does not expect, as one line; `story` is its traceback."""

    def __init__(self, text: str, story: str = "") -> None:
        super().__init__(text)
        self.story = story


@contextlib.contextmanager
def concerning(what: str) -> Iterator[None]:
    """Mark exceptions of this block as affecting everything that shares `what`, unless they are marked already."""
    try:
        yield
    except Exception as error:
        if not concerns(error):
            error.concerns = what
        raise


def concerns(error: BaseException) -> str:
    """Return what an exception affects beside its own part of the work.

    Returns:
        `EVERYTHING` for what ends all work, such as a lost rank; `ENCODERS` for all rows that share the
            encoders; otherwise the empty string
    """
    return getattr(error, "concerns", "") if isinstance(error, Exception) else EVERYTHING


@contextlib.contextmanager
def collected(failures: list[AfterimageError], what: str) -> Iterator[None]:
    """Inside the block an exception ends the block alone: it is added to `failures` as the error of `what`.

    Raises:
        Exception: one that concerns more than the block, see `concerns`
    """
    try:
        yield
    except Exception as error:
        if concerns(error):
            raise
        failures.append(as_error(error, what))
        let_go(error)


def of_caller(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a caller's callback so that its exceptions end all work: they are the caller's own."""

    def called(*arguments: Any, **options: Any) -> Any:
        with concerning(EVERYTHING):
            return callback(*arguments, **options)

    return called


def one_line(error: BaseException) -> str:
    """Return an exception as one line, such as `IndexError: index 5 is out of bounds`, of at most 500 characters."""
    known = isinstance(error, AfterimageError)
    text = str(error) if known else "".join(traceback.format_exception_only(error))
    return printable(f"{' '.join(text.split()):.500}")


def story(error: BaseException) -> str:
    """Return an exception's traceback; for an exception of another rank or machine, the traceback from there."""
    return printable(getattr(error, "story", "") or "".join(traceback.format_exception(error)))


def foreseen(error: BaseException) -> bool:
    """Return whether an exception explains itself to the user, so that a traceback would add nothing."""
    if isinstance(error, AfterimageError):
        return not isinstance(error, Unexpected)
    return out_of_memory(error)


def words(error: Exception) -> str:
    """Return an exception's message, on one line unless it was foreseen."""
    if not foreseen(error):
        return one_line(error)
    known = isinstance(error, AfterimageError)
    return str(error) if known else f"out of memory ({str(error) or 'MemoryError':.200})"


def as_error(error: Exception, name: str, file: Path | None = None) -> AfterimageError:
    """Turn an exception into an `AfterimageError` that says what it ended.

    Args:
        error: the exception
        name: the run, row or image set that it ended
        file: the file that holds the traceback
    """
    text = words(error)
    text = text if name in text else f"{name}: {text}"
    if foreseen(error):
        found = AfterimageError(text)
    else:
        found = Unexpected(text if file is None else f"{text} (traceback: {file})", story(error))
    found.__cause__ = error
    return found


def let_go(error: BaseException | None) -> None:
    """Free what an exception's frames refer to, such as a network and its features, once the exception is handled.

    Its marks are removed too, because some libraries keep an exception and raise it again.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        for mark in ("concerns", "agreed"):
            vars(error).pop(mark, None)
        error = error.__cause__ or error.__context__


_SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
"""Parts of the messages of RuntimeErrors that mean that memory ran out."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, which PyTorch reports on a CPU as a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
