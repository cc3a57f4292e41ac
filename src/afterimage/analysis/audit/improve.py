"""Improve a decoder's answers: refine them with the encoder's weights, and correct them to best estimates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from afterimage.analysis.audit.session import KEEP, AuditCondition
from afterimage.analysis.inversion.best_estimate import Corrector, correct, learn_corrector
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.invert import invert
from afterimage.analysis.inversion.objective import FeaturesOf
from afterimage.config import counted
from afterimage.config.audit import ESTIMATE, REFINED, WHITE_BOX
from afterimage.config.inversion import (
    EstimateConfig,
    InvertConfig,
    error_images,
    other_images,
    search_precision,
)
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import score_rows, to_uint8
from afterimage.evaluation.reidentification import Compared, compared, joined
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader

BATCH = 4
Search = Callable[[list[Tensor], Tensor], Tensor]
"""Function from the features that were sent, and a decoder's images of them, to refined images."""


def improve(loader: FeatureLoader, decoder: DecoderTrainer, conditions: Sequence[AuditCondition]) -> None:
    """Improve a trained decoder's reconstructions of test images, and save the measurements.

    In the white-box threat model, each image is refined until its features match those that were sent. The
    decoder's errors are learned from the first half of the attacker's validation images, at most `HELD_OUT`.
    The objective applies the defence without its noise, which the attacker does not know. The best estimate
    is learned from the other validation images, decoded and refined in the same way, or from all of them
    without the encoder's weights, since then no images are needed for the decoder's errors.

    Args:
        loader: loader of the features that are sent, whose context is that of the attackers
        decoder: the trained decoder
        conditions: conditions that differ only in the answer, `refined` or `best estimate`
    """
    session, first = loader.context.session, conditions[0]
    attackers, white_box = session.config.attackers, first.threat_model == WHITE_BOX
    with session.ending(first.label, conditions):
        for condition in conditions:
            session.begin(condition)
        started, precision = time.monotonic(), search_precision(loader.recipe.precision)
        count, search, corrector = len(loader.data.test), None, None
        told = f"decoded by {first.decoder}"
        if white_box:
            method = InvertConfig(steps=attackers.refine_steps, precision=precision)
            search, count = _refinement(loader, decoder, method), min(attackers.refine_images, count)
            told += f", then refined for {attackers.refine_steps} steps"
        notes = {REFINED: told}
        if any(condition.answer == ESTIMATE for condition in conditions):
            wanted, own = attackers.estimate.images, len(loader.data.validation)
            taught = other_images(own, wanted) if search else range(min(wanted, own))
            corrector = _learn(loader, decoder, search, taught, attackers.estimate, precision)
            images = counted(len(taught), "image")
            notes[ESTIMATE] = f"{told}, then corrected by what {images} of the attacker's own taught"
        found = _measure(loader, decoder, search, corrector, conditions, count, precision)
        seconds = time.monotonic() - started
        for condition in conditions:
            answer = condition.answer
            session.save(condition, *found[answer], seconds=seconds, notes=[notes[answer]])


def _measure(
    loader: FeatureLoader,
    decoder: DecoderTrainer,
    search: Search | None,
    corrector: Corrector | None,
    conditions: Sequence[AuditCondition],
    count: int,
    precision: str,
) -> dict[str, tuple[list[dict[str, Any]], list[tuple[str, Any, Any]], Compared]]:
    """Attack the first `count` test images; return rows, images and reconstructions of each answer to save."""
    session, test, done = loader.context.session, loader.data.test, 0
    source = loader.encoders.sources[decoder.feature_indices[0]]
    box, answers = session.target.box(conditions[0].layer), [condition.answer for condition in conditions]
    rows, images, small = ({answer: [] for answer in answers} for _ in range(3))
    for originals, decoded, refined in _decoded(loader, decoder, test, range(count), search):
        ids = test.ids[done : done + len(originals)]
        done += len(originals)
        for answer in answers:
            found = refined if answer == REFINED else correct(corrector, decoded, refined, precision)
            rows[answer] += score_rows(ids, originals, [found], session.metrics, [box])[0]
            kept = zip(ids, to_uint8(originals), to_uint8(found), strict=True)
            images[answer] += list(kept)[: max(0, KEEP - len(images[answer]))]
            small[answer].append(compared(found, box))
        session.progress(f"attacking {source}", done, count)
    return {answer: (rows[answer], images[answer], joined(small[answer])) for answer in answers}


def _learn(
    loader: FeatureLoader,
    decoder: DecoderTrainer,
    search: Search | None,
    chosen: range,
    config: EstimateConfig,
    precision: str,
) -> Corrector:
    """Learn to correct from the attacker's validation images at the indices `chosen`."""
    groups, count, progress = [], len(chosen), loader.context.progress
    for group in _decoded(loader, decoder, loader.data.validation, chosen, search):
        groups.append([part.cpu() for part in group])
        progress("attacking own images, to learn from", sum(len(images) for images, *_ in groups), count)
    parts = (torch.cat(part) for part in zip(*groups, strict=True))
    options = {"precision": precision, "seed": loader.seed, "device": str(loader.fabric.device)}
    return learn_corrector(*parts, config, **options, progress=progress)


def _decoded(
    loader: FeatureLoader, decoder: DecoderTrainer, image_set: ImageSet, chosen: range, search: Search | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of the images at the indices `chosen`, decoded images and refined images."""
    left = len(chosen)
    for _, images, sent in loader.batches(image_set, torch.arange(chosen.start, len(image_set))):
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


def _refinement(loader: FeatureLoader, decoder: DecoderTrainer, method: InvertConfig) -> Search:
    """Build the search of an attacker who has the encoder's weights."""
    defence = loader.encoders.defences[decoder.feature_indices[0]]
    encoder = loader.encoders.encoder

    def features_of(images: Tensor) -> list[Tensor]:
        with encoder.gradients():
            return [defence.encode(*encoder(images), random=False)]

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
    loader: FeatureLoader, decoder: DecoderTrainer, features_of: FeaturesOf, count: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the decoder's errors, in images and features, on the first `count` of the validation images."""
    for _, images, sent in loader.batches(loader.data.validation, torch.arange(count)):
        decoded, wanted = decoder.reconstruct(sent), decoder.select_features(sent)
        yield images - decoded, [a - b for a, b in zip(features_of(decoded), wanted, strict=True)]
