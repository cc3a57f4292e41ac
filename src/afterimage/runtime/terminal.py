"""Output to the terminal that cannot fail.

A terminal may lack a character, a name may contain control sequences, a pipe may be closed and a disk may be
full: none of these may end a computation.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


_HANDLER = "afterimage.runtime.terminal"
_ASCII_REPLACEMENTS = {
    "→": "->", "←": "<-", "↑": "^", "↓": "v", "×": "x", "·": ".", "±": "+-", "−": "-", "–": "-", "—": "-", "…": "...",
    **{mark: f"^{digit}" for digit, mark in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},  # a bare digit would extend the number before it
    **dict.fromkeys("─━═╌╍┄┅", "-"), **dict.fromkeys("│┃║", "|"), **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈", "+"),
}  # fmt: skip
"""Replacements for characters that the terminal's encoding lacks; all others are escaped."""


def printable(text: str) -> str:
    """Return text for the terminal, with control characters and undecodable bytes escaped; line breaks stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c in "\n\t" or _is_safe(c) else _escaped(c) for c in text)


def print_lines(*lines: object, error: bool = False) -> None:
    """Print lines on standard output, or on standard error if `error` is set."""
    writer = Writer.of(sys.stderr if error else sys.stdout)
    for line in lines:
        writer.write(printable(str(line)) + "\n")
    writer.flush()


def print_error(what: str, error: object) -> None:
    """Print `what: error` on standard error; further lines are indented, so that they cannot pass for a message."""
    text = str(error).replace("\n", "\n  ").replace("\n    ", "\n  ")
    print_lines(f"{what}: {text}", error=True)


def console(width: int | None = None, *, error: bool = False) -> Console:
    """Create a console for tables, `width` columns wide if the output is not a terminal.

    Text is shown literally: names cannot contain markup or control sequences.
    """
    writer = Writer.of(sys.stderr if error else sys.stdout)
    return _console_class()(
        file=writer, width=None if writer.isatty() else width, markup=False, emoji=False, highlight=False
    )


class Writer:
    """A text stream that never raises.

    Characters that its encoding lacks are replaced, and text that cannot be written is dropped; `failure` then
    holds the first error.
    """

    def __init__(self, stream: Any) -> None:
        # The stream is None if the process was started with closed output.
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.failure: OSError | ValueError | None = None

    @classmethod
    def of(cls, stream: Any) -> Writer:
        """Wrap a stream, unless it is a `Writer` already."""
        return stream if isinstance(stream, Writer) else cls(stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, and return its length as if all of it had been written."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with self._catch_errors():
            self.stream.write(text.encode(encoding, _HANDLER).decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._catch_errors():
            self.stream.flush()

    @contextlib.contextmanager
    def _catch_errors(self) -> Iterator[None]:
        """Catch errors of this block, and keep the first one in `failure`."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream has been closed
            self.failure = self.failure or error

    def finish(self) -> None:
        """Flush the stream; drop text that cannot be written, or the interpreter would try again at exit."""
        self.flush()
        if self.failure is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def always_writable() -> Iterator[None]:
    """Make standard output and standard error of this block accept any text and never raise.

    Raises:
        SystemExit: with code 1, if standard output could not be written in full
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = output, errors = Writer.of(sys.stdout), Writer.of(sys.stderr)
    logger, warnings = logging.getLogger("afterimage"), _Warnings(logging.WARNING)
    logger.addHandler(warnings)
    ended: SystemExit | None = None
    try:
        yield
    except SystemExit as end:
        ended = end
    finally:
        output.finish()
        if output.failure is not None and not isinstance(output.failure, BrokenPipeError):
            reason = getattr(output.failure, "strerror", None) or output.failure
            print_lines(f"afterimage: standard output could not be written in full: {reason}", error=True)
        errors.finish()
        logger.removeHandler(warnings)
        sys.stdout, sys.stderr = before
    if output.failure is not None and not (ended and ended.code):
        raise SystemExit(1)
    if ended is not None:
        raise ended


class _Warnings(logging.Handler):
    """Logging handler that prints the package's warnings like all other messages."""

    def emit(self, record: logging.LogRecord) -> None:
        print_lines(self.format(record), error=True)


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return Plain


def _is_safe(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # an undecodable byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Replace the characters that an encoding lacks, as an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_ASCII_REPLACEMENTS.get(c) or _escaped(c) for c in found), error.end


codecs.register_error(_HANDLER, _replace_unencodable)


Progress = Callable[..., None]
"""Callback `progress(task, done, total, **values)`: name of the task, number of finished steps, number of all steps,
and values to show.

A value may be a function, which is called only if the value is shown, because reading a value from a device
waits for the device. Concurrent work passes `group="2/5"` to get a line for each group.
"""


def no_progress(task: str, done: int, total: int, **values: Any) -> None:
    """Show no progress."""


class Display:
    """A progress display: one live line for each group on a terminal, elsewhere a new line every few seconds."""

    def __init__(self, *, interval: float | None = None) -> None:
        self.console = console(error=True)
        self.live = self.console.is_terminal
        self.interval = interval if interval is not None else (0.1 if self.live else 5.0)
        self._lines: dict[str, _Line] = {}
        self._status = None

    def __call__(self, task: str, done: int, total: int, *, group: str = "", **values: Any) -> None:
        now = time.monotonic()
        line = self._lines.get(group)
        if line is None or line.task != task:
            line = self._lines[group] = _Line(task, now, done)
        finished = done >= total
        if not finished and now - line.shown < self.interval:
            return
        line.shown = now
        line.text = f"{group}  " * bool(group) + line.describe(done, total, now, values)
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

    def __init__(self, task: str, started: float, first_step: int) -> None:
        self.task, self.started, self.first_step = task, started, first_step
        self.shown, self.text = 0.0, ""

    def describe(self, done: int, total: int, now: float, values: dict[str, Any]) -> str:
        parts = [self.task]
        if total > 1:
            parts.append(f"{done:,}/{total:,} ({done / total:.0%})")
        for name, value in values.items():
            value = value() if callable(value) else value
            parts.append(
                f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            )
        elapsed, steps = now - self.started, done - self.first_step
        if done < total and steps > 0 and elapsed > 1:
            parts.append(f"{format_duration(elapsed / steps * (total - done))} left")
        elif done >= total and elapsed >= 1:
            parts.append(f"took {format_duration(elapsed)}")
        return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return seconds as text: `75` becomes `1:15`, and an hour or more `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
