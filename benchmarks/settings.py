"""Settings that all measurements share, and repeats of both sides in turns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.runtime.terminal import Progress, no_progress

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Settings of all measurements.

    Attributes:
        folder: temporary folder
        quick: whether to use fewer and smaller images
        data: source of photographs; empty for none
        accelerator: device of both sides
        say: called with the progress
        seconds: training time in seconds of each decoder in `decoders`
        precision: precision of our side; the reference uses float32. `run_bench` replaces `auto` by the faster one
    """

    folder: Path
    quick: bool = False
    data: str = ""
    accelerator: str = "cpu"
    say: Progress = no_progress
    seconds: float = 120.0
    precision: str = "32-true"

    @property
    def crop(self) -> int:
        return 112 if self.quick else 224

    @property
    def resize(self) -> int:
        return self.crop * 8 // 7

    @property
    def repeats(self) -> int:
        return 1 if self.quick else 2

    def photographs(self) -> str:
        """Return the source of photographs; raise if there is none."""
        if not self.data:
            raise AfterimageError("needs photographs: --data folder:PATH with train and test")
        return self.data

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what the block does when it begins and when it has ended."""
        self.say(what, 0, 1)
        yield
        self.say(what, 1, 1)

    def run(
        self, source: str, decoder: str, data: str, *, epochs: int = 1, weights: str = "random"
    ) -> RunConfig:
        """Return a run of the published recipe at this size; measurements of training do not compute LPIPS."""
        return RunConfig(
            sources=(source,),
            weights=weights,
            decoder=DecoderConfig(decoder),
            data=DataConfig(source=data, resize=self.resize, crop=self.crop),
            recipe=RecipeConfig(epochs=epochs, precision=self.precision),
        )

    def fresh(self, name: str) -> str:
        """Create an empty folder, which holds no runs or decoded images of earlier measurements; return its path."""
        number = sum(path.name.startswith(name) for path in self.folder.iterdir())
        (self.folder / f"{name}-{number}").mkdir()
        return str(self.folder / f"{name}-{number}")

    def in_turns(
        self, repeats: int, name: str, ours: Callable[[], T], reference: Callable[[], T]
    ) -> tuple[list[T], list[T]]:
        """Run ours and the reference in turns, so that other load on the machine affects both; return their results."""
        results: tuple[list[T], list[T]] = ([], [])
        for repeat in range(1, repeats + 1):
            for side, (who, work) in enumerate((("ours", ours), ("reference", reference))):
                with self.doing(f"{name}: {who}, {repeat} of {repeats}; load {os.getloadavg()[0]:.1f}"):
                    results[side].append(work())
        return results
