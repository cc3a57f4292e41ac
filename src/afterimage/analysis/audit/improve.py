"""Improve a decoder's answers: refine them with the encoder's weights, and correct them to best estimates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afterimage.analysis.audit.attackers import DefendedFeatureLoader
from afterimage.analysis.audit.defences.chain import Defence
from afterimage.analysis.inversion.best_estimate import Corrector, correct, learn_corrector
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.invert import invert
from afterimage.analysis.inversion.objective import FeaturesOf
from afterimage.config.audit import ESTIMATE, REFINED
from afterimage.config.inversion import (
    EstimateConfig,
    InvertConfig,
    error_images,
    other_images,
    search_precision,
)
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import Box, score_rows, to_uint8
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Compared, compared, joined
from afterimage.runtime.terminal import Progress, silent
from afterimage.training.decoder_trainer import DecoderTrainer

BATCH = 4
Search = Callable[[list[Tensor], Tensor], Tensor]
"""Function from the features that were sent, and a decoder's images of them, to refined images."""


@dataclass
class Answer:
    """Measurements of one kind of answer.

    Attributes:
        rows: scores from `evaluate`, one row for each image
        images: id, original and reconstruction of the images to keep
        small: batches of all reconstructions, reduced for re-identification
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    images: list[tuple[str, Any, Any]] = field(default_factory=list)
    small: list[Compared] = field(default_factory=list)

    @property
    def measured(self) -> tuple[list[dict[str, Any]], list[tuple[str, Any, Any]], Compared]:
        """Rows, images and reconstructions as arguments of `AuditSession.save`."""
        return self.rows, self.images, joined(self.small)


def improve(
    loader: DefendedFeatureLoader,
    decoder: DecoderTrainer,
    metrics: Metrics,
    *,
    refine_steps: int,
    estimate: EstimateConfig | None,
    count: int,
    keep: int,
    box: Box | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Answer], float]:
    """Improve a trained decoder's reconstructions of test images, and measure the results.

    With the encoder's weights, each image is refined until its features match those that were sent. The
    decoder's errors are learned from the first half of the attacker's validation images, at most `HELD_OUT`.
    The objective applies the defence without its noise, which the attacker does not know. The best estimate
    is learned from the other validation images, decoded and refined in the same way, or from all of them
    without the encoder's weights.

    Args:
        loader: loader of the features that are sent
        decoder: the trained decoder
        metrics: the metrics
        refine_steps: optimisation steps for each image; 0 for an attacker without the encoder's weights
        estimate: settings of the best estimate; None for none
        count: number of test images to attack, the first ones
        keep: number of images to keep with their reconstructions
        box: part of the images to be scored by itself too; None for no part
        progress: called with the progress

    Returns:
        the answers (`refined` given `refine_steps`, `best estimate` given `estimate`), and the seconds taken
    """
    started, test = time.monotonic(), loader.data.test
    precision, search = search_precision(loader.recipe.precision), None
    if refine_steps:
        search = _refinement(loader, decoder, InvertConfig(steps=refine_steps, precision=precision))
    what, corrector = loader.encoders.sources[decoder.feature_indices[0]], None
    if estimate:
        corrector = _learn(loader, decoder, search, estimate, precision, progress)
    answers = {REFINED: Answer()} if search else {}
    answers |= {ESTIMATE: Answer()} if corrector else {}
    count = min(count, len(test))
    done = 0
    for originals, decoded, refined in _decoded(loader, decoder, test, count, search):
        ids = test.ids[done : done + len(originals)]
        done += len(originals)
        for name, answer in answers.items():
            found = refined if name == REFINED else correct(corrector, decoded, refined, precision)
            answer.rows += score_rows(ids, originals, [found], metrics, [box])[0]
            kept = zip(ids, to_uint8(originals), to_uint8(found), strict=True)
            answer.images += list(kept)[: max(0, keep - len(answer.images))]
            answer.small.append(compared(found, box))
        progress(f"attacking {what}", done, count)
    return answers, time.monotonic() - started


def estimate_images(count: int, config: EstimateConfig, *, refined: bool) -> range:
    """Return the indices of the validation images, of `count`, that best estimates are learned from.

    Without a search no images are needed for the decoder's errors, so all are available.
    """
    return other_images(count, config.images) if refined else range(min(config.images, count))


def _learn(
    loader: DefendedFeatureLoader,
    decoder: DecoderTrainer,
    search: Search | None,
    config: EstimateConfig,
    precision: str,
    progress: Progress,
) -> Corrector:
    own = loader.data.validation
    chosen = estimate_images(len(own), config, refined=search is not None)
    groups, count = [], len(chosen)
    for group in _decoded(loader, decoder, own, count, search, chosen.start):
        groups.append([part.cpu() for part in group])
        progress("attacking own images, to learn from", sum(len(images) for images, *_ in groups), count)
    parts = (torch.cat(part) for part in zip(*groups, strict=True))
    return learn_corrector(
        *parts,
        config,
        precision=precision,
        seed=loader.seed,
        device=str(loader.fabric.device),
        progress=progress,
    )


def _decoded(
    loader: DefendedFeatureLoader,
    decoder: DecoderTrainer,
    image_set: ImageSet,
    count: int,
    search: Search | None,
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of `count` images from index `first` on, decoded images and refined images."""
    left = min(count, len(image_set) - first)
    for _, images, sent in loader.batches(image_set, torch.arange(first, len(image_set))):
        # Whole batches are sent, since the noise depends on them; the last may be attacked only in part.
        attacked = torch.arange(min(left, len(images)))
        for part in attacked.split(BATCH if search else len(images)):
            targets = [maps[part].clone() for maps in sent]
            decoded = decoder.reconstruct(targets).clone()
            refined = search(decoder.select_features(targets), decoded) if search else decoded
            yield images[part], decoded, refined
        left -= len(attacked)
        if not left:
            return


def _refinement(loader: DefendedFeatureLoader, decoder: DecoderTrainer, method: InvertConfig) -> Search:
    """Build the search of an attacker who has the encoder's weights."""
    defence: Defence = loader.encoders.defences[decoder.feature_indices[0]]
    encoder = loader.encoders.encoder

    def features_of(images: Tensor) -> list[Tensor]:
        with encoder.gradients():
            return defence.encode(encoder(images), random=False)

    known = error_images(len(loader.data.validation))
    errors = DecoderErrors.learn(_errors(loader, decoder, features_of, known)) if known else None

    def search(targets: list[Tensor], decoded: Tensor) -> Tensor:
        size = tuple(decoded.shape[-2:])
        found = invert(
            features_of, targets, size, start=decoded, method=method, errors=errors, seed=loader.seed
        )
        return found.images.detach()

    return search


@torch.no_grad()
def _errors(
    loader: DefendedFeatureLoader, decoder: DecoderTrainer, features_of: FeaturesOf, count: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the decoder's errors, in images and features, on the first `count` of the validation images."""
    for _, images, sent in loader.batches(loader.data.validation, torch.arange(count)):
        decoded, wanted = decoder.reconstruct(sent), decoder.select_features(sent)
        yield images - decoded, [a - b for a, b in zip(features_of(decoded), wanted, strict=True)]
