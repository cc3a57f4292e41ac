"""Measure the growth of our cost with images, with tokens, and with the number of decoders on one encoder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.child import in_child
from benchmarks.originals import write_originals
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings
from benchmarks.training import MODEL, RANDOM, train_ours


def growth(settings: Settings) -> Iterator[Row]:
    """Measure exponents e of cost ~ size^e, fitted on a log-log scale."""
    for part in (_images, _tokens, _decoders):
        yield from part(settings)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the logarithms of sizes and costs."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def _images(settings: Settings) -> list[Row]:
    counts = [16, 32, 64] if settings.quick else [32, 64, 128, 256]
    small, seconds = _small(settings), []
    for count in counts:
        parts = {"train": count, "validation": max(1, count // 8), "test": 1}
        folder = Path(settings.fresh("growth"))
        data = write_originals(folder, parts, small.resize * 3 // 2, small.resize, settings.say)
        run = small.run(f"{MODEL}:layer1", "wavelet", data)
        seconds.append(train_ours(settings, [run]).value["training"])
    points = [{"images": n, "seconds": s} for n, s in zip(counts, seconds, strict=True)]
    return [
        Row(
            "growth-images",
            f"{MODEL}:layer1 + wavelet, one epoch at {small.crop} px: time ~ images^e",
            "= e",
            [exponent(counts, seconds)],
            goal=Goal("at most", 1.1),
            notes=[_listed(points), RANDOM],
            points=points,
        )
    ]


def _small(settings: Settings) -> Settings:
    return replace(settings, quick=True)


def _tokens(settings: Settings) -> list[Row]:
    sides = [14, 20, 28] if settings.quick else [20, 28, 40, 56]
    idle = in_child("growth:attention_step", side=7, accelerator=settings.accelerator).peak_bytes
    points = []
    for side in sides:
        outcome = in_child("growth:attention_step", side=side, accelerator=settings.accelerator)
        extra = max(1, outcome.peak_bytes - idle) / 2**20
        points.append({"tokens": side * side, "seconds": outcome.value, "MiB": extra})
    sizes = [point["tokens"] for point in points]
    what = (
        "attention decoder on 64 channels, a step on two images, features of {} to {} tokens: {} ~ tokens^e"
    )
    note = [_listed(points), "MiB: peak resident memory beyond that of a step on 49 tokens"]
    return [
        Row(
            f"growth-tokens-{name}",
            what.format(sizes[0], sizes[-1], name),
            "= e",
            [exponent(sizes, [point[key] for point in points])],
            goal=Goal("at most", most),
            notes=note if key == "seconds" else [],
            points=points,
        )
        for name, key, most in (("time", "seconds", 2.1), ("memory", "MiB", 1.1))
    ]


def attention_step(side: int, accelerator: str) -> float:
    """Return the seconds of a forward and backward pass of the attention decoder on two images, the best of two."""
    import torch
    from lightning_fabric import Fabric

    from afterimage.config import FeatureSpec
    from afterimage.models.decoders import create_decoder
    from afterimage.models.layers.attention import compiled_attention

    compiled_attention()  # load its libraries first, as their memory does not grow with tokens
    device = Fabric(accelerator=accelerator, devices=1).device
    spec = FeatureSpec("growth:features", 64, side, side)
    decoder = create_decoder("attention", [spec], 4 * side, seed=0).to(device)
    features, best = torch.randn(2, 64, side, side, device=device), float("inf")
    for _ in range(2):
        started = time.perf_counter()
        decoder([features]).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _decoders(settings: Settings) -> list[Row]:
    counts = [1, 2, 4]
    parts = {"train": 16 if settings.quick else 64, "validation": 4, "test": 1}
    folder = Path(settings.fresh("growth"))
    data = write_originals(folder, parts, settings.resize * 3 // 2, settings.resize, settings.say)
    names = ["wavelet", "frequency", "transposed", "residual"]
    alone = [
        train_ours(settings, [settings.run(f"{MODEL}:layer3", name, data)]).value["training"]
        for name in names
    ]
    seconds = [
        train_ours(settings, [settings.run(f"{MODEL}:layer3", name, data) for name in names[:count]]).value[
            "training"
        ]
        for count in counts
    ]
    shares = [s / sum(alone[:count]) for s, count in zip(seconds, counts, strict=True)]
    points = [
        {"decoders": n, "seconds": s, "of alone": share}
        for n, s, share in zip(counts, seconds, shares, strict=True)
    ]
    return [
        Row(
            "growth-decoders",
            f"{MODEL}:layer3, {', '.join(names)} on one encoder pass: time, as a share of one after the other",
            "of the time",
            [shares[-1]],
            notes=[_listed(points), RANDOM],
            points=points,
        )
    ]


def _listed(points: Sequence[dict]) -> str:
    return "; ".join(", ".join(f"{key} {value:.3g}" for key, value in point.items()) for point in points)
