"""What all measurements share: sizes, repeats, where files go, and runs taken in turns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from afterimage.config import DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.runtime.progress import Progress, silent

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """`quick` shrinks images and counts; `data` is a source of photographs, or empty; `folder` is temporary.
    `seconds` is what each decoder may train where all have the same time; `precision` is ours, the reference computes
    in float32; `run_bench` takes `auto` for what is quicker."""

    folder: Path
    quick: bool = False
    data: str = ""
    accelerator: str = "cpu"
    say: Progress = silent
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

    def run(
        self, source: str, decoder: str, data: str, *, epochs: int = 1, weights: str = "random"
    ) -> RunConfig:
        """A run of the published recipe at this size; LPIPS is not part of training measurements."""
        return RunConfig(
            sources=(source,),
            weights=weights,
            decoder=DecoderConfig(decoder),
            data=DataConfig(source=data, resize=self.resize, crop=self.crop),
            recipe=RecipeConfig(epochs=epochs, precision=self.precision),
        )

    def fresh(self, name: str) -> str:
        """A folder that does not exist yet, so that neither runs nor decoded images are found there."""
        number = sum(path.name.startswith(name) for path in self.folder.iterdir())
        (self.folder / f"{name}-{number}").mkdir()
        return str(self.folder / f"{name}-{number}")


def in_turns(
    repeats: int, name: str, ours: Callable[[], T], reference: Callable[[], T], say: Progress
) -> tuple[list[T], list[T]]:
    """Ours, reference, ours, reference: what else the machine does falls on both."""
    results: tuple[list[T], list[T]] = ([], [])
    for repeat in range(repeats):
        for side, (who, work) in enumerate((("ours", ours), ("reference", reference))):
            say(f"{name}: {who}, {repeat + 1} of {repeats}; load {os.getloadavg()[0]:.1f}", 0, 1)
            results[side].append(work())
            say(f"{name}: {who}, {repeat + 1} of {repeats}; load {os.getloadavg()[0]:.1f}", 1, 1)
    return results
