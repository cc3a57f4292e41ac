"""Searches that start from a decoder's reconstruction, prepared with the help of validation images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afterimage.analysis.inversion.best_estimate import Corrector, correct, train_corrector
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.invert import (
    Images,
    Inversion,
    differentiable,
    encode,
    search,
)
from afterimage.analysis.inversion.measure import BATCH, BatchCache, Curve, Search, best_step, search_batch
from afterimage.analysis.inversion.objective import feature_distance
from afterimage.config.inversion import EstimateConfig, InvertConfig, tuning_image_indices
from afterimage.data.images import ImageSet
from afterimage.evaluation.metrics import Metrics
from afterimage.models.reconstructor import FeatureSource, Reconstructor
from afterimage.runtime.terminal import Progress, no_progress


@dataclass(frozen=True)
class Refinement:
    """Search that starts from a decoder's reconstruction.

    Without `errors`, the statistics of the decoder's errors, it takes those of natural images and plain features.
    """

    reconstructor: Reconstructor
    method: InvertConfig
    errors: DecoderErrors | None
    seed: int

    def __call__(self, images: Images, **options: Any) -> Iterator[Inversion]:
        """Refine the decoder's reconstructions of `images`; options and results are those of `search`."""
        return self.refine_features(encode(self.reconstructor.encoders, images), **options)

    def refine_features(self, targets: Sequence[Tensor], **options: Any) -> Iterator[Inversion]:
        """Refine the decoder's images of feature maps."""
        with torch.no_grad():
            start = self.reconstructor.feature_decoder(targets).clone()
        settings = {"method": self.method, "errors": self.errors, "seed": self.seed}
        with differentiable(self.reconstructor.encoders) as feature_function:
            yield from search(
                feature_function, targets, tuple(start.shape[-2:]), start=start, **settings, **options
            )


@dataclass(frozen=True)
class BestEstimate:
    """Search for best estimates, which corrects refined images; `batches` are refined images that are there already."""

    refinement: Refinement
    corrector: Corrector
    batches: BatchCache

    def __call__(self, images: Images, *, progress: Progress = no_progress) -> Iterator[Inversion]:
        """Yield the estimates of `images` alone, since a search has only one best estimate."""
        found, _ = search_batch(self.refinement, images, progress=progress, batches=self.batches)
        yield self._corrected(encode(self.refinement.reconstructor.encoders, images), found)

    def refine_features(self, targets: Sequence[Tensor]) -> Iterator[Inversion]:
        """Refine and correct the decoder's images of feature maps."""
        *_, found = self.refinement.refine_features(targets)
        yield self._corrected(targets, found)

    @torch.no_grad()
    def _corrected(self, targets: Sequence[Tensor], found: Inversion) -> Inversion:
        started, reconstructor = time.monotonic(), self.refinement.reconstructor
        decoded = reconstructor.feature_decoder(targets).clone()
        images = correct(self.corrector, decoded, found.images, self.refinement.method.precision)
        seconds = found.seconds + time.monotonic() - started
        return Inversion(
            images, feature_distance(reconstructor.encoders(images), targets), seconds, found.step
        )


def decoder_errors(
    reconstructor: Reconstructor, image_set: ImageSet, count: int, device: str
) -> DecoderErrors:
    """Estimate the statistics of a decoder's errors from the first `count` images of a set."""

    @torch.no_grad()
    def errors() -> Iterator[tuple[Tensor, list[Tensor]]]:
        for images in image_set.batches(torch.arange(count).split(BATCH), device=device):
            wanted = encode(reconstructor.encoders, images)
            decoded = reconstructor.feature_decoder(wanted)
            maps = reconstructor.encoders(decoded)
            yield images - decoded, [a - b for a, b in zip(maps, wanted, strict=True)]

    return DecoderErrors.estimate(errors())


def choose_passes(
    refinement: Refinement,
    image_set: ImageSet,
    batches: BatchCache,
    metrics: Metrics,
    device: str,
    progress: Progress,
) -> int:
    """Choose the number of passes, up to that of `refinement`, that is best for held-out validation images.

    The first validation images are left to `decoder_errors`. LPIPS decides, or PSNR where LPIPS is unavailable.
    """
    tried = torch.tensor(tuning_image_indices(len(image_set), refinement.method.held_out))
    curve: Curve = []
    for indices in tried.split(BATCH):
        images, ids = image_set.crops(indices, device=device), [image_set.ids[i] for i in indices.tolist()]
        options = {"progress": progress, "batches": batches}
        curve += search_batch(refinement, images, ids, metrics, **options)[1]
        progress("choosing the number of passes", int(indices[-1] - tried[0]) + 1, len(tried))
    return best_step(curve)


def train_on_refined(
    refinement: Refinement,
    image_set: ImageSet,
    config: EstimateConfig,
    batches: BatchCache,
    seed: int,
    device: str,
    progress: Progress,
) -> tuple[Corrector, int]:
    """Refine validation images and train a corrector on them; the first ones are left to `decoder_errors`.

    Returns:
        the corrector, and the number of images that it was trained on
    """
    tried = torch.tensor(tuning_image_indices(len(image_set), config.images))
    groups: list[tuple[Tensor, ...]] = []
    for indices in tried.split(BATCH):
        originals = image_set.crops(indices, device=device)
        with torch.no_grad():
            decoded = refinement.reconstructor(originals).clamp(0, 1)
        found, _ = search_batch(refinement, originals, progress=progress, batches=batches)
        # One memory layout for loaded and new batches, since sums depend on it.
        groups.append(tuple(part.contiguous().cpu() for part in (originals, decoded, found.images)))
        done = int(indices[-1] - tried[0]) + 1
        progress("refining images to learn the best estimate from", done, len(tried))
    parts = (torch.cat(part) for part in zip(*groups, strict=True))
    corrector = train_corrector(
        *parts, config, precision=refinement.method.precision, seed=seed, device=device, progress=progress
    )
    return corrector, len(tried)


def search_from_grey(encoders: FeatureSource, method: InvertConfig, seed: int) -> Search:
    """Return a search from grey."""

    def from_grey(images: Images, **options: Any) -> Iterator[Inversion]:
        targets = encode(encoders, images)
        with differentiable(encoders) as feature_function:
            yield from search(
                feature_function, targets, tuple(images.shape[-2:]), method=method, seed=seed, **options
            )

    return from_grey
