"""Improve attackers' reconstructions: refine them with the encoder's weights, and compute best estimates from them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from afterimage.analysis.audit.session import KEEP, AuditCondition
from afterimage.analysis.inversion.best_estimate import Corrector, correct, train_corrector
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.invert import invert
from afterimage.config import format_count
from afterimage.config.audit import ESTIMATE, REFINED, WHITE_BOX
from afterimage.config.inversion import (
    EstimateConfig,
    InvertConfig,
    num_error_images,
    search_precision,
    tuning_image_indices,
)
from afterimage.data.images import ImageSet
from afterimage.evaluation.evaluate import score_rows, to_uint8
from afterimage.evaluation.reidentification import Compared, concatenate_batches, prepare_images
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader

BATCH = 4


def refine_and_estimate(
    loader: FeatureLoader, decoder: DecoderTrainer, conditions: Sequence[AuditCondition]
) -> None:
    """Improve a trained decoder's reconstructions of test images, and save the measurements.

    In the white-box threat model, each image is refined until its features match those that were sent. The
    decoder's errors are learned from the first half of the attacker's validation images, at most `MAX_ERROR_IMAGES`.
    The objective applies the defence without its noise, which the attacker does not know. The best estimate
    is learned from the other validation images, decoded and refined in the same way, or from all of them
    without the encoder's weights, since then no images are needed for the decoder's errors.

    Args:
        loader: loader of the features that are sent, whose context is that of the attackers
        decoder: the trained decoder
        conditions: conditions that differ only in the kind of reconstruction, `refined` or `best estimate`
    """
    session, first = loader.context.session, conditions[0]
    attackers, white_box = session.config.attackers, first.threat_model == WHITE_BOX
    if white_box and not loader.encoders.defences[decoder.feature_indices[0]].preserves_positions:
        session.note(
            f"{first.layer}, {first.defence}: not refined, because shuffled features cannot be compared "
            "location by location; an attacker may find a way"
        )
        session.results.unmeasured.add((first.layer, first.defence))
        return
    with session.catch_failure(first.label, conditions):
        for condition in conditions:
            session.create_folder(condition)
        started, note = time.monotonic(), f"decoded by {first.decoder}"
        attack, count = _Attack(loader, decoder), len(loader.data.test)
        if white_box:
            attack.start_refining(attackers.refine_steps)
            count = min(attackers.refine_images, count)
            note += f", then refined for {attackers.refine_steps} steps"
        notes = {REFINED: note}
        if any(condition.answer == ESTIMATE for condition in conditions):
            wanted, available = attackers.estimate.images, len(loader.data.validation)
            indices = tuning_image_indices(available, wanted) if white_box else range(min(wanted, available))
            attack.train_corrector(indices, attackers.estimate)
            images = format_count(len(indices), "image")
            notes[ESTIMATE] = f"{note}, then corrected by what {images} of the attacker's own taught"
        measured = attack.measure(conditions, count)
        seconds = time.monotonic() - started
        for condition in conditions:
            answer = condition.answer
            session.save(condition, *measured[answer], seconds=seconds, notes=[notes[answer]])


class _Attack:
    """Steps after a decoder's reconstruction: refined images, if the attacker has the weights, and best estimates."""

    def __init__(self, loader: FeatureLoader, decoder: DecoderTrainer) -> None:
        self.loader, self.decoder, self.session = loader, decoder, loader.context.session
        self.defence = loader.encoders.defences[decoder.feature_indices[0]]
        self.precision = search_precision(loader.recipe.precision)
        self.method: InvertConfig | None = None
        self.errors: DecoderErrors | None = None
        self.corrector: Corrector | None = None

    def features_of(self, images: Tensor) -> list[Tensor]:
        """Return the features that would be sent but for the noise, with gradients to the images."""
        encoder = self.loader.encoders.encoder
        with encoder.gradients():
            return [self.defence.encode(*encoder(images), random=False)]

    def start_refining(self, steps: int) -> None:
        """Refine images from now on, in this number of steps; learn the decoder's errors first."""
        self.method = InvertConfig(steps=steps, precision=self.precision)
        if known := num_error_images(len(self.loader.data.validation)):
            self.errors = DecoderErrors.estimate(self._errors(known))

    @torch.no_grad()
    def _errors(self, count: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield the decoder's errors, in images and features, on the first `count` of the validation images."""
        for _, images, sent in self.loader.batches(self.loader.data.validation, torch.arange(count)):
            decoded, wanted = self.decoder.reconstruct(sent), self.decoder.select_features(sent)
            maps = zip(self.features_of(decoded), wanted, strict=True)
            yield images - decoded, [a - b for a, b in maps]

    def train_corrector(self, chosen: range, config: EstimateConfig) -> None:
        """Train the corrector on the attacker's validation images at the indices `chosen`."""
        groups, loader, progress = [], self.loader, self.loader.context.progress
        for group in self._reconstructions(loader.data.validation, chosen):
            groups.append([part.cpu() for part in group])
            done = sum(len(images) for images, *_ in groups)
            progress("attacking own images, to learn from", done, len(chosen))
        parts = (torch.cat(part) for part in zip(*groups, strict=True))
        options = {"precision": self.precision, "seed": loader.seed, "device": str(loader.fabric.device)}
        self.corrector = train_corrector(*parts, config, **options, progress=progress)

    def measure(
        self, conditions: Sequence[AuditCondition], count: int
    ) -> dict[str, tuple[list[dict[str, Any]], list[tuple[str, Any, Any]], Compared]]:
        """Attack the first `count` test images; return rows, images and reconstructions of each kind to save."""
        session, test, done = self.session, self.loader.data.test, 0
        box, answers = session.target.box(conditions[0].layer), [c.answer for c in conditions]
        rows, images, small = ({answer: [] for answer in answers} for _ in range(3))
        for originals, decoded, refined in self._reconstructions(test, range(count)):
            ids = test.ids[done : done + len(originals)]
            done += len(originals)
            for answer in answers:
                found = refined
                if answer != REFINED:
                    found = correct(self.corrector, decoded, refined, self.precision)
                rows[answer] += score_rows(ids, originals, [found], session.metrics, [box])[0]
                kept = zip(ids, to_uint8(originals), to_uint8(found), strict=True)
                images[answer] += list(kept)[: max(0, KEEP - len(images[answer]))]
                small[answer].append(prepare_images(found, box))
            session.progress(f"attacking {conditions[0].label}", done, count)
        return {
            answer: (rows[answer], images[answer], concatenate_batches(small[answer])) for answer in answers
        }

    def _reconstructions(self, image_set: ImageSet, chosen: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield batches of the images at the indices `chosen`, decoded images and refined images."""
        left = len(chosen)
        for _, images, sent in self.loader.batches(image_set, torch.arange(chosen.start, len(image_set))):
            # Whole batches are sent, since the noise depends on them; the last may be attacked only in part.
            attacked = torch.arange(min(left, len(images)))
            for part in attacked.split(BATCH if self.method else len(images)):
                targets = [maps[part].clone() for maps in sent]
                refined = decoded = self.decoder.reconstruct(targets).clone()
                if self.method:
                    options = {"method": self.method, "errors": self.errors, "seed": self.loader.seed}
                    own, size = self.decoder.select_features(targets), tuple(decoded.shape[-2:])
                    refined = invert(self.features_of, own, size, start=decoded, **options).images
                yield images[part], decoded, refined
            left -= len(attacked)
            if not left:
                return
