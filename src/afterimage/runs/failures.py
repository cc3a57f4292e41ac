"""Records of a failed run in its folder: state, error and traceback."""

from __future__ import annotations

import contextlib

from afterimage.config import AfterimageError
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run
from afterimage.runtime.failures import Unexpected, as_error, foreseen, story, words
from afterimage.runtime.terminal import printable

TRACEBACK = "traceback.txt"
"""File in a failed run's folder that holds the traceback."""


def record(run: Run, error: Exception) -> None:
    """Set a run's state to `failed`, with the error, and write the traceback, if its folder can be written."""
    write_story(run, error)
    details = {} if foreseen(error) else {"traceback": TRACEBACK}
    with contextlib.suppress(Exception):
        run.set_state("failed", error=printable(words(error)), **details)


def recorded_error(run: Run) -> AfterimageError:
    """Return the error of a failed run, as recorded in its folder."""
    status = run.status
    error = Unexpected if "traceback" in status else AfterimageError
    return as_error(error(str(status.get("error"))), run.name, run.file(TRACEBACK))


def is_done(run: Run) -> bool:
    """Return whether a run is done; False if its folder cannot be read."""
    try:
        return run.state == "done"
    except AfterimageError:
        return False


def write_story(run: Run, error: Exception, file: str = TRACEBACK) -> None:
    """Write an exception's traceback into a run's folder, if it can be written."""
    with contextlib.suppress(Exception):
        write_atomic(run.file(file), story(error))


def forget(run: Run, file: str = TRACEBACK) -> None:
    """Remove the traceback that an earlier attempt at a run left."""
    with contextlib.suppress(OSError):
        run.file(file).unlink(missing_ok=True)
