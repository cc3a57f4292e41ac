"""Measure peak memory for the published study's most demanding row: attention over VGG16 block1's 12,544 locations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from afterimage.config import AfterimageError, DataConfig, RunConfig, to_dict
from benchmarks.child import in_child
from benchmarks.originals import write_originals
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings
from benchmarks.training import attention_bytes, train_ours

SOURCE = "vgg16.tv_in1k:block1"
CHANNELS = 64
SIDES = (56, 80, 112)
"""Sides in pixels of the crops on which the reference is measured, one image at a time: 784 to 3,136 tokens. With fewer
tokens its matrices are small against the memory of the libraries."""


def memory(settings: Settings) -> list[Row]:
    """Measure peak memory: ours at the full batch, the reference on small crops, extrapolated to the full size."""
    data = write_originals(
        Path(settings.fresh("memory")), {"train": 8, "validation": 1, "test": 1}, 384, 256, settings.say
    )
    crop = 80 if settings.quick else 224
    run = settings.run(SOURCE, "attention", data)
    run = replace(run, data=replace(run.data, resize=crop, crop=crop))
    with settings.doing(f"memory: ours, one step at batch 8 on {(crop // 2) ** 2:,} tokens"):
        ours = train_ours(settings, [run])
    tokens, peaks, counted = [], [], []
    for side in SIDES[1:] if settings.quick else SIDES:
        small = _one_image(run, data, side)
        with settings.doing(f"memory: reference, one image, {(side // 2) ** 2:,} tokens"):
            peaks.append(in_child("work:reference", configs=[to_dict(small)], accelerator="cpu").peak_bytes)
        tokens.append((side // 2) ** 2)
        counted.append(attention_bytes(small, CHANNELS, tokens[-1], 1))
    # Memory for anything but N x N matrices does not depend on the implementation: take it from the smallest size.
    rest = peaks[0] - counted[0]
    full = (crop // 2) ** 2
    one, batch = (rest + attention_bytes(run, CHANNELS, full, images) for images in (1, 8))
    per_square = np.polyfit(np.square(tokens, dtype=float), peaks, 1)[0]
    share = per_square / (counted[-1] / tokens[-1] ** 2)
    if not 0.5 < share < 2:
        raise AfterimageError(
            f"the reference's measured peaks grow {share:.2f} times as fast with squared tokens as its matrices count; "
            "what it would need at full size cannot be computed from them"
        )
    measured = ", ".join(f"{n:,} tokens {p / 2**30:.2f}" for n, p in zip(tokens, peaks, strict=True))
    return [
        Row(
            "memory",
            f"{SOURCE} + attention ({full:,} tokens), peak memory of training at batch 8",
            "GiB",
            [ours.peak_bytes / 2**30],
            [batch / 2**30],
            goal=Goal("ratio", 20.0),
            bound="computed",
            notes=[
                f"the reference's {batch / 2**30:.1f} GiB at batch 8 and {one / 2**30:.1f} GiB for one image are "
                f"COMPUTED, not measured: its N x N matrices plus {rest / 2**30:.2f} GiB for all else",
                f"the reference measured on one image, GiB: {measured}; these rise by {per_square:.0f} bytes a "
                f"squared token, its matrices alone count {counted[-1] / tokens[-1] ** 2:.0f}",
                "random weights; resident memory by the operating system (VmHWM, where there is /proc), the "
                "interpreter and its libraries included on both sides; quality: as in epoch-256",
            ],
        )
    ]


def _one_image(run: RunConfig, data: str, side: int) -> RunConfig:
    config = DataConfig(data, resize=side, crop=side, limit_train=1, limit_validation=1)
    return replace(run, data=config, recipe=replace(run.recipe, batch_size=1))
