"""Measure training on both sides: from large originals, from small ones, and of several layers together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from afterimage.config import RunConfig, to_dict
from benchmarks.child import Outcome, available_bytes, in_child
from benchmarks.originals import write_originals
from benchmarks.rows import Goal, Quality, Row
from benchmarks.settings import Settings

MODEL = "resnet34.tv_in1k"
LAYERS = ("layer1", "layer2", "layer3", "layer4")
RANDOM = (
    "random weights, which cost the same; quality is compared between the two ways, not with anything else"
)


def epoch_2k(settings: Settings) -> list[Row]:
    """Measure one epoch of ResNet34 layer1..4 + attention from 2040x1356 PNG originals."""
    return [_epoch(settings, "epoch-2k", (2040, 1356), Goal("ratio", 8.0))]


def epoch_256(settings: Settings) -> list[Row]:
    """Measure one epoch of ResNet34 layer1..4 + attention from small PNG originals."""
    side = settings.resize
    return [_epoch(settings, "epoch-256", (side * 3 // 2, side), Goal("ratio", 4.0))]


def _epoch(settings: Settings, name: str, size: tuple[int, int], goal: Goal) -> Row:
    counts = {"train": 8 if settings.quick else 16, "validation": 4, "test": 1}
    data = write_originals(Path(settings.fresh(name)), counts, *size, settings.say)
    runs = [settings.run(f"{MODEL}:{layer}", "attention", data) for layer in LAYERS]
    micro, note = micro_batch(runs[0], 64, (settings.crop // 4) ** 2)
    tolerance = 0.2 if micro == runs[0].recipe.batch_size else 1.0
    ours, reference = settings.in_turns(
        settings.repeats,
        name,
        lambda: train_ours(settings, runs),
        lambda: in_child(
            "work:reference", configs=_plain(runs), micro_batch=micro, accelerator=settings.accelerator
        ),
    )
    return Row(
        name,
        f"{MODEL} layer1..4 + attention, one epoch of {counts['train']} PNG originals of {size[0]}x{size[1]}, crop "
        f"{settings.crop}, batch 8, decoding and validation included",
        "images/s",
        [counts["train"] / o.value["seconds"] for o in ours],
        [counts["train"] / r.value["seconds"] for r in reference],
        higher_is_better=True,
        goal=goal,
        quality=_quality(ours[-1].value, reference[-1].value, tolerance),
        notes=[
            RANDOM,
            cpu_note(ours, reference),
            f"peak memory: ours {_gib(ours)}, reference {_gib(reference)} (its loader's workers not counted)",
            *note,
        ],
    )


def together(settings: Settings) -> Iterator[Row]:
    """Measure four layers on one encoder pass against one run after the other, both with our trainer."""
    counts = {"train": 16 if settings.quick else 64, "validation": 8, "test": 1}
    folder = Path(settings.fresh("together"))
    data = write_originals(folder, counts, settings.resize * 3 // 2, settings.resize, settings.say)
    for decoder in ("linear", "wavelet", "transposed"):
        runs = [settings.run(f"{MODEL}:{layer}", decoder, data) for layer in LAYERS]
        one, other = settings.in_turns(
            settings.repeats,
            f"together, {decoder}",
            partial(_train, settings, [runs]),
            partial(_train, settings, [[run] for run in runs]),
        )
        yield Row(
            f"together-{decoder}",
            f"{MODEL} layer1..4 + {decoder}, {counts['train']} images of {settings.crop}: together (ours) "
            "against one after the other (reference)",
            "images/s",
            [counts["train"] / seconds for seconds, _ in one],
            [counts["train"] / seconds for seconds, _ in other],
            higher_is_better=True,
            goal=Goal("ratio", 1.5),
            quality=_quality(one[-1][1], other[-1][1], 0.1),
            notes=[RANDOM, "training and validation; decoding left out"],
        )


def _train(settings: Settings, groups: Sequence[Sequence[RunConfig]]) -> tuple[float, dict]:
    """Train groups of runs one after the other; return the seconds of training, and the validation errors in dB."""
    seconds, reached = 0.0, []
    for group in groups:
        value = train_ours(settings, group).value
        seconds += value["training"]
        reached += value["validation_db"]
    return seconds, {"validation_db": reached}


def train_ours(settings: Settings, runs: Sequence[RunConfig], **more: Any) -> Outcome:
    """Run `work.ours` in a child process with an empty image cache."""
    cache = settings.fresh("cache")
    return in_child("work:ours", configs=_plain(runs), cache=cache, accelerator=settings.accelerator, **more)


def attention_bytes(config: RunConfig, channels: int, tokens: int, batch: int) -> int:
    """Compute the bytes of the N x N matrices that a training step of the reference's attention holds at its peak.

    The softmax of each of four blocks is kept for the backward pass, which needs two more matrices of that size. The
    number is computed, not measured: q k' and its scaled copy are freed before the next block's forward pass.
    """
    return (
        (4 + 2) * batch * math.gcd(8, channels) * tokens**2 * 4 if config.decoder.name == "attention" else 0
    )


def micro_batch(run: RunConfig, channels: int, tokens: int) -> tuple[int, list[str]]:
    """Halve the batch until the reference's matrices fit into half of the free memory.

    Returns:
        the batch size, and notes on it
    """
    size, free = run.recipe.batch_size, available_bytes()
    if free is None:
        return size, ["this system does not say how much memory is free; the reference may run out of it"]
    while size > 1 and attention_bytes(run, channels, tokens, size) > free / 2:
        size //= 2
    if size == run.recipe.batch_size:
        return size, []
    need = attention_bytes(run, channels, tokens, run.recipe.batch_size) / 2**30
    return size, [
        f"the reference adds up gradients of {size} images at a time: its N x N matrices for 8 would take {need:.0f} "
        f"GiB of the {free / 2**30:.0f} GiB that are free; its batch norm sees {size} images, which moves its quality"
    ]


def _quality(ours: dict, reference: dict, tolerance: float) -> Quality:
    """Return the quality of the layer whose validation errors differ most between the sides."""
    pairs = list(zip(ours["validation_db"], reference["validation_db"], strict=True))
    worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    return Quality("validation error in dB, of the layer that differs most", *worst, tolerance)


def cpu_note(ours: Sequence[Outcome], reference: Sequence[Outcome]) -> str:
    """Return a note with the ratio in processor time, which depends less on other programs than elapsed time does."""
    ratios = [r.value["cpu_seconds"] / o.value["cpu_seconds"] for o, r in zip(ours, reference, strict=True)]
    spent = [statistics.median(x.value["cpu_seconds"] for x in side) for side in (ours, reference)]
    return (
        f"in processor time, threads and loader's workers included: ours {spent[0]:.0f} s, reference {spent[1]:.0f} s, "
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def _plain(runs: Sequence[RunConfig]) -> list[dict]:
    return [to_dict(run) for run in runs]


def _gib(outcomes: Sequence) -> str:
    return f"{max(o.peak_bytes for o in outcomes) / 2**30:.2f} GiB"
