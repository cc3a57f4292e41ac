"""Measure the time until feature inversion, whitened and in bfloat16 if chosen, reaches the plain one's quality."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from afterimage.analysis.inversion.inputs import InversionInputs, from_data
from afterimage.analysis.inversion.refinement import Refinement, decoder_errors
from afterimage.config import AfterimageError, RunConfig
from afterimage.config.inversion import InvertConfig, num_error_images
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.queue import train_runs
from afterimage.runtime.device import device_name
from afterimage.training.checkpoint import load_reconstructor
from benchmarks.rows import Goal, Row
from benchmarks.settings import Settings

SOURCES = (
    "resnet18.tv_in1k:layer3",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k:block5",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k:block11",
)
PASSES = 200
LOOK = 10
"""Passes from one look at the images to the next."""
GOAL = 2.0
TOLERANCE = 0.05
"""Largest deficit of our PSNR in dB, at an LPIPS that is no higher: one image's PSNR varies as much between runs."""


@dataclass(frozen=True)
class Point:
    """State of a search: encoder passes so far, processor seconds per image, and mean PSNR and LPIPS over images."""

    passes: int
    seconds: float
    psnr: float
    lpips: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} dB, LPIPS {self.lpips:.3f} after {self.passes} passes"


def search(settings: Settings) -> Iterator[Row]:
    """Measure processor seconds per image until a search from `linear` matches the plain search after 200 passes."""
    data = settings.photographs()
    for source in SOURCES:
        what = f"{source}: seconds an image to the PSNR and LPIPS of the plain search"
        goal = Goal("ratio", GOAL)
        full = replace(settings, quick=False)
        try:
            run = full.run(source, "linear", data, weights="pretrained")
            yield _row(settings, what, goal, replace(run, lpips="squeeze"))
        except AfterimageError as error:
            yield Row("search", what, goal=goal, unavailable=str(error))


def _row(settings: Settings, what: str, goal: Goal, config: RunConfig) -> Row:
    device = device_name(settings.accelerator)
    root = Path(settings.fresh("search"))
    (run,) = train_runs(
        config, root, cache=root / "cache", accelerator=settings.accelerator, keep=0, progress=settings.say
    )
    reconstructor = load_reconstructor(run).to(device)
    # Of fewer images chance decides: the PSNR of one moves by some tenths of a dB from run to run.
    count = 2 if settings.quick else 8
    given = from_data(replace(config.data, limit_test=count), cache=root / "cache", progress=settings.say)
    known = num_error_images(len(given.validation))
    errors = decoder_errors(reconstructor, given.validation, known, device)
    metrics = Metrics("squeeze", size=config.data.crop)
    if not metrics.lpips_status.available:
        raise AfterimageError(f"LPIPS is part of what is reached: {metrics.lpips_status}")
    plain = Refinement(reconstructor, InvertConfig(steps=PASSES), replace(errors, whitening=None), 0)
    # Half as many again: each of ours costs less, so more of them may still be quicker.
    method = InvertConfig(steps=3 * PASSES // 2, precision=config.recipe.precision)
    ours = Refinement(reconstructor, method, errors, 0)
    reference = _curve(plain, given, metrics, device)[-1]
    settings.say(f"the plain search: {reference}", 1, 1)
    points = _curve(ours, given, metrics, device, range(0, method.steps, LOOK))
    near = (p for p in points if p.psnr >= reference.psnr - TOLERANCE and p.lpips <= reference.lpips)
    reached = next(near, None)
    settings.say(f"ours: {reached}", 1, 1)
    notes = [f"the plain search comes to {reference}"]
    if reached is None:
        return Row(
            "search", what, goal=goal, notes=notes, unavailable=f"ours does not get there: {points[-1]}"
        )
    notes += [
        f"ours, in {config.recipe.precision}, is there with {reached}, and ends at {points[-1]}",
        f"{count} test photographs, {torch.get_num_threads()} threads; looking at the images is off the clock",
    ]
    return Row("search", what, "s", [reached.seconds], [reference.seconds], goal=goal, notes=notes)


def _curve(
    refinement: Refinement, given: InversionInputs, metrics: Metrics, device: str, looks: Sequence[int] = ()
) -> list[Point]:
    """Run a search on all images at once, and return its state at each look and the end; scoring is off the clock."""
    images = given.images.crops(torch.arange(len(given.images)), device=device)
    points: list[Point] = []
    watched, started = 0.0, time.process_time()
    for found in refinement(images, milestones=looks):
        now = time.process_time()
        scores = metrics(found.images, images)
        means = (statistics.fmean(scores[name]) for name in ("psnr", "lpips"))
        points.append(Point(found.step, (now - started - watched) / len(images), *means))
        watched += time.process_time() - now
    return points
