"""What a long computation tells whoever watches: what, how far, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from afterimage.runtime.terminal import console

Progress = Callable[..., None]
"""Called as `progress(what, done, total, **figures)`: what is being done, how far, and figures worth showing.

A figure may be a callable; it is asked only when it is shown, since asking a device for a value waits for it.
What goes on side by side names itself by `group="2/5"`, so that each can be shown on a line of its own.
"""


def silent(what: str, done: int, total: int, **figures: Any) -> None:
    """The progress callback that shows nothing."""


class Display:
    """Progress on a terminal: one live line there for each group, a plain line every few seconds elsewhere."""

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
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._lines.clear()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Line:
    """What one group is doing, and since when."""

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
    """`75` as `1:15`; an hour and more as `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
