"""Measure the time to a given PSNR on the test images: our fastest decoder against the reference's best one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from afterimage.config import AfterimageError, to_dict
from benchmarks.child import in_child
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings
from benchmarks.training import train_ours

TARGETS = (
    ("resnet18.tv_in1k:layer1", 23.0, "residual", None),
    ("vgg19.tv_in1k:block1", 29.0, "linear", 16),
)
"""Features, PSNR to reach in dB, our decoder, and its number of training and of validation images (None: all)."""
GOAL = 10.0


def time_to_quality(settings: Settings) -> Iterator[Row]:
    """Measure seconds to a given PSNR with pretrained weights on photographs, at full size even with `--quick`."""
    settings.photographs()
    for target in TARGETS:
        yield _row(settings, *target)


def _row(settings: Settings, source: str, target: float, decoder: str, images: int | None) -> Row:
    name = f"time-to-{target:g}dB"
    what = f"{source}: seconds to {target:g} dB on the test photographs"
    goal = Goal("ratio", GOAL)
    full = replace(settings, quick=False)
    run = full.run(source, decoder, settings.data, epochs=30, weights="pretrained")
    run = replace(run, data=replace(run.data, limit_train=images, limit_validation=images))
    # The study's decoder without attention: its steps on a CPU are many times as fast, and it reaches a higher PSNR.
    plain = full.run(source, "transposed", settings.data, epochs=30, weights="pretrained")
    try:
        with settings.doing(f"{name}: ours"):
            ours = train_ours(settings, [run], target=target).value
        patience = (2 if settings.quick else GOAL) * ours["seconds"]
        with settings.doing(f"{name}: reference, for {patience:.0f} s at most"):
            ends = {"target": target, "limit": patience, "accelerator": settings.accelerator}
            reference = in_child("work:reference", configs=[to_dict(plain)], **ends).value
    except AfterimageError as error:
        return Row(name, what, goal=goal, unavailable=str(error))
    count = "all" if images is None else str(images)
    notes = [
        f"ours: {decoder} on {count} training and validation images, {ours['epochs']} epochs, "
        f"{ours['test_db']:.2f} dB",
        f"reference: transposed, all training images, {reference['epochs']} epochs, "
        f"{reference['test_db']:.2f} dB in {reference['seconds']:.0f} s",
        "from originals that are not decoded yet; looking at the test images is off the clock",
    ]
    if ours["test_db"] < target:
        return Row(name, what, goal=goal, notes=notes, unavailable=f"ours ends below {target:g} dB")
    reached = reference["test_db"] >= target
    if not reached:
        notes.append(
            f"the reference had not reached {target:g} dB when it was stopped: the ratio is a lower bound"
        )
    return Row(
        name,
        what,
        "s",
        [ours["seconds"]],
        [reference["seconds"]],
        goal=goal,
        bound="" if reached else "at least",
        notes=notes,
    )
