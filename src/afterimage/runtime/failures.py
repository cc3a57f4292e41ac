"""What becomes of an exception that ends one part of the work while the rest goes on.

Whatever its type, it ends the run, row or image set that it happened to and nothing that does not depend on it: the
run's folder holds its traceback and its state is `failed`; the terminal shows one line.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afterimage.config import AfterimageError
from afterimage.runtime.terminal import printable

EVERYTHING, ENCODERS = "everything", "encoders"
"""What an exception may concern beside the part of the work that it is raised in; see `concerns`."""


class Unexpected(AfterimageError):
    """An exception that nobody foresaw, as one line; `story` is its traceback."""

    def __init__(self, text: str, story: str = "") -> None:
        super().__init__(text)
        self.story = story


@contextlib.contextmanager
def concerning(what: str) -> Iterator[None]:
    """Inside the block an exception concerns all that shares `what`, unless it says otherwise itself."""
    try:
        yield
    except Exception as error:
        if not concerns(error):
            error.concerns = what
        raise


def concerns(error: BaseException) -> str:
    """`EVERYTHING` for what must not be isolated, such as a lost rank; `ENCODERS` for all rows that share them; else
    empty."""
    return getattr(error, "concerns", "") if isinstance(error, Exception) else EVERYTHING


def of_caller(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A caller's callback: what it raises is the caller's own, and ends everything."""

    def called(*arguments: Any, **options: Any) -> Any:
        with concerning(EVERYTHING):
            return callback(*arguments, **options)

    return called


def one_line(error: BaseException) -> str:
    """`IndexError: index 5 is out of bounds for dimension 0 with size 5`, cut where it is long."""
    known = isinstance(error, AfterimageError)
    text = str(error) if known else "".join(traceback.format_exception_only(error))
    return printable(f"{' '.join(text.split()):.500}")


def story(error: BaseException) -> str:
    """The traceback; of an exception on another rank or machine that one's."""
    return printable(getattr(error, "story", "") or "".join(traceback.format_exception(error)))


def foreseen(error: BaseException) -> bool:
    """Whether an exception says in words for a user what was wrong, so that its traceback would say no more."""
    if isinstance(error, AfterimageError):
        return not isinstance(error, Unexpected)

    return out_of_memory(error)


def words(error: Exception) -> str:
    """What an exception says, on one line unless it was foreseen."""
    if not foreseen(error):
        return one_line(error)
    known = isinstance(error, AfterimageError)
    return str(error) if known else f"out of memory ({str(error) or 'MemoryError':.200})"


def as_error(error: Exception, name: str, file: Path | None = None) -> AfterimageError:
    """An exception for people, which says whom it ended, `name`, and which `file` holds the traceback."""
    text = words(error)
    text = text if name in text else f"{name}: {text}"
    if foreseen(error):
        found = AfterimageError(text)
    else:
        found = Unexpected(text if file is None else f"{text} (traceback: {file})", story(error))
    found.__cause__ = error
    return found


def let_go(error: BaseException | None) -> None:
    """Free what the frames of an exception hold, which may be all of a network and its features, once it is dealt with.

    Its marks go too: some code keeps an exception and raises the very same again.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        for mark in ("concerns", "agreed"):
            vars(error).pop(mark, None)
        error = error.__cause__ or error.__context__


def listed(names: Sequence[str], most: int = 4) -> str:
    """`a, b and 3 others`"""
    more = f" and {len(names) - most} others" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice; PyTorch says so on a CPU by a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
