"""Where a training step's time goes, measured in a short loop of its own, with a trace for a trace viewer.

The loop is built from the same pieces as `train` and `DecoderTrainer` (crops, encoders, head, loss, Adam,
precision), one decoder at a time, without validation and checkpoints. It waits for the device after
every part, so that each part's time is its own; without these waits a step on a GPU is somewhat faster than the sum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from afterimage.config import AfterimageError, RunConfig
from afterimage.data.dataset import load_data
from afterimage.data.sampling import order
from afterimage.models.reconstructor import MultiEncoder, build_feature_decoder
from afterimage.runs.files import write_json
from afterimage.runtime.device import one_device
from afterimage.runtime.progress import Progress, silent
from afterimage.runtime.terminal import console
from afterimage.training.decoder_trainer import create_optimizer
from afterimage.training.losses import create_loss

PARTS = ("data", "encoder", "decoder forward", "backward", "optimizer")
WARM_UP, TRACED = 2, 3


@dataclass(frozen=True)
class Profile:
    """Mean seconds a step in each of `PARTS`, images a step, and the costliest operators of the traced steps.

    `operators` are `(name, seconds a step, calls a step)` by their own time on the device where that is not the CPU.
    `trace` opens in a trace viewer (chrome://tracing, ui.perfetto.dev); tracing slows its steps down, so `parts` are
    measured on others.
    """

    name: str
    device: str
    threads: int
    steps: int
    images: float
    parts: dict[str, float]
    operators: list[tuple[str, float, float]]
    trace: Path

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return sum(self.parts.values())


def profile_run(
    config: RunConfig,
    root: str | Path,
    *,
    steps: int = 10,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = silent,
) -> Profile:
    """Profile `steps` training steps of a run after two for warming up, and trace three more.

    Writes `NAME.trace.json` and `NAME.profile.json` into `root/profiles`. Raises `AfterimageError` for a decoder
    that has no training steps.
    """
    if steps < 1:
        raise AfterimageError(f"a profile needs one step or more, got {steps}")
    fabric = one_device(accelerator, config.recipe.precision)
    encoders = MultiEncoder(
        config.sources, weights=config.weights, image_size=config.data.crop, seed=config.seed
    ).to(fabric.device)
    head = build_feature_decoder(config, encoders.specs).to(fabric.device, memory_format=torch.channels_last)
    if not any(p.requires_grad for p in head.parameters()):
        raise AfterimageError(
            f"{config.decoder.name} is solved in closed form and takes no training steps; profile a decoder that is "
            "trained, such as transposed or attention"
        )
    recipe, image_set = config.recipe, load_data(config.data, cache=cache, progress=progress).train
    loss = create_loss(recipe.loss).to(fabric.device)
    trained, optimizer = fabric.setup(head.train(), create_optimizer(head, recipe))
    seconds = dict.fromkeys(PARTS, 0.0)
    places = torch.Generator().manual_seed(config.seed)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        started = time.perf_counter()
        with record_function(name):
            yield
            if fabric.device.type == "cuda":
                torch.cuda.synchronize(fabric.device)
        seconds[name] += time.perf_counter() - started

    def step(indices: torch.Tensor, epoch: int) -> int:
        crop = {"seed": config.seed, "epoch": epoch} if recipe.augment else {}
        with part("data"):
            images = image_set.crops(indices, device=fabric.device, **crop)
        with part("encoder"), torch.no_grad(), fabric.autocast():
            features = encoders(images)
        for window in head.decoder.feature_crops(places):
            with part("decoder forward"):
                error = loss(trained(features, window), head.decoder.cut(images, window))
            with part("backward"):
                fabric.backward(error)
            with part("optimizer"):
                optimizer.step()
                head.decoder.after_optimizer_step()
                optimizer.zero_grad(set_to_none=True)
        return len(images)

    def batches() -> Iterator[tuple[torch.Tensor, int]]:
        epoch = 0
        while True:
            indices = torch.as_tensor(order(len(image_set), seed=config.seed, epoch=epoch))
            yield from ((part, epoch) for part in indices.split(recipe.batch_size))
            epoch += 1

    source, count = batches(), 0
    for _ in range(WARM_UP):
        step(*next(source))
    seconds.update(dict.fromkeys(PARTS, 0.0))
    for number in range(steps):
        count += step(*next(source))
        progress("profiling", number + 1, steps)
    parts = {name: total / steps for name, total in seconds.items()}
    on_device = fabric.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    with profile(activities=activities) as traced:
        for _ in range(TRACED):
            step(*next(source))
    folder = Path(root) / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{config.name}.trace.json"
    traced.export_chrome_trace(str(trace))
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = sorted(
        (e for e in traced.key_averages() if e.key not in PARTS), key=lambda e: getattr(e, key), reverse=True
    )
    operators = [(e.key, getattr(e, key) / 1e6 / TRACED, e.count / TRACED) for e in events[:10]]
    result = Profile(
        config.name,
        str(fabric.device),
        torch.get_num_threads(),
        steps,
        count / steps,
        parts,
        operators,
        trace,
    )
    write_json(folder / f"{config.name}.profile.json", asdict(result) | {"trace": str(trace)})
    return result


def print_profile(result: Profile) -> None:
    """The table of parts and of the costliest operators."""
    from rich.table import Table

    screen = console(120)
    rate = result.images / result.seconds
    step = f"a step of {result.images:g} images on {result.device}, {rate:.1f} images/s"
    screen.print(f"{result.name}: {step}", soft_wrap=True)
    table = Table("part", "ms a step", "share")
    for name, seconds in result.parts.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / result.seconds:.0%}")
    screen.print(table)
    table = Table("operator, by its own time", "ms a step", "calls a step")
    for name, seconds, calls in result.operators:
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{calls:.0f}")
    screen.print(table)
    screen.print(
        f"mean of {result.steps} steps, {result.threads} threads, waiting for the device after every part; operators "
        f"from {TRACED} traced steps, which tracing slows down",
        soft_wrap=True,
    )
    screen.print(f"trace: {result.trace}", soft_wrap=True)
