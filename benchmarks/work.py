"""Work of child processes for one side of a measurement. Arguments and results are plain JSON values."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.config import RunConfig, from_dict
from afterimage.data.dataset import load_data
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import eval_mode
from afterimage.evaluation.metrics import psnr
from afterimage.models.layers.attention import compiled_attention
from afterimage.models.reconstructor import MultiEncoder, build_feature_decoder
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader
from afterimage.training.trainer import Trainer
from benchmarks import reference as plain
from benchmarks.gpu import quickest_precision


def here(accelerator: str, precision: str) -> dict[str, str]:
    """Return the precision of our side, for `auto` the faster one, and a description of the attention of narrow heads.

    The attention is also compiled here if necessary, before anything is timed.
    """
    return {
        "precision": quickest_precision(accelerator) if precision == "auto" else precision,
        "narrow_attention": compiled_attention()[1],
    }


def ours(
    configs: Sequence[dict], cache: str, *, accelerator: str = "auto", target: float | None = None
) -> dict[str, Any]:
    """Train runs that share a recipe and an encoder, as `afterimage.train` does.

    Seconds include loading the images and the last validation, but not building the encoder and the decoders.

    Args:
        configs: the runs
        cache: folder of decoded images
        accelerator: device of the training
        target: PSNR in dB on the test images at which training ends; it is measured for the first decoder after the
            closed form and after every epoch, off the clock. None to train all epochs

    Returns:
        seconds in total and by phase, processor seconds, validation errors in dB, test PSNR, epochs, and threads
    """
    built = build(configs, accelerator)
    started, busy = time.perf_counter(), cpu_seconds()
    data = load_data(built.runs[0].data, cache=Path(cache))
    loaded = time.perf_counter()
    trainer = built.on(data)
    if target is None:
        trainer.train()
        reached, aside = None, 0.0
    else:
        reached, aside = _until(trainer, target)
    ended = time.perf_counter()
    return {
        "cpu_seconds": cpu_seconds() - busy,
        "seconds": ended - started - aside,
        "loading": loaded - started,
        "training": ended - loaded - aside,
        "validation_db": [_decibel(decoder.best_loss) for decoder in trainer.decoders],
        "test_db": reached,
        "epochs": trainer.decoders[0].epoch,
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Built:
    """Encoders and decoders of runs that are trained together; `on` adds the images."""

    runs: Sequence[RunConfig]
    encoders: MultiEncoder
    decoders: Sequence[DecoderTrainer]
    fabric: Fabric

    def on(self, data: Data) -> Trainer:
        first = self.runs[0]
        return Trainer(
            FeatureLoader(self.encoders, data, first.recipe, self.fabric, seed=first.seed), self.decoders
        )


def build(configs: Sequence[dict], accelerator: str) -> Built:
    runs = [from_dict(RunConfig, config) for config in configs]
    first = runs[0]
    fabric = Fabric(accelerator=accelerator, devices=1, precision=first.recipe.precision)
    sources = list(dict.fromkeys(source for run in runs for source in run.sources))
    encoders = MultiEncoder(sources, weights=first.weights, image_size=first.data.crop, seed=first.seed)
    encoders.to(fabric.device)
    compiled_attention()
    decoders = []
    for run in runs:
        feature_indices = [encoders.sources.index(source) for source in run.sources]
        model = build_feature_decoder(run, [encoders.specs[i] for i in feature_indices])
        decoders.append(DecoderTrainer(model, feature_indices, run.recipe, fabric))
    return Built(runs, encoders, decoders, fabric)


def _until(trainer: Trainer, target: float) -> tuple[float, float]:
    """Train the first decoder until it reaches the target; return the test PSNR, and the seconds spent measuring it."""
    decoder, loader, aside = trainer.decoders[0], trainer.loader, 0.0

    def look() -> float:
        nonlocal aside
        paused = time.perf_counter()
        reached = _test_db(
            lambda images: decoder.model(decoder.select_features(loader.encoders(images))),
            decoder.model,
            loader.data,
            loader.fabric.device,
        )
        aside += time.perf_counter() - paused
        return reached

    trainer.fit_closed_forms()
    reached = look() if decoder.best else -math.inf
    while reached < target and decoder.active:
        trainer.train_epoch(decoder.epoch, [decoder])
        reached = max(reached, look())
    return reached, aside


def reference(
    configs: Sequence[dict],
    *,
    micro_batch: int | None = None,
    accelerator: str = "auto",
    target: float | None = None,
    limit: float = math.inf,
) -> dict[str, Any]:
    """Train runs by the plain reference, one after the other.

    Args:
        configs: the runs
        micro_batch: number of images in a forward pass, see `benchmarks.reference.train`
        accelerator: device of the training
        target: PSNR in dB on the test images at which a run ends; it is measured after every epoch, off the clock
        limit: seconds of training after which a run ends

    Returns:
        seconds, processor seconds, validation errors in dB, test PSNR, epochs, and threads, as `ours` returns them
    """
    results, device = [], Fabric(accelerator=accelerator, devices=1).device
    for config in configs:
        run = from_dict(RunConfig, config)
        reached, after_epoch = -math.inf, None
        if target is not None:
            data = load_data(run.data)

            def after_epoch(encoder, decoder, data=data):
                nonlocal reached
                reached = max(reached, _test_db(lambda x: decoder(encoder(x)[0]), decoder, data, device))
                return reached >= target

        results.append(
            plain.train(run, micro_batch=micro_batch, after_epoch=after_epoch, limit=limit, device=device)
        )
    return {
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "seconds": sum(result["seconds"] for result in results),
        "validation_db": [_decibel(result["validation_loss"]) for result in results],
        "test_db": reached if target is not None else None,
        "epochs": results[-1]["epochs"],
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def _test_db(
    reconstruct: Callable[[Tensor], Tensor], decoder: nn.Module, data: Data, device: torch.device
) -> float:
    """Return the mean PSNR over the test images; frozen encoders are always in evaluation mode."""
    with eval_mode(decoder):
        values = [
            value
            for indices in torch.arange(len(data.test)).split(16)
            for images in [data.test.crops(indices, device=device)]
            for value in psnr(reconstruct(images).clamp(0, 1), images).tolist()
        ]
    return sum(values) / len(values)


def cpu_seconds() -> float:
    """Return the processor seconds of this process, its threads, and the children it has waited for."""
    return sum(os.times()[:4])


def _decibel(loss: float) -> float:
    return -10 * math.log10(loss)
