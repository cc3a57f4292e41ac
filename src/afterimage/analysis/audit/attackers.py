"""Attackers: they know the defence, own some images, and train a decoder on the features that are sent."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.analysis.audit.defences.chain import Defence
from afterimage.analysis.audit.feature_store import StoredImages
from afterimage.config import AfterimageError, RecipeConfig, counted
from afterimage.data.duplicates import shared
from afterimage.data.images import Data, ImageSet
from afterimage.evaluation.evaluate import Box, Evaluation, Reconstructed, evaluate_together
from afterimage.evaluation.metrics import Metrics
from afterimage.evaluation.reidentification import Compared, compared, joined
from afterimage.models.decoders import create_decoder, decoder_family
from afterimage.models.reconstructor import FeatureDecoder
from afterimage.runs.run import Run
from afterimage.training.context import RunContext
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.feature_loader import FeatureLoader

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

    def raw(self, image_set: ImageSet, indices: Tensor, images: Tensor) -> list[Tensor]:
        """Return the undefended features of `images`, the images at `indices` of the set."""
        if isinstance(image_set, StoredImages):
            return [image_set.features(indices, self.layer, images.device)]
        return self.encoder(images)

    def defend(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the features that each defence sends for undefended ones."""
        return [maps for defence in self.defences for maps in defence.encode(features)]

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
            return self.encoders.defend(self.encoders.raw(image_set, indices, images))
        return self.encode(images)


def evaluate_attackers(
    loader: DefendedFeatureLoader,
    decoders: Sequence[DecoderTrainer],
    metrics: Metrics,
    *,
    keep: int,
    box: Box | None = None,
) -> tuple[list[Evaluation], list[Compared]]:
    """Score attackers on the test images.

    Args:
        loader: loader of the features that are sent
        decoders: the attackers' trained decoders
        metrics: the metrics
        keep: number of images to keep with their reconstructions
        box: part of the images that the layer's locations see, to be scored by itself too; None for no part

    Returns:
        for each attacker its scores, and its reconstructions reduced for re-identification
    """
    small: list[list[Compared]] = [[] for _ in decoders]

    def reconstructions() -> Iterator[Reconstructed]:
        for indices, images, sent in loader.batches(loader.data.test):
            outputs = [decoder.reconstruct(sent) for decoder in decoders]
            for kept, output in zip(small, outputs, strict=True):
                kept.append(compared(output, box))
            yield indices, images, outputs

    results = evaluate_together(
        reconstructions(),
        loader.data.test.ids,
        metrics,
        names=[decoder.name for decoder in decoders],
        progress=loader.context.progress,
        keep=keep,
        seen=[box] * len(decoders),
    )
    return results, [joined(parts) for parts in small]


def attacker_decoder(
    decoder: str,
    index: int,
    defence: Defence,
    image_size: tuple[int, int],
    recipe: RecipeConfig,
    fabric: Fabric,
    *,
    seed: int,
    run: Run,
    context: RunContext,
) -> DecoderTrainer:
    """Build the decoder of an attacker for the features that `defence`, the one at `index`, sends."""
    spec = defence.sent_specs[0]
    options = decoder_family(decoder).single_location if spec.locations == 1 else {}
    model = FeatureDecoder(create_decoder(decoder, [spec], image_size, seed=seed, **options))
    name = f"{decoder} on {defence.name} of {spec.source}"
    return DecoderTrainer(model, [index], recipe, fabric, name=name, run=run, context=context)


def attacker_data(data: Data, pool: Data, count: int | str, seed: int) -> Data | None:
    """Draw an attacker's own images from the pool; a fifth of them is for validation.

    Smaller draws are subsets of larger ones.

    Args:
        data: the audited images, whose test images are attacked
        pool: images that an attacker may own
        count: number of images that the attacker owns, or `all`
        seed: seed of the draw

    Returns:
        the attacker's training and validation images with the test images; None if the pool is too small

    Raises:
        AfterimageError: the pool holds a test image
    """
    own = pool.train.joined(pool.validation)
    places = shared(own, data.test)
    if len(places):
        raise AfterimageError(
            f"the attacker's own images hold {counted(len(places), 'test image')}, for example "
            f"{own.ids[places[0]]}: take them out"
        )
    if count != "all" and int(count) > len(own):
        return None
    total = len(own) if count == "all" else int(count)
    order = np.random.default_rng(seed).permutation(len(own))[:total]
    held = max(1, total // VALIDATION_SHARE)
    # Every fifth, so that smaller validation sets are subsets of larger ones too.
    validation = order[::VALIDATION_SHARE][:held]
    train = np.array([i for i in order if i not in set(validation.tolist())])
    return Data(data.config, own.subset(train), own.subset(validation), data.test, pool.digest, data.notes)


@torch.no_grad()
def calibration(
    sent: DefendedFeatures, image_set: ImageSet, device: torch.device | str, batch_size: int
) -> list[Tensor]:
    """Return the features that a defence is fitted on, of the first images: at most 128, or about 512 MiB."""
    maps: list[Tensor] = []
    limit = min(len(image_set), CALIBRATION_IMAGES)
    for chunk in torch.arange(limit).split(batch_size):
        images = image_set.crops(chunk, device=device)
        maps.append(sent.raw(image_set, chunk, images)[0])
        if sum(part.nbytes for part in maps) >= CALIBRATION_BYTES:
            break
    return [torch.cat(maps)]


def mean_image(images: ImageSet, batch_size: int) -> Tensor:
    """Compute the mean of images, `(1, 3, H, W)`: the best guess of an attacker without features."""
    parts = torch.arange(len(images)).split(batch_size)
    return (sum(images.crops(part).double().sum(0, keepdim=True) for part in parts) / len(images)).float()
