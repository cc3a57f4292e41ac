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
from afterimage.runs import Run, write_atomic
from afterimage.terminal import printable

TRACEBACK = "traceback.txt"
"""The file of a failed run's folder that holds the whole traceback."""

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
    from afterimage.memory import out_of_memory  # with PyTorch, which takes seconds to import

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


def record(run: Run, error: Exception) -> None:
    """Set a run's state to failed, with the error, and write the traceback, as far as its folder can be written."""
    write_story(run, error)
    details = {} if foreseen(error) else {"traceback": TRACEBACK}
    with contextlib.suppress(Exception):
        run.set_state("failed", error=printable(words(error)), **details)


def recorded_error(run: Run) -> AfterimageError:
    """The error of a failed run as its folder tells it."""
    status = run.status
    error = Unexpected if "traceback" in status else AfterimageError
    return as_error(error(str(status.get("error"))), run.name, run.file(TRACEBACK))


def is_done(run: Run) -> bool:
    """Whether a run has a result; one whose folder cannot be read has none."""
    try:
        return run.state == "done"
    except AfterimageError:
        return False


def write_story(run: Run, error: Exception, file: str = TRACEBACK) -> None:
    """Write an exception's traceback into a run's folder, where that can be written."""
    with contextlib.suppress(Exception):
        write_atomic(run.file(file), story(error))


def forget(run: Run, file: str = TRACEBACK) -> None:
    """Remove what an earlier attempt at a run left of its failure."""
    with contextlib.suppress(OSError):
        run.file(file).unlink(missing_ok=True)


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
