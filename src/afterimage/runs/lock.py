"""Lock on a folder, which also works on file systems shared by machines and is taken over from dead processes.

A lock is a file `lock.N`, created exclusively, that names the process that holds it; the holder touches it every few
seconds. A process that finds only locks of dead holders creates the file with the next higher number: of several
processes that try, one succeeds, and no file has to be removed first. Exclusive creation is all that the file system
must support; if no file can be created, `LockUnavailable` is raised. The process then looks again and backs off if
another live lock exists, which can happen if the folder was empty in between.

On the holder's own machine a lock is dead if its process has ended. On other machines it is dead if it has not been
touched for `STALE_SECONDS` seconds by the waiting process's own monotonic clock; wall clocks are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from afterimage.config import AfterimageError, printable_path
from afterimage.runtime.process import LockLost, ProcessIdentity, has_ended, is_local, this_process

HEARTBEAT_SECONDS = 10.0
"""Seconds between two heartbeats: touches of the lock, by which its holder shows that it still runs."""
STALE_SECONDS = 90.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""

POLL_SECONDS = 1.0
"""Seconds between two attempts to take a lock."""


class LockUnavailable(AfterimageError):
    """A lock's file that cannot be created; `__cause__` is the `OSError`."""


class Lock:
    """The lock of an existing folder; `log` gets a message when a dead process's lock is taken over."""

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.log = folder, log
        self.holder: ProcessIdentity | None = None
        """Holder of the lock at the last failed attempt to take it."""
        self.lost = False
        self._mine: Path | None = None
        self._released = threading.Event()
        self._heartbeat_thread: threading.Thread | None = None
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}

    def acquire(self) -> bool:
        """Take the lock, and return whether that succeeded; if not, `holder` is the live process that holds it.

        Raises:
            LockUnavailable: the folder does not exist or cannot be written
        """
        while True:
            found = self._files()
            if live := [path for path in found if self._alive(path)]:
                self.holder = _read(live[-1])
                return False
            mine = self.folder / f"lock.{max(map(_number, found), default=0) + 1}"
            if not self._create(mine):
                continue
            if any(self._alive(path) for path in self._files() if path != mine):
                mine.unlink(missing_ok=True)
                time.sleep(random.uniform(0.01, 0.1))
                continue
            for path in found:
                self.log(f"{self.folder.name}: taken over from {_read(path) or 'a process'}, which has ended")
                path.unlink(missing_ok=True)
            self._mine, self.lost = mine, False
            self._released.clear()
            self._heartbeat_thread = threading.Thread(target=self._send_heartbeats, args=(mine,), daemon=True)
            self._heartbeat_thread.start()
            return True

    def check(self) -> None:
        """Check that this process still holds the lock; raise `LockLost` if it does not."""
        files = self._files()
        self.lost = not (files and files[-1] == self._mine and _read(self._mine) == this_process())
        if self.lost:
            raise LockLost(
                f"{self.folder.name}: another process took over this run, because this process had not touched its "
                f"lock for {STALE_SECONDS:g} seconds"
            )

    def release(self) -> None:
        """Release the lock, and delete its file if it still belongs to this process."""
        self._released.set()
        if self._heartbeat_thread is not None:
            self._heartbeat_thread.join()
            self._heartbeat_thread = None
        if self._mine is not None and _read(self._mine) == this_process():
            with contextlib.suppress(OSError):
                self._mine.unlink()
        self._mine = None

    def _files(self) -> list[Path]:
        found = (path for path in self.folder.glob("lock.*") if path.suffix[1:].isdecimal())
        return sorted(found, key=_number)

    def _create(self, path: Path) -> bool:
        """Create the file with this process's identity; return False if it already exists."""
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(this_process(), file)
        except FileExistsError:
            return False
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise LockUnavailable(f"cannot write {printable_path(path)}: {error.strerror}") from error
        return True

    def _alive(self, path: Path) -> bool:
        holder = _read(path)
        if holder is not None and is_local(holder):
            return not has_ended(holder)
        try:
            with open(path, "rb") as file:  # opening makes a network file system refresh its attributes
                state = os.fstat(file.fileno())
        except OSError:
            return False
        sign = (state.st_mtime_ns, state.st_ino)
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if sign != before:
            since = now
        self._seen[path] = sign, since
        return now - since < STALE_SECONDS

    def _send_heartbeats(self, path: Path) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)


@contextlib.contextmanager
def hold_lock(folder: Path, log: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock of an existing folder inside the block, after waiting for the process that has it.

    `log` gets a message when this process has to wait, and when a dead process's lock is taken over.

    Raises:
        LockUnavailable: the folder does not exist or cannot be written
    """
    lock = Lock(folder, log)
    waited = False
    while not lock.acquire():
        if not waited:
            log(f"{folder.name}: waiting for {lock.holder or 'another process'}")
        waited = True
        time.sleep(POLL_SECONDS)
    try:
        yield lock
    finally:
        lock.release()


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _read(path: Path) -> ProcessIdentity | None:
    """Return the holder that a lock file names; None if the file is gone or is just being written."""
    try:
        pid, started, machine = json.loads(path.read_text(encoding="utf-8"))
        return ProcessIdentity(int(pid), str(started), str(machine))
    except (OSError, ValueError, TypeError):
        return None
