"""Estimates of the cost of a study before it starts: shapes, parameters, multiply-adds, time and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from afterimage.config import DataConfig, FeatureSpec, RunConfig, split_source
from afterimage.data.dataset import cache_folder
from afterimage.data.sampling import split
from afterimage.data.sources import read_source
from afterimage.models.encoders.tracing import layer_info
from afterimage.models.reconstructor import build_feature_decoder


@dataclass(frozen=True)
class RunCost:
    """The estimated cost of one run.

    Attributes:
        config: the run
        specs: shapes of its features
        parameters: parameters of fusion and decoder
        encoder_macs: multiply-adds of the encoders for one image
        decoder_macs: multiply-adds of fusion and decoder for one image
        epochs: number of passes over the training images; 1 for a decoder that is fitted in closed form
        seconds: estimated training time
        bytes: estimated memory
        unseen: by source, which pixels no location sees, or why positions are unknown; empty if neither applies
    """

    config: RunConfig
    specs: tuple[FeatureSpec, ...]
    parameters: int
    encoder_macs: int
    decoder_macs: int
    epochs: int
    seconds: float
    bytes: int
    unseen: Mapping[str, str]


def estimate_cost(config: RunConfig) -> RunCost:
    """Estimate the cost of a run, trained alone, without decoding images or loading weights.

    Time is the number of multiply-adds of all epochs (encoder pass, decoder pass, and twice the latter for the backward
    pass) and of closed-form fits, divided by the rate of a convolution measured on this machine. Memory is the
    decoder's parameters with gradients and Adam's moments, a batch's activations, and the sums of a closed form.

    Raises:
        AfterimageError: a network or layer is unknown, or cannot be built
    """
    infos = {source: layer_info(source, config.data.size) for source in config.sources}
    specs = tuple(info.spec for info in infos.values())
    deepest: dict[str, int] = {}
    for source, info in infos.items():
        model = split_source(source)[0]
        deepest[model] = max(deepest.get(model, 0), info.encoder_macs)
    with torch.device("meta"):
        model = build_feature_decoder(config, specs).eval()
        features = [torch.empty(1, *spec.shape) for spec in specs]
        activations = _activations(model, features)
    decoder_macs = model.macs(specs)
    parameters = sum(p.numel() for p in model.parameters())
    recipe, trained, encoder_macs = config.recipe, model.trainable, sum(deepest.values())
    images, epochs = training_images(config.data), recipe.epochs if trained else 1
    macs = images * epochs * (encoder_macs + (3 if trained else 1) * decoder_macs)
    macs += sum(part.fit_macs(images) for part in model.closed_forms)
    memory = 4 * (4 * parameters + 2 * recipe.batch_size * (activations + sum(s.values for s in specs)))
    memory += sum(part.fit_bytes for part in model.closed_forms)
    return RunCost(
        config,
        specs,
        parameters,
        encoder_macs,
        decoder_macs,
        epochs,
        macs / macs_per_second(),
        memory,
        {source: info.unseen for source, info in infos.items()},
    )


def _activations(model: nn.Module, features: list[torch.Tensor]) -> int:
    """Return the number of values that a model's leaf modules output for one image."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += output.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    model(features)
    for hook in hooks:
        hook.remove()
    return total


@cache
def training_images(data: DataConfig) -> int:
    """Return the number of training images: computed for DIV2K without a download, counted for other sources."""
    own = not data.test
    if data.source.partition(":")[0] == "div2k":
        total = 800 - round(800 * data.validation_fraction)
    else:
        source = read_source(data.source, {"train", "test"} if own else {"train"}, cache_folder())
        fractions = data.validation_fraction, data.test_fraction if own else None
        total = len(split(data.source, source, *fractions, data.split_seed)[0])
    return min(total, data.limit_train or total)


@cache
def macs_per_second() -> float:
    """Measure the multiply-adds per second of a 3x3 convolution on 64 channels on the CPU, the best of five passes."""
    convolution = nn.Conv2d(64, 64, 3, padding=1)
    images = torch.randn(8, 64, 56, 56)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(5):
            started = time.perf_counter()
            convolution(images)
            best = min(best, time.perf_counter() - started)
    return 8 * 64 * 64 * 9 * 56 * 56 / best
