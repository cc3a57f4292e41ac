"""Attack with the weights: decode, then change each image until its features are those that were sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from afterimage.analysis.audit.attackers import DefendedFeatureLoader
from afterimage.analysis.audit.defences.chain import Defence
from afterimage.analysis.inversion.decoder_errors import HELD_OUT, DecoderErrors
from afterimage.analysis.inversion.invert import invert
from afterimage.analysis.inversion.objective import FeaturesOf
from afterimage.config.inversion import InvertConfig
from afterimage.evaluation.evaluate import Box, score_rows, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Compared, compared, joined
from afterimage.runtime.progress import Progress, silent
from afterimage.training.decoder_trainer import DecoderTrainer

BATCH = 4


def refined(
    loader: DefendedFeatureLoader,
    decoder: DecoderTrainer,
    metrics: Metrics,
    *,
    count: int,
    steps: int,
    keep: int,
    box: Box | None = None,
    progress: Progress = silent,
) -> tuple[list[dict[str, Any]], list[tuple[str, Any, Any]], Compared, float]:
    """Refine the reconstructions of a trained decoder until their features are those that were sent.

    What the decoder lacks is learnt from up to `HELD_OUT` images that the attacker validates on. The objective sees
    the defence without its noise, which the attacker does not know.

    Args:
        loader: gives the features as they are sent
        decoder: the trained decoder
        metrics: what is measured
        count: how many of the first test images are refined
        steps: optimisation steps for each image
        keep: how many images are kept with their reconstructions
        box: part of the images that is measured by itself too; None for no part
        progress: called with the progress

    Returns:
        rows as of `evaluate`, the images that are kept, all reconstructions as they are compared, and the seconds taken
    """
    defence: Defence = loader.encoders.defences[decoder.feature_indices[0]]
    encoder, test, started = loader.encoders.encoder, loader.data.test, time.monotonic()

    def features_of(images: Tensor) -> list[Tensor]:
        with encoder.gradients():
            return defence.encode(encoder(images), random=False)

    errors = DecoderErrors.learn(_errors(loader, decoder, features_of))
    rows: list[dict[str, Any]] = []
    kept: list[tuple[str, Any, Any]] = []
    small: list[Compared] = []
    wanted = min(count, len(test))
    for _, images, sent in loader.batches(test):
        for start in range(0, min(len(images), wanted - len(rows)), BATCH):
            part = slice(start, min(start + BATCH, start + wanted - len(rows), len(images)))
            targets, originals = [maps[part].clone() for maps in sent], images[part]
            found = invert(
                features_of,
                decoder.select_features(targets),
                tuple(images.shape[-2:]),
                start=decoder.reconstruct(targets).clone(),
                method=InvertConfig(steps=steps),
                errors=errors,
                seed=loader.seed,
            ).images.detach()
            ids = test.ids[len(rows) : len(rows) + len(originals)]
            rows += score_rows(ids, originals, [found], metrics, [box])[0]
            kept += zip(ids, to_uint8(originals), to_uint8(found), strict=True)
            small.append(compared(found, box))
            progress(f"refining {loader.encoders.sources[decoder.feature_indices[0]]}", len(rows), wanted)
        if len(rows) == wanted:
            break
    return rows, kept[:keep], joined(small), time.monotonic() - started


@torch.no_grad()
def _errors(
    loader: DefendedFeatureLoader, decoder: DecoderTrainer, features_of: FeaturesOf
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the decoder's errors, in images and in features, on images of the attacker's own it was not fitted on."""
    own = loader.data.validation
    for _, images, sent in loader.batches(own, torch.arange(min(HELD_OUT, len(own)))):
        decoded, wanted = decoder.reconstruct(sent), decoder.select_features(sent)
        yield images - decoded, [a - b for a, b in zip(features_of(decoded), wanted, strict=True)]
