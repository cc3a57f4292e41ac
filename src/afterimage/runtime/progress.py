"""Progress of a long computation: the current step, the share that is done, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from afterimage.runtime.terminal import console

Progress = Callable[..., None]
"""Callback `progress(what, done, total, **figures)`: name of the work, number of finished and of all steps, and
figures to show.

A figure may be a function, which is called only if the figure is shown, because reading a value from a device
waits for the device. Concurrent work passes `group="2/5"` to get a line for each group.
"""


def silent(what: str, done: int, total: int, **figures: Any) -> None:
    """Show no progress."""


class Display:
    """A progress display: one live line for each group on a terminal, elsewhere a new line every few seconds."""

    def __init__(self, *, interval: float | None = None) -> None:
        self.console = console(error=True)
        self.live = self.console.is_terminal
        self.interval = interval if interval is not None else (0.1 if self.live else 5.0)
        self._lines: dict[str, _Line] = {}
        self._status = None

    def __call__(self, what: str, done: int, total: int, *, group: str = "", **figures: Any) -> None:
        now = time.monotonic()
        line = self._lines.get(group)
        if line is None or line.what != what:
            line = self._lines[group] = _Line(what, now, done)
        finished = done >= total
        if not finished and now - line.shown < self.interval:
            return
        line.shown = now
        line.text = f"{group}  " * bool(group) + line.describe(done, total, now, figures)
        if finished:
            del self._lines[group]
        if finished or not self.live:
            self.console.print(line.text, soft_wrap=True)
        if self.live:
            self._refresh()

    def _refresh(self) -> None:
        from rich.text import Text

        lines = [line.text for line in self._lines.values() if line.text]
        if not lines:
            self.close()
            return
        ascii_only = self.console.options.ascii_only
        text = Text("\n".join(lines), no_wrap=True, overflow="crop" if ascii_only else "ellipsis")
        if self._status is None:
            self._status = self.console.status(text, spinner="line" if ascii_only else "dots")
            self._status.start()
        self._status.update(text)

    def close(self) -> None:
        """Remove the live lines."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._lines.clear()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Line:
    """The current work of one group, and its start."""

    def __init__(self, what: str, started: float, begun_at: int) -> None:
        self.what, self.started, self.begun_at = what, started, begun_at
        self.shown, self.text = 0.0, ""

    def describe(self, done: int, total: int, now: float, figures: dict[str, Any]) -> str:
        parts = [self.what]
        if total > 1:
            parts.append(f"{done:,}/{total:,} ({done / total:.0%})")
        for name, value in figures.items():
            value = value() if callable(value) else value
            parts.append(
                f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            )
        elapsed, steps = now - self.started, done - self.begun_at
        if done < total and steps > 0 and elapsed > 1:
            parts.append(f"{clock(elapsed / steps * (total - done))} left")
        elif done >= total and elapsed >= 1:
            parts.append(f"took {clock(elapsed)}")
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Return seconds as text: `75` becomes `1:15`, and an hour or more `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
