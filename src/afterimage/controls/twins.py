"""Twins of a study's runs: the same architecture with random weights, the same decoder with a perceptual loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from afterimage.config import RANDOM_WEIGHTS, RunConfig
from afterimage.decoders import DECODERS
from afterimage.metrics import Metrics
from afterimage.progress import Progress, silent


def perceptual(net: str) -> str:
    """The published study's second loss, with LPIPS of this network."""
    return "0.5*mse + 0.5*lpips" + ("" if net == "alex" else f":{net}")


def with_twins(configs: Sequence[RunConfig], progress: Progress = silent) -> list[RunConfig]:
    """The runs and, after each, its twins, without doubles.

    A run on trained weights gets one with `random` ones, whose blocks act. A decoder that is trained by epochs for the
    mean squared error gets one trained with `perceptual`, unless the weights of the run's LPIPS network cannot be had,
    which `progress` is told; a closed form minimises the squared error and nothing else, so it has none.
    """
    found: list[RunConfig] = []
    available: dict[str, bool] = {}
    for config in configs:
        found.append(config)
        if config.weights not in RANDOM_WEIGHTS:
            found.append(replace(config, weights="random"))
        decoder = DECODERS.get(config.decoder.name)
        if config.recipe.loss != "mse" or decoder is None or not decoder.trainable:
            continue
        if config.lpips not in available:
            status = Metrics(config.lpips).lpips_status
            available[config.lpips] = status["available"]
            if not status["available"]:
                progress(f"WARNING: no perceptual twins: LPIPS is unavailable: {status['reason']}", 1, 1)
        if available[config.lpips]:
            found.append(replace(config, recipe=replace(config.recipe, loss=perceptual(config.lpips))))
    return list({config.digest: config for config in found}.values())
