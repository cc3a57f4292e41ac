"""Attackers: each knows the defence, owns some images, and trains a decoder on defended features of these images.

All attackers of one layer who own the same images are trained on one pass through the encoder.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afterimage.analysis.audit.attack_refinement import refine_and_estimate
from afterimage.analysis.audit.defences.chain import Defence
from afterimage.analysis.audit.session import KEEP, AuditCondition, AuditSession
from afterimage.analysis.audit.target import StoredImages
from afterimage.config import AfterimageError, format_count
from afterimage.config.audit import BLACK_BOX, DECODED
from afterimage.data.duplicates import shared_indices
from afterimage.data.images import Data, ImageSet
from afterimage.evaluation.evaluate import Reconstructed, evaluate_batches
from afterimage.evaluation.reidentification import Compared, concatenate_batches, prepare_images
from afterimage.models.decoders import create_decoder, decoder_family
from afterimage.models.reconstructor import FeatureDecoder
from afterimage.models.weight_files import load_tensors
from afterimage.runs.run import Run, is_done
from afterimage.runtime.failures import run_all_or_each
from afterimage.training.checkpoint import remove_checkpoint
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader, RunContext
from afterimage.training.trainer import Trainer

CALIBRATION_BYTES = 1 << 29
CALIBRATION_IMAGES = 128
VALIDATION_SHARE = 5
"""Number of an attacker's own images for each one that is kept for validation."""


class DefendedFeatures(nn.Module):
    """Encoder of one layer followed by several defences, each of which gives the features that it would send.

    Args:
        source: the layer as `model:layer`
        defences: the fitted defences
        encoder: encoder that returns the layer's features; None if they come from a store
    """

    def __init__(self, source: str, defences: Sequence[Defence], encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = source.rpartition(":")[2]
        self.defences, self.encoder = nn.ModuleList(defences), encoder
        self.sources = tuple(f"{source} through {defence.name}" for defence in defences)
        self.requires_grad_(False).eval()

    def undefended_features(self, image_set: ImageSet, indices: Tensor, images: Tensor) -> list[Tensor]:
        """Return the undefended features of `images`, the images at `indices` of the set."""
        if isinstance(image_set, StoredImages):
            return [image_set.features(indices, self.layer, images.device)]
        return self.encoder(images)

    def defend(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the features that each defence sends for undefended ones."""
        return [defence.encode(features[0]) for defence in self.defences]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.defend(self.encoder(images))


class DefendedFeatureLoader(FeatureLoader):
    """Loader of one layer's features as each of several defences sends them; a decoder picks its defence."""

    encoders: DefendedFeatures

    def encode_batch(self, image_set: ImageSet, indices: Tensor, images: Tensor, **crop: Any) -> list[Tensor]:
        """Return the features that each defence sends for the images.

        Noise depends only on the seed, the images of the batch and the epoch, not on the decoders that are
        trained together or on a resume.
        """
        names = " ".join(image_set.ids[index] for index in indices.tolist())
        drawn = zlib.crc32(f"{self.seed} {crop.get('epoch')} {names}".encode())
        for defence in self.encoders.defences:
            defence.reseed(drawn)
        if isinstance(image_set, StoredImages):
            return self.encoders.defend(self.encoders.undefended_features(image_set, indices, images))
        return self.encode(images)


@dataclass(kw_only=True)
class AttackContext(RunContext):
    """Run context of attackers trained together: a failed one is recorded, and the others continue."""

    session: AuditSession
    conditions: dict[Run, AuditCondition] = field(default_factory=dict)
    """Condition that each attacker's run folder is for."""

    def record_failure(self, run: Run, error: Exception) -> None:
        condition = self.conditions[run]
        self.session.record_failure(condition.label, error, [condition])


def attack_layer(
    session: AuditSession,
    layer: str,
    encoder: nn.Module | None,
    defences: Mapping[str, Defence],
    data: Data,
    conditions: Sequence[AuditCondition],
) -> None:
    """Measure the conditions of one layer whose attackers own the same images; finished ones are left alone.

    Args:
        session: the audit
        layer: the layer
        encoder: the network up to the layer; None for a store
        defences: the fitted defences by their text
        data: the attackers' own images and the test images
        conditions: the conditions
    """

    def conditions_of(texts: Sequence[str]) -> list[AuditCondition]:
        return [condition for condition in conditions if condition.defence in texts]

    def attack(texts: list[str]) -> None:
        source = session.target.specs[layer].source
        sent = DefendedFeatures(source, [defences[text] for text in texts], encoder)
        _attack(session, sent, data, [one for one in conditions_of(texts) if not session.is_done(one)])

    run_all_or_each(
        attack,
        list(defences),
        lambda text, error: session.record_failure(f"{layer}, {text}", error, conditions_of([text])),
    )


def _attack(
    session: AuditSession, sent: DefendedFeatures, data: Data, missing: Sequence[AuditCondition]
) -> None:
    context = AttackContext(progress=session.progress, session=session)
    decoders: dict[tuple[str, str], DecoderTrainer] = {}
    names, recipe, seed = [d.name for d in sent.defences], session.config.recipe, session.config.seed
    for defence, decoder in dict.fromkeys((condition.defence, condition.decoder) for condition in missing):
        # All attackers start from the decoder of the black-box attacker.
        condition = session.condition(sent.layer, defence, decoder, data, BLACK_BOX, DECODED)
        with session.catch_failure(condition.label, [condition]):
            run, index = session.create_folder(condition), names.index(defence)
            context.conditions[run] = condition
            spec = sent.defences[index].sent_spec
            options = decoder_family(decoder).vector_options if spec.locations == 1 else {}
            built = create_decoder(decoder, [spec], session.target.image_size, seed=seed, **options)
            name = f"{decoder} on {defence} of {spec.source}"
            decoders[defence, decoder] = DecoderTrainer(
                FeatureDecoder(built), [index], recipe, session.fabric, name=name, run=run, context=context
            )
    if not decoders:
        return
    loader = DefendedFeatureLoader(sent, data, recipe, session.fabric, seed=seed, context=context)
    _train(loader, list(decoders.values()))
    for (defence, name), decoder in decoders.items():
        for model in session.config.attackers.threat_models if decoder.best and not decoder.failed else ():
            asked = (defence, name, model)
            improved = [
                c for c in missing if (c.defence, c.decoder, c.threat_model) == asked and c.answer != DECODED
            ]
            if improved:
                refine_and_estimate(loader, decoder, improved)


def _train(loader: DefendedFeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
    """Train and measure the decoders of black-box attackers, or load finished ones."""
    context, fresh = loader.context, []
    for decoder in decoders:
        path = decoder.run.file("decoder.safetensors")
        with context.isolate(decoder.run):
            if is_done(decoder.run) and path.exists():
                decoder.best, _ = load_tensors(path)
                decoder.model.load_state_dict(decoder.best)
            else:
                decoder.restore()
                fresh.append(decoder)
    if fresh:
        Trainer(loader, fresh).train()
    for decoder in [d for d in fresh if d.best and not d.failed]:
        with context.isolate(decoder.run):
            decoder.model.load_state_dict(decoder.best)
            decoder.save_best()

    run_all_or_each(
        lambda finished: _measure(loader, finished),
        [d for d in fresh if d.best and not d.failed],
        lambda decoder, error: context.fail(decoder.run, error),
    )


def _measure(loader: DefendedFeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
    """Measure trained attackers on one pass over the test images."""
    context, session, test = loader.context, loader.context.session, loader.data.test
    box = session.target.box(context.conditions[decoders[0].run].layer)
    small: list[list[Compared]] = [[] for _ in decoders]

    def reconstructions() -> Iterator[Reconstructed]:
        for indices, images, sent in loader.batches(test):
            outputs = [decoder.reconstruct(sent) for decoder in decoders]
            for kept, output in zip(small, outputs, strict=True):
                kept.append(prepare_images(output, box))
            yield indices, images, outputs

    names = [decoder.name for decoder in decoders]
    results = evaluate_batches(
        reconstructions(), test.ids, session.metrics, names=names, progress=context.progress, keep=KEEP,
        seen=[box] * len(decoders),
    )  # fmt: skip
    for decoder, result, parts in zip(decoders, results, small, strict=True):
        with context.isolate(decoder.run):
            condition, took = context.conditions[decoder.run], decoder.seconds
            images, notes = result.images, decoder.notes
            session.save(
                condition, result.rows, images, concatenate_batches(parts), seconds=took, notes=notes
            )
            remove_checkpoint(decoder.run)


def attacker_data(data: Data, pool: Data, count: int | str, seed: int) -> Data | None:
    """Draw an attacker's own images from the pool; a fifth of them is for validation.

    Smaller draws are subsets of larger ones.

    Returns:
        `count` or `all` images of the pool for training and validation, with the test images of `data`; None if the
        pool is too small

    Raises:
        AfterimageError: the pool holds a test image
    """
    own = pool.train.concat(pool.validation)
    shared = shared_indices(own, data.test)
    if len(shared):
        raise AfterimageError(
            f"the attacker's own images hold {format_count(len(shared), 'test image')}, for example "
            f"{own.ids[shared[0]]}: take them out"
        )
    if count != "all" and int(count) > len(own):
        return None
    total = len(own) if count == "all" else int(count)
    order = np.random.default_rng(seed).permutation(len(own))[:total]
    count_validation = max(1, total // VALIDATION_SHARE)
    # Every fifth, so that smaller validation sets are subsets of larger ones too.
    validation = order[::VALIDATION_SHARE][:count_validation]
    train = np.array([i for i in order if i not in set(validation.tolist())])
    return Data(data.config, own.subset(train), own.subset(validation), data.test, pool.digest, data.notes)


@torch.no_grad()
def calibration_features(
    sent: DefendedFeatures, image_set: ImageSet, device: torch.device | str, batch_size: int
) -> Tensor:
    """Return the features that a defence is fitted on, of the first images: at most 128, or about 512 MiB."""
    maps: list[Tensor] = []
    limit = min(len(image_set), CALIBRATION_IMAGES)
    for chunk in torch.arange(limit).split(batch_size):
        images = image_set.crops(chunk, device=device)
        maps.append(sent.undefended_features(image_set, chunk, images)[0])
        if sum(part.nbytes for part in maps) >= CALIBRATION_BYTES:
            break
    return torch.cat(maps)


def mean_image(images: ImageSet, batch_size: int) -> Tensor:
    """Compute the mean of images, `(1, 3, H, W)`: the best guess of an attacker without features."""
    parts = torch.arange(len(images)).split(batch_size)
    return (sum(images.crops(part).double().sum(0, keepdim=True) for part in parts) / len(images)).float()
