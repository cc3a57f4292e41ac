"""Timing of each part of `trainer.training_step`, for one decoder, with a trace.

The profiler waits for the device after every part, so that times are attributed to the right part; without these waits
a step on a GPU is somewhat faster than the sum of its parts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from afterimage.config import AfterimageError, RunConfig
from afterimage.data.dataset import load_data
from afterimage.models.reconstructor import build_feature_decoder
from afterimage.runs.files import write_json
from afterimage.runtime.device import create_single_device_fabric
from afterimage.runtime.terminal import Progress, console, no_progress
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader, RunContext, build_encoders
from afterimage.training.trainer import training_step

PARTS = ("data", "encoder", "decoder forward", "backward", "optimizer")
WARM_UP, TRACED = 2, 3


@dataclass(kw_only=True)
class SectionTimer(RunContext):
    """Context that sums up the seconds of each section of the training step, and names the section in the trace."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time a section of the training step, until `device` has finished it."""
        started = time.perf_counter()
        with record_function(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started


@dataclass(frozen=True)
class Profile:
    """Mean times of the training steps of one run.

    Attributes:
        threads: number of PyTorch threads
        steps: number of timed steps
        images: mean number of images per step
        parts: seconds per step for each of `PARTS`
        trace: file for a trace viewer (chrome://tracing, ui.perfetto.dev), of further steps, since tracing is slow
    """

    name: str
    device: str
    threads: int
    steps: int
    images: float
    parts: dict[str, float]
    trace: Path

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return sum(self.parts.values())


def profile_run(
    config: RunConfig,
    root: str | Path,
    *,
    steps: int = 10,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> Profile:
    """Time training steps of a run after two warm-up steps, then trace three more.

    Writes `NAME.trace.json` and `NAME.profile.json` into `root/profiles`.

    Raises:
        AfterimageError: the decoder is not trained by gradient descent
    """
    fabric = create_single_device_fabric(accelerator, config.recipe.precision)
    encoders = build_encoders(config, config.sources, progress=progress).to(fabric.device)
    model = build_feature_decoder(config, encoders.specs)
    if not model.trainable:
        raise AfterimageError(
            f"{config.decoder.name} takes no training steps, in closed form or trained elsewhere; profile one that is "
            "trained, such as transposed or attention"
        )
    data = load_data(config.data, cache=cache, progress=progress)
    timer = SectionTimer(device=fabric.device)
    loader = FeatureLoader(encoders, data, config.recipe, fabric, seed=config.seed, context=timer)
    decoder = DecoderTrainer(model, range(len(encoders.sources)), config.recipe, fabric, context=timer)
    model.train()
    batches = itertools.chain.from_iterable(loader.training_batches(epoch) for epoch in itertools.count())

    def step() -> int:
        _, images, features = next(batches)
        training_step(decoder, features, images)
        return len(images)

    for _ in range(WARM_UP):
        step()
    timer.seconds.update(dict.fromkeys(PARTS, 0.0))
    count = 0
    for number in range(steps):
        count += step()
        progress("profiling", number + 1, steps)
    parts = {name: total / steps for name, total in timer.seconds.items()}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (fabric.device.type == "cuda")
    with profile(activities=activities) as traced:
        for _ in range(TRACED):
            step()
    folder = Path(root) / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{config.name}.trace.json"
    traced.export_chrome_trace(str(trace))
    threads = torch.get_num_threads()
    result = Profile(config.name, str(fabric.device), threads, steps, count / steps, parts, trace)
    write_json(folder / f"{config.name}.profile.json", asdict(result) | {"trace": str(trace)})
    return result


def print_profile(result: Profile) -> None:
    """Print a table of the step's parts."""
    from rich.table import Table

    screen = console(120)
    rate = result.images / result.seconds
    step = f"a step of {result.images:g} images on {result.device}, {rate:.1f} images/s"
    screen.print(f"{result.name}: {step}", soft_wrap=True)
    table = Table("part", "ms a step", "share")
    for name, seconds in result.parts.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / result.seconds:.0%}")
    screen.print(table)
    screen.print(
        f"mean of {result.steps} steps, {result.threads} threads, waiting for the device after every part",
        soft_wrap=True,
    )
    screen.print(f"trace: {result.trace}", soft_wrap=True)
