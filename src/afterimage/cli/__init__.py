"""The command line, one file for each command. Expensive imports wait until a command needs them."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from itertools import pairwise
from typing import Annotated, Any, Union, get_type_hints

import tyro

from afterimage.cli.shared import option_name
from afterimage.config import MAX_PROCESSES, AfterimageError, check_range
from afterimage.runs.run import check_folder
from afterimage.runtime.process import interruptible, let_idle_threads_sleep
from afterimage.runtime.terminal import always_writable, print_error, print_lines, printable

COMMANDS = (
    "layers",
    "train",
    "evaluate",
    "reconstruct",
    "invert",
    "study",
    "extract",
    "controls",
    "audit",
    "report",
    "app",
    "compare",
    "push",
    "verify",
)
"""Names of the commands. Each has its file and a class of its name in it."""


def command(name: str) -> type:
    """Import the class of a command."""
    return getattr(importlib.import_module(f"afterimage.cli.{name}"), name.capitalize())


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error that the user can put right becomes one message and exit code 1.

    The exit code is 143 after SIGTERM and 130 after Ctrl-C, as shells expect.

    Args:
        arguments: the command and its arguments; None for those of this process
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:2] == ["study", "verify"]:
        del arguments[0]
    with command_line():
        if arguments == ["--version"]:
            print_lines(f"afterimage {metadata.version('afterimage')}")
            return
        chosen = _parsed(arguments)
        with interruptible():
            _run(chosen, arguments)


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Set up threads and output for a program, and turn errors for the user into one message and an exit code."""
    let_idle_threads_sleep()
    with always_writable():
        try:
            yield
        except AfterimageError as error:
            if not getattr(error, "reported_by_other_rank", False):
                print_error("afterimage", error)
            raise SystemExit(1) from None
        except KeyboardInterrupt as stopped:
            if not getattr(stopped, "reported_by_other_rank", False):
                told = "stopped; what is done is kept, the same command goes on from there"
                print_lines(f"\nafterimage: {told}", error=True)
            raise SystemExit(getattr(stopped, "code", 130)) from None


def _parsed(arguments: list[str]) -> Any:
    """Parse the arguments into a command."""
    if arguments and arguments[0] in COMMANDS:
        chosen = command(arguments[0])
        _help_in_one_line(chosen)
        return tyro.cli(chosen, prog=f"afterimage {arguments[0]}", args=arguments[1:])
    about = "How much of an image is left in the features of a frozen vision encoder?"
    each = tuple(Annotated[command(name), tyro.conf.subcommand(name)] for name in COMMANDS)
    return tyro.cli(Union[each], prog="afterimage", description=about, args=arguments)  # noqa: UP007


def option_texts(command: type) -> dict[str, str]:
    """Return the help text of each option of a command, by the name of its field: its docstring, in one line."""
    body = ast.parse(inspect.getsource(command)).body[0].body
    texts = {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    for name, hint in get_type_hints(command, include_extras=True).items():
        for shared in getattr(hint, "__metadata__", ()):
            if getattr(shared, "help", None):
                texts[name] = shared.help
    return texts


@cache
def _help_in_one_line(command: type) -> None:
    """Give tyro the options' docstrings without line breaks: it would print each further line as a new one."""
    hints = get_type_hints(command, include_extras=True)
    with contextlib.suppress(OSError):  # without the source there are no docstrings of options
        for name, text in option_texts(command).items():
            command.__annotations__[name] = Annotated[hints[name], tyro.conf.arg(help=text)]


def _run(chosen, arguments: list[str]) -> None:
    """Run a command in this process, or start several ranks if it asks for them and this process is not a rank."""
    for name in ("output_dir", "cache"):
        if (folder := getattr(chosen, name, None)) is not None:
            # A complete cache of decoded images may be read-only.
            check_folder(folder, option_name(name), writable=name == "output_dir")
    devices = getattr(chosen, "devices", 1)
    check_range("--devices", devices, 1, MAX_PROCESSES)
    if devices > 1:
        if getattr(chosen, "executor", "local") == "ray":
            raise AfterimageError("--devices goes with --executor local: on Ray a group has one device")
        from afterimage.runtime.launch import is_rank, launch

        if not is_rank(devices):
            launch(arguments, devices, chosen.device)
            return
    chosen.run()
    if ranks := sys.modules.get("afterimage.runtime.distributed"):  # importing it takes seconds
        ranks.close_process_group()
