"""The one lock: on a folder, not held by a dead process, on file systems that machines share.

A lock is a file `lock.N`, made exclusively, that says which process holds it; the holder touches it every few
seconds. Who finds only locks of dead holders makes the file with the next higher number: of several processes
that try, one succeeds, and no file has to be removed before that. It needs nothing of the file system but that:
where no file can be made, `CannotLock` is raised. Then it looks again, and steps back if another
live one is there, which can be when the folder was left empty in between.

On the holder's own machine a lock is dead when its process is. From elsewhere it is dead when it was not touched
for `PATIENCE` seconds of one's own waiting: nobody's wall clock is asked.
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

from afterimage.config import AfterimageError
from afterimage.runtime.process import Holder, LockLost, _machine, _started, this_process

BEAT = 10.0
"""Seconds between two signs of life."""
PATIENCE = 90.0
"""Seconds without one after which a holder on another machine counts as dead."""

POLL = 1.0
"""How often to look whether a lock is free."""


class CannotLock(AfterimageError):
    """A lock's file cannot be made; the cause is the `OSError`."""


class Lock:
    """The lock of one folder.

    Args:
        folder: the folder, which exists
        log: is told when a dead process's lock is taken over
    """

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.log = folder, log
        self.holder: Holder | None = None
        """Who held the lock when it was last asked for in vain."""
        self.lost = False
        self._mine: Path | None = None
        self._released = threading.Event()
        self._beating: threading.Thread | None = None
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}

    def acquire(self) -> bool:
        """Take the lock unless a live process holds it (see `holder`).

        Raises:
            CannotLock: the folder is not there or cannot be written
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
            self._beating = threading.Thread(target=self._beat, args=(mine,), daemon=True)
            self._beating.start()
            return True

    def check(self) -> None:
        """Raise `LockLost` unless this process still holds the lock."""
        files = self._files()
        self.lost = not (files and files[-1] == self._mine and _read(self._mine) == this_process())
        if self.lost:
            raise LockLost(
                f"{self.folder.name}: another process took this run over, since this one gave no sign of life for "
                f"{PATIENCE:g} seconds"
            )

    def release(self) -> None:
        self._released.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        if self._mine is not None and _read(self._mine) == this_process():
            with contextlib.suppress(OSError):
                self._mine.unlink()
        self._mine = None

    def _files(self) -> list[Path]:
        found = (path for path in self.folder.glob("lock.*") if path.suffix[1:].isdecimal())
        return sorted(found, key=_number)

    def _create(self, path: Path) -> bool:
        """Make the file with this process in it; False where it is there already."""
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(this_process(), file)
        except FileExistsError:
            return False
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise CannotLock(f"cannot write {path}: {error.strerror}") from error
        return True

    def _alive(self, path: Path) -> bool:
        holder = _read(path)
        if holder is not None and holder.machine == _machine() and os.name == "posix":
            return _started(holder.pid) == holder.started
        try:
            with open(path, "rb") as file:  # opening asks a file server anew
                state = os.fstat(file.fileno())
        except OSError:
            return False
        sign = (state.st_mtime_ns, state.st_ino)
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if sign != before:
            since = now
        self._seen[path] = sign, since
        return now - since < PATIENCE

    def _beat(self, path: Path) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)


@contextlib.contextmanager
def held(folder: Path, log: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock of a folder inside the block, after waiting for the process that has it.

    Args:
        folder: the folder, which exists
        log: is told whom this process waits for, and when a dead process's lock is taken over

    Raises:
        CannotLock: the folder is not there or cannot be written
    """
    lock = Lock(folder, log)
    waited = False
    while not lock.acquire():
        if not waited:
            log(f"{folder.name}: waiting for {lock.holder or 'another process'}")
        waited = True
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release()


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _read(path: Path) -> Holder | None:
    """Who a lock file names; None where it is gone, or is being written right now."""
    try:
        pid, started, machine = json.loads(path.read_text(encoding="utf-8"))
        return Holder(int(pid), str(started), str(machine))
    except (OSError, ValueError, TypeError):
        return None
