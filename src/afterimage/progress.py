"""What a long computation tells whoever watches: what, how far, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Progress = Callable[..., None]
"""Called as `progress(what, done, total, **figures)`: what is being done, how far, and figures worth showing.

A figure may be a callable; it is asked only when it is shown, since asking a device for a value waits for it.
"""


def silent(what: str, done: int, total: int, **figures: Any) -> None:
    """The progress callback that shows nothing."""


class Display:
    """Progress on a terminal: one live line there, a plain line every few seconds elsewhere."""

    def __init__(self, *, interval: float | None = None) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.interval = interval if interval is not None else (0.1 if self.live else 5.0)
        self._what: str | None = None
        self._started = self._shown = 0.0
        self._begun_at = 0
        self._status = None

    def __call__(self, what: str, done: int, total: int, **figures: Any) -> None:
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._started, self._shown, self._begun_at = what, now, 0.0, done
        finished = done >= total
        if not finished and now - self._shown < self.interval:
            return
        self._shown = now
        text = self._line(what, done, total, now, figures)
        if finished:
            self.close()
            self.console.print(text, markup=False, soft_wrap=True)
        elif self.live:
            if self._status is None:
                self._status = self.console.status(text)
                self._status.start()
            self._status.update(text.replace("[", r"\["))
        else:
            self.console.print(text, markup=False, soft_wrap=True)

    def _line(self, what: str, done: int, total: int, now: float, figures: dict[str, Any]) -> str:
        parts = [what]
        if total > 1:
            parts.append(f"{done:,}/{total:,} ({done / total:.0%})")
        for name, value in figures.items():
            value = value() if callable(value) else value
            parts.append(
                f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            )
        elapsed, steps = now - self._started, done - self._begun_at
        if done < total and steps > 0 and elapsed > 1:
            parts.append(f"{clock(elapsed / steps * (total - done))} left")
        elif done >= total and elapsed >= 1:
            parts.append(f"took {clock(elapsed)}")
        return "  ".join(parts)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._what = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clock(seconds: float) -> str:
    """`75` as `1:15`; an hour and more as `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
