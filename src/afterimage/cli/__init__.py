"""The command line, a file a command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Union

import tyro

from afterimage.cli.evaluate import Evaluate, Reconstruct
from afterimage.cli.layers import Layers
from afterimage.cli.report import Report
from afterimage.cli.study import Study
from afterimage.cli.train import Train
from afterimage.config import AfterimageError

COMMANDS = {
    "layers": Layers,
    "train": Train,
    "evaluate": Evaluate,
    "reconstruct": Reconstruct,
    "study": Study,
    "report": Report,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error a user can put right is one message and exit code 1."""
    try:
        chosen = tyro.cli(
            _union(),
            prog="afterimage",
            description="How much of a picture is left in the features of a frozen vision encoder?",
            args=arguments,
        )
        chosen.run()
    except AfterimageError as error:
        print(f"afterimage: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(
            "\nafterimage: stopped; what is done is kept, the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def _union():
    return Union[tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items())]  # noqa: UP007
