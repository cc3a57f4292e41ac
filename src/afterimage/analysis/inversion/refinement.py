"""Searches that start from a decoder's reconstruction, prepared with the help of validation images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from afterimage.analysis.inversion.batches import Batches, Curve
from afterimage.analysis.inversion.best_estimate import Corrector, correct, learn_corrector
from afterimage.analysis.inversion.decoder_errors import DecoderErrors
from afterimage.analysis.inversion.invert import (
    Inversion,
    Snapshot,
    differentiable,
    encode,
    invert,
    refine_features,
)
from afterimage.analysis.inversion.measure import BATCH, best_step, search_batch
from afterimage.analysis.inversion.objective import feature_distance
from afterimage.config import counted
from afterimage.config.inversion import EstimateConfig, InvertConfig, other_images
from afterimage.data.images import ImageSet
from afterimage.evaluation.metrics import Metrics
from afterimage.models.reconstructor import MultiEncoder, Reconstructor
from afterimage.runs.results import LpipsStatus
from afterimage.runtime.terminal import Progress, silent

Images = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class Refinement:
    """Search that starts from a decoder's reconstruction; `measure` calls it.

    Attributes:
        reconstructor: encoders and decoder
        method: settings of the search
        errors: statistics of the decoder's errors; None takes natural images and plain features
        seed: seed of the search
    """

    reconstructor: Reconstructor
    method: InvertConfig
    errors: DecoderErrors | None
    seed: int

    @property
    def steps(self) -> int:
        return self.method.steps

    def __call__(self, images: Images, **options: Any) -> Inversion:
        """Refine the decoder's reconstructions of `images`."""
        targets = encode(self.reconstructor.encoders, images)
        return self.of_features(targets, tuple(images.shape[-2:]), **options)

    def of_features(self, targets: Sequence[Tensor], size: tuple[int, int], **options: Any) -> Inversion:
        """Refine the decoder's images of feature maps; the options are those of `invert`."""
        settings = {"method": self.method, "errors": self.errors, "seed": self.seed}
        return refine_features(self.reconstructor, targets, size, **settings, **options)


@dataclass(frozen=True)
class BestEstimate:
    """Search for best estimates, which corrects refined images; `measure` calls it.

    Attributes:
        refinement: search for the refined images
        corrector: network that corrects them
        precision: `32-true`, or `bf16-mixed` to run the corrector in bfloat16
        batches: refined images that are stored already
    """

    refinement: Refinement
    corrector: Corrector
    precision: str
    batches: Batches

    @property
    def steps(self) -> int:
        return self.refinement.steps

    def __call__(
        self, images: Images, *, progress: Progress = silent, callback: Any = None, **_: Any
    ) -> Inversion:
        """Refine `images`, or load them refined from `batches`, and correct them."""
        found, _ = search_batch(self.refinement, images, self.steps, progress=progress, batches=self.batches)
        result = self._corrected(encode(self.refinement.reconstructor.encoders, images), found)
        if callback is not None:
            callback(Snapshot(self.steps, result.seconds, result.images, result.loss))
        return result

    def of_features(self, targets: Sequence[Tensor], size: tuple[int, int], **options: Any) -> Inversion:
        """Refine and correct the decoder's images of feature maps."""
        return self._corrected(targets, self.refinement.of_features(targets, size, **options))

    @torch.no_grad()
    def _corrected(self, targets: Sequence[Tensor], found: Inversion) -> Inversion:
        started, reconstructor = time.monotonic(), self.refinement.reconstructor
        decoded = reconstructor.feature_decoder(targets).clone()
        images = correct(self.corrector, decoded, found.images, self.precision)
        seconds = found.seconds + time.monotonic() - started
        return Inversion(images, feature_distance(reconstructor.encoders(images), targets), seconds)


def decoder_errors(
    reconstructor: Reconstructor, image_set: ImageSet | None, count: int, device: str
) -> tuple[DecoderErrors | None, list[str]]:
    """Estimate the statistics of a decoder's errors from the first `count` images of a set.

    Returns:
        the statistics, None without images, and remarks for the run's notes
    """
    if image_set is None or not count:
        few = "no validation images" if image_set is None else "too few validation images"
        return None, [f"the decoder's errors are not known, natural images stand for them: {few}"]
    images = counted(count, "validation image")
    note = f"the decoder's errors, in images and in features, are learnt from {images}"

    @torch.no_grad()
    def errors() -> Iterator[tuple[Tensor, list[Tensor]]]:
        for images in image_set.batches(torch.arange(count).split(BATCH), device=device):
            wanted = encode(reconstructor.encoders, images)
            decoded = reconstructor.feature_decoder(wanted)
            maps = reconstructor.encoders(decoded)
            yield images - decoded, [a - b for a, b in zip(maps, wanted, strict=True)]

    return DecoderErrors.learn(errors()), [note]


def choose_passes(
    refinement: Refinement,
    image_set: ImageSet,
    batches: Batches,
    metrics: Metrics,
    device: str,
    progress: Progress,
) -> int:
    """Choose the number of passes that is best for held-out images.

    Args:
        refinement: the search, with its largest number of passes
        image_set: the validation images; the first ones are left to `decoder_errors`
        batches: store of finished batches
        metrics: metrics of the choice: LPIPS, or PSNR where LPIPS is unavailable
        device: device to compute on
        progress: called during the search

    Returns:
        the number of passes
    """
    tried, most = _others(image_set, refinement.method.held_out), refinement.method.steps
    curve: Curve = []
    for indices in tried.split(BATCH):
        images, ids = image_set.crops(indices, device=device), [image_set.ids[i] for i in indices.tolist()]
        curve += search_batch(refinement, images, most, ids, metrics, progress=progress, batches=batches)[1]
        progress("choosing the number of passes", int(indices[-1] - tried[0]) + 1, len(tried))
    return best_step(curve)


def with_passes(
    refinement: Refinement, steps: int, image_set: ImageSet, lpips: LpipsStatus
) -> tuple[Refinement, str]:
    """Return the search with the number of passes that was chosen, and a remark for the run's notes.

    Args:
        refinement: the search, with its largest number of passes
        steps: the number that `choose_passes` returned
        image_set: the validation images
        lpips: LPIPS of the choice
    """
    method, what = refinement.method, "LPIPS" if lpips.available else "PSNR"
    images = counted(len(_others(image_set, method.held_out)), "other validation image")
    note = f"the number of passes, {steps} of at most {method.steps}, is the best in {what} for {images}"
    return replace(refinement, method=replace(method, steps=steps)), note


def learn_from(
    refinement: Refinement,
    image_set: ImageSet,
    config: EstimateConfig,
    batches: Batches,
    seed: int,
    device: str,
    progress: Progress,
) -> tuple[Corrector, int]:
    """Refine validation images and train a corrector on them.

    Args:
        refinement: the search
        image_set: the validation images; the first ones are left to `decoder_errors`
        config: settings of the corrector
        batches: store of finished batches
        seed: seed of the training
        device: device to compute on
        progress: called during the search and the training

    Returns:
        the corrector, and the number of images that it was trained on
    """
    tried = _others(image_set, config.images)
    groups: list[tuple[Tensor, Tensor, Tensor]] = []
    for indices in tried.split(BATCH):
        originals = image_set.crops(indices, device=device)
        with torch.no_grad():
            decoded = refinement.reconstructor(originals).clamp(0, 1)
        found, _ = search_batch(refinement, originals, refinement.steps, progress=progress, batches=batches)
        # One memory layout for loaded and new batches, since sums depend on it.
        groups.append(tuple(part.contiguous().cpu() for part in (originals, decoded, found.images)))
        done = int(indices[-1] - tried[0]) + 1
        progress("refining images to learn the best estimate from", done, len(tried))
    parts = (torch.cat(part) for part in zip(*groups, strict=True))
    corrector = learn_corrector(
        *parts, config, precision=refinement.method.precision, seed=seed, device=device, progress=progress
    )
    return corrector, len(tried)


def _others(image_set: ImageSet, count: int) -> Tensor:
    return torch.tensor(other_images(len(image_set), count))


def plain_search(encoders: MultiEncoder, method: InvertConfig, seed: int) -> Callable[..., Inversion]:
    """Return a search from grey that `measure` can call."""

    def search(images: Images, **options: Any) -> Inversion:
        targets = encode(encoders, images)
        with differentiable(encoders) as features_of:
            return invert(features_of, targets, tuple(images.shape[-2:]), method=method, seed=seed, **options)

    return search
