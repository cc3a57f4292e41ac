"""Measure the published study on a GPU: images per second and share of peak of each row, and the time of all rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from afterimage.config import DataConfig, RunConfig, split_source, to_dict
from benchmarks.child import in_child
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings

EPOCHS, TRAIN, VALIDATION = 30, 640, 160
PRECISIONS = ("32-true", "bf16-mixed")
MINUTES = 10.0


def gpu(settings: Settings) -> Iterator[Row]:
    """Measure images per second and share of peak of the published study's 15 rows, and estimate its total time."""
    what = "the published study's 15 rows on a GPU"
    if not in_child("gpu:cuda").value:
        yield Row("gpu", what, unavailable="there is no CUDA device here; goal: the study in 10 minutes")
        return
    yield from measure(published(64 if settings.quick else 160), "cuda", settings)


def published(images: int) -> list[RunConfig]:
    """Return the runs of the published study, on procedural images and with random weights."""
    from afterimage.config.study import load_study
    from afterimage.experiments.study import expand_study

    study = replace(load_study("published"), weights="random")
    data = DataConfig(f"procedural:{images}", validation_fraction=0.2, test_fraction=0.05)
    # LPIPS as a loss needs weights that may be missing; a note says that it is left out.
    return [
        replace(run, data=data, recipe=replace(run.recipe, epochs=2, loss="mse"))
        for run in expand_study(study)
    ]


def measure(runs: Sequence[RunConfig], accelerator: str, settings: Settings) -> Iterator[Row]:
    """Yield, for each precision, a row for each run alone and one for the whole study with shared encoder passes."""
    groups: dict[frozenset, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(frozenset(split_source(s)[0] for s in run.sources), []).append(run)
    cache = settings.fresh("cache")

    def epoch(members: Sequence[RunConfig], precision: str) -> dict[str, Any]:
        plain = [to_dict(replace(m, recipe=replace(m.recipe, precision=precision))) for m in members]
        return in_child("gpu:epoch", configs=plain, cache=cache, accelerator=accelerator).value

    for precision in PRECISIONS:
        peak = in_child("gpu:matrix_peak", precision=precision, accelerator=accelerator).value
        for number, run in enumerate(runs, 1):
            name = f"{' + '.join(run.sources)} · {run.decoder.name}"
            settings.say(f"gpu, {precision}, {name}", number, len(runs))
            one = epoch([run], precision)
            share = one["flops"] / one["seconds"] / peak
            yield Row(
                f"gpu-{number}-{precision}",
                name,
                "images/s",
                [one["train"] / one["seconds"]],
                notes=[
                    f"{share:.1%} of the measured matrix peak of {peak / 1e12:.1f} TFLOP/s",
                    f"{one['memory'] / 2**30:.2f} GiB of device memory",
                ],
            )
        seconds = sum(_whole(epoch(group, precision)) for group in groups.values())
        yield Row(
            f"gpu-study-{precision}",
            f"the whole study, {len(runs)} rows, {EPOCHS} epochs of {TRAIN} images, in {precision}",
            "minutes",
            [seconds / 60],
            goal=Goal("at most", MINUTES),
            notes=[
                "estimated from the second epoch of each group of rows that share their encoders, on fewer, "
                "procedural images; random weights, MSE in place of the fused row's 0.5*mse + 0.5*lpips; "
                "decoding, "
                "the test and its figures are left out. `afterimage study published` is the actual study"
            ],
        )


def _whole(epoch: dict[str, Any]) -> float:
    return epoch["seconds"] * TRAIN / epoch["train"] * EPOCHS


def cuda() -> bool:
    """Return whether a CUDA device can be used. Call this in a child process: it allocates memory on the device."""
    import torch

    return torch.cuda.is_available()


def matrix_peak(precision: str, accelerator: str) -> float:
    """Measure the FLOP/s of a large square matrix product in the precision's number format, the best of ten."""
    import torch
    from lightning_fabric import Fabric

    device = Fabric(accelerator=accelerator, devices=1).device
    kind, size = torch.bfloat16 if precision == "bf16-mixed" else torch.float32, 8192
    if device.type == "cpu":
        size = 1024
    a = torch.randn(size, size, device=device, dtype=kind)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def quickest_precision(accelerator: str) -> str:
    """Return `bf16-mixed` if a large matrix product is over 1.2 times as fast in bfloat16 as in float32."""
    exact, mixed = (matrix_peak(precision, accelerator) for precision in PRECISIONS)
    return "bf16-mixed" if mixed > 1.2 * exact else "32-true"


def epoch(configs: Sequence[dict], cache: str, accelerator: str) -> dict[str, Any]:
    """Train runs together; return facts of their last epoch.

    Returns:
        seconds with validation, FLOPs of the training steps, number of training images, and peak device memory in bytes
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from afterimage.data.dataset import load_data
    from benchmarks.work import build

    built = build(configs, accelerator)
    trainer = built.on(load_data(built.runs[0].data, cache=cache))
    images = trainer.data.train.crops([0], device=built.fabric.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = built.encoders(images)
    flops = counter.get_total_flops()
    for decoder in trainer.decoders:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder.model.eval()(decoder.select_features(features))
        flops += 3 * counter.get_total_flops()
    trainer.train()
    count, memory = len(trainer.data.train), 0
    if accelerator == "cuda":
        memory = torch.cuda.max_memory_allocated()
    seconds = sum(decoder.history[-1]["seconds"] for decoder in trainer.decoders)
    return {"seconds": seconds, "flops": flops * count, "train": count, "memory": memory}
