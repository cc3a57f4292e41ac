"""Train decoders side by side, each for the same time."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from afterimage.data.dataset import load_data
from afterimage.evaluation.metrics import psnr
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.trainer import Trainer, training_step
from benchmarks.work import build

COOLDOWN = 0.3
"""Last share of the training time over which the learning rate of every decoder falls linearly to zero."""
LOOKS = 2
"""Number of times that each decoder's validation loss is measured during its training steps."""


def compare(configs: Sequence[dict], seconds: float, accelerator: str) -> dict[str, dict[str, Any]]:
    """Train the runs' decoders side by side, each for `seconds`, and measure them on the test images.

    A decoder's time is that of its closed form and its own steps, in processor time on a CPU, so that other load on the
    machine matters little. Encoding, reading images and validation do not count. The weights with the lowest validation
    loss are measured, out of `LOOKS` during training and those of the closed form.

    Returns:
        MSE, PSNR, seconds, number of training images and parameters, and validation curve, by decoder
    """
    built = build(configs, accelerator)
    data = load_data(built.runs[0].data)
    trainer = built.on(data)
    device = built.fabric.device

    def clock() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    contestants = [
        _Contestant(run.decoder.name, decoder, trainer, seconds, clock)
        for run, decoder in zip(built.runs, trainer.decoders, strict=True)
    ]
    for one in contestants:
        one.finalize_fit()
    batches = (trainer.loader.training_batches(epoch) for epoch in itertools.count())
    for _, images, features in itertools.chain.from_iterable(batches):
        training = [one for one in contestants if one.training]
        if not training:
            break
        for one in training:
            one.step(features, images)
    return {one.name: one.outcome() for one in contestants}


class _Contestant:
    def __init__(
        self, name: str, trained: DecoderTrainer, trainer: Trainer, budget: float, clock: Callable[[], float]
    ) -> None:
        self.name, self.trained, self.trainer, self.budget, self.clock = name, trained, trainer, budget, clock
        self.decoder = trained.model.decoder
        self.seconds, self.images, self.curve = 0.0, 0, []

    @property
    def training(self) -> bool:
        return self.trained.optimizer is not None and self.seconds < self.budget

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        started = self.clock()
        yield
        self.seconds += self.clock() - started

    def finalize_fit(self) -> None:
        if not self.decoder.closed_form:
            return
        views = self.decoder.begin_fit(len(self.trainer.data.train), self.trainer.loader.seed)
        for view in range(views + 1):
            held_out = view == views
            loader = self.trainer.loader
            for _, images, features in (
                loader.validation_batches() if held_out else loader.closed_form_batches(view)
            ):
                with self.timed():
                    self.decoder.partial_fit(
                        self.trained.select_features(features), images, validation=held_out
                    )
        with self.timed():
            self.decoder.finalize_fit()
        self.look()

    def step(self, features: list[Tensor], images: Tensor) -> None:
        share_left = (1 - self.seconds / self.budget) / COOLDOWN
        for group in self.trained.optimizer.param_groups:
            group["lr"] = self.trained.recipe.learning_rate * min(1.0, share_left)
        self.trained.model.train()
        with self.timed():
            training_step(self.trained, features, images)
        self.images += len(images)
        trained = [look for look in self.curve if look["images"]]
        if self.seconds >= self.budget * (len(trained) + 1) / LOOKS:
            self.look()

    def look(self) -> None:
        (loss,) = self.trainer.validation_losses([self.trained])
        if not self.curve or loss < min(look["validation_mse"] for look in self.curve):
            self.trained.store_best(loss)
        self.curve.append({"seconds": self.seconds, "images": self.images, "validation_mse": loss})

    @torch.no_grad()
    def outcome(self) -> dict[str, Any]:
        self.trained.model.load_state_dict(self.trained.best)
        errors, decibels = [], []
        for _, images, features in self.trainer.loader.batches(self.trainer.data.test):
            rebuilt = self.trained.reconstruct(features)
            errors += (rebuilt - images).square().mean((1, 2, 3)).tolist()
            decibels += psnr(rebuilt, images).tolist()
        return {
            "mse": statistics.fmean(errors),
            "psnr": statistics.fmean(decibels),
            "seconds": self.seconds,
            "images": self.images,
            "parameters": self.trained.parameters,
            "curve": self.curve,
        }
