"""The context of training, and its batches of images with their features, checked before anything learns from them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.config import AfterimageError, RecipeConfig, RunConfig
from afterimage.data.images import Data, ImageSet
from afterimage.data.sampling import epoch_order
from afterimage.evaluation.metrics import find_invalid_image
from afterimage.models.reconstructor import FeatureSource, MultiEncoder, empty_features
from afterimage.runs.run import Run
from afterimage.runtime.device import retry_with_smaller_batch
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from afterimage.runtime.failures import ENCODERS, set_error_scope
from afterimage.runtime.process import GracefulShutdown
from afterimage.runtime.terminal import Progress, no_progress

CHECKPOINT_SECONDS = 45.0
"""Seconds between checkpoints: with the current step added, at most about a minute of work is lost."""
VALIDATION_BYTES = 1 << 30
"""Largest total size of validation images and features, in bytes, that is kept in memory after the first pass."""

Batch = tuple[Tensor, Tensor, list[Tensor]]
"""`(indices, images, features)`: indices in the image set, `(B,)`; images, `(B, 3, H, W)` in [0, 1]; and one feature
map `(B, C, h, w)` for each source. Images and features are on the device."""


@dataclass(kw_only=True)
class RunContext:
    """Context of a stand-alone training: an error ends it, no folder is locked, nothing is timed.

    Studies, audits and the profiler override its methods: to record the failure of one run and continue with the
    others, to check that they still hold a run's lock, to time the sections.

    Args:
        ranks: processes that train together, each on its part of every batch
        progress: callback for progress and for messages to the user
        shutdown: record of a signal that asks this process to stop
        checkpoint_seconds: time between two checkpoints within an epoch; another is written after every epoch
        failed_runs: runs whose failure was recorded; their training has ended
    """

    ranks: ProcessGroup = SINGLE_PROCESS
    progress: Progress = no_progress
    shutdown: GracefulShutdown = field(default_factory=GracefulShutdown)
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    failed_runs: set[Run] = field(default_factory=set)

    def log(self, text: str) -> None:
        """Show the user a message."""
        self.progress(text, 1, 1)

    def check_shutdown(self) -> None:
        """Raise `Stopped` on all ranks if any of them was asked to stop."""
        with self.ranks.raise_on_all_ranks():
            self.shutdown.check()

    def check_lock(self, run: Run) -> None:
        """Raise `LockLost` if another process has taken over a run's lock, before this one writes to its folder."""

    @contextlib.contextmanager
    def isolate(self, run: Run | None) -> Iterator[None]:
        """Limit an error in this block, on any rank, to one run, unless `record_failure` raises it.

        Args:
            run: the run; None for a decoder without a folder
        """
        try:
            with self.ranks.raise_on_all_ranks():
                yield
        except Exception as error:
            self.fail(run, error)

    def fail(self, run: Run | None, error: Exception) -> None:
        """End a run with an error that all ranks have, unless `record_failure` raises it."""
        self.record_failure(run, error)
        self.failed_runs.add(run)

    def record_failure(self, run: Run | None, error: Exception) -> None:
        """Record that an error ended a run, or raise the error; this class always raises."""
        raise error

    def section(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context for `data`, `encoder`, `decoder forward`, `backward` or `optimizer`, which may be timed."""
        return contextlib.nullcontext()


def build_encoders(
    config: RunConfig, sources: Sequence[str], *, weights: str | None = None, progress: Progress = no_progress
) -> FeatureSource:
    """Build the encoders of a run, with its weights, image size and seed, or open its feature store.

    Args:
        config: the run
        sources: the layers, `model:layer` each
        weights: file or folder of weights, or another setting, in place of the run's own; if given, a run of stored
            features gets an encoder too
        progress: called while a store is checked

    Raises:
        AfterimageError: a model or layer is unknown, weights are not available, or the store cannot be used
    """
    if config.features is not None and not weights:
        from afterimage.training.stored_features import StoredEncoders, open_features

        return StoredEncoders(open_features(config.features, progress), sources)
    return MultiEncoder(
        sources, weights=weights or config.weights, image_size=config.data.size, seed=config.seed
    )


class FeatureLoader:
    """Loader of images with their features: runs images through frozen encoders, batch by batch.

    If several ranks train together, each gets its part of every batch, which may be empty.

    Args:
        encoders: module that returns a feature map for each of its `sources`; it is never changed
        data: training, validation and test images
        recipe: batch size, and whether training images are cropped and flipped at random
        fabric: device and precision of the encoders
        seed: seed of the order of the training images and of their crops
    """

    def __init__(
        self,
        encoders: nn.Module,
        data: Data,
        recipe: RecipeConfig,
        fabric: Fabric,
        *,
        seed: int,
        context: RunContext | None = None,
    ) -> None:
        self.encoders, self.data, self.recipe, self.fabric, self.seed = encoders, data, recipe, fabric, seed
        self.context = context or RunContext()
        self.non_finite_check = NonFiniteCheck(encoders.sources)
        self._encoder_batch = recipe.batch_size
        self._validation: list[Batch] | None = None
        self._validation_fits = True

    def training_batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        """Yield an epoch's training batches, a pure function of seed and epoch, without the first `position` images."""
        train = self.data.train
        indices = epoch_order(len(train), seed=self.seed, epoch=epoch)[position:]
        crop = {"seed": self.seed, "epoch": epoch} if self.recipe.augment else {}
        return self.batches(train, indices, **crop) if len(indices) else iter(())

    def closed_form_batches(self, view: int) -> Iterator[Batch]:
        """Yield the training images for a closed-form fit: centre crops in view 0, random crops in later views."""
        return self.batches(self.data.train) if view == 0 else self.training_batches(view - 1)

    def validation_batches(self) -> Iterator[Batch]:
        """Yield the validation images; the first pass keeps them and their features if all fit `VALIDATION_BYTES`."""
        if self._validation is not None:
            yield from self._validation
            return
        kept, size = [], 0
        for indices, images, features in self.batches(self.data.validation):
            size += sum(tensor.nbytes for tensor in (*features, images))
            self._validation_fits = self._validation_fits and size <= VALIDATION_BYTES
            if self._validation_fits:
                kept.append((indices, images, features))
            else:
                kept.clear()
            yield indices, images, features
        # Parts differ in size. All ranks keep theirs or none does, since encoding again communicates.
        self._validation_fits = all(self.context.ranks.gather(self._validation_fits))
        if self._validation_fits:
            self._validation = kept

    @torch.no_grad()
    def batches(
        self, image_set: ImageSet, indices: np.ndarray | Tensor | None = None, **crop: Any
    ) -> Iterator[Batch]:
        """Yield images with their features.

        Args:
            image_set: the split
            indices: indices of the images, in the order to yield them; None for all
            crop: `seed` and `epoch` of random crops and flips; centre crops if omitted

        Raises:
            AfterimageError: an image is not finite or leaves [0, 1], or a part of the encoders is not frozen
        """
        check_frozen(self.encoders)
        indices = torch.arange(len(image_set)) if indices is None else torch.as_tensor(indices)
        chunks, ahead = itertools.tee(self._rank_chunks(indices))
        with contextlib.closing(image_set.batches(ahead, device=self.fabric.device, **crop)) as crops:
            for number, chunk in enumerate(chunks):
                with self.context.ranks.raise_on_all_ranks():
                    with self.context.section("data"):
                        images = next(crops)
                        ids = [image_set.ids[index] for index in chunk.tolist()]
                        # On other devices the check would make every step wait for the device.
                        if number == 0 or images.device.type == "cpu":
                            check_images(images, ids)
                    with self.context.section("encoder"):
                        features = self.encode_batch(image_set, chunk, images, **crop)
                        self.non_finite_check.update(features, ids)
                yield chunk, images, features
        self.non_finite_check.flush()

    def _rank_chunks(self, indices: Tensor) -> Iterator[Tensor]:
        """Yield this rank's part of every batch."""
        for start in range(0, len(indices), self.recipe.batch_size):
            batch = indices[start : start + self.recipe.batch_size]
            yield batch[self.context.ranks.rank_slice(len(batch))]

    def encode_batch(self, image_set: ImageSet, indices: Tensor, images: Tensor, **crop: Any) -> list[Tensor]:
        """Return the feature maps that decoders receive for images of a set; a subclass may override this."""
        return self.encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images `(B, 3, H, W)`, computed on fewer images at a time if memory runs out."""

        def work(size: int) -> list[Tensor]:
            with self.fabric.autocast():
                parts = [self.encoders(part) for part in images.split(size)]
            return parts[0] if len(parts) == 1 else [torch.cat(maps) for maps in zip(*parts, strict=True)]

        if len(images) == 0:
            return empty_features(self.encoders.specs, images.device)
        wanted = min(self._encoder_batch, len(images))
        with set_error_scope(ENCODERS):
            features, size = retry_with_smaller_batch(work, wanted, "the encoders")
        if size < wanted:
            self._encoder_batch = size
            self.context.log(f"out of memory: the encoders see {size} images at a time from here on")
        return features


def check_frozen(encoders: nn.Module) -> None:
    """Raise an `AfterimageError` for a module in training mode or a parameter that requires gradients."""
    for name, module in encoders.named_modules():
        container = module is encoders or isinstance(module, nn.ModuleList)
        if module.training and not container:
            raise AfterimageError(
                f"the encoder's {name} is in training mode: its batch statistics would change with every "
                "image, and with them all scores"
            )
    for name, parameter in encoders.named_parameters():
        if parameter.requires_grad:
            raise AfterimageError(
                f"the encoder's parameter {name} requires gradients, but encoders are frozen"
            )


def check_images(images: Tensor, ids: Sequence[str]) -> None:
    """Raise an `AfterimageError` that names the first of the images `(B, 3, H, W)` not finite or not in [0, 1]."""
    if found := find_invalid_image(images):
        raise AfterimageError(f"image {ids[found[0]]} {found[1]}")


class NonFiniteCheck:
    """Detector of non-finite features: it records, for each source, the first image whose feature map is not finite.

    On a CPU feature maps are examined at once, on other devices when `flush` is called, so that steps need not wait.

    Args:
        sources: names of the feature maps
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self._found: dict[int, str] = {}
        self._pending: list[tuple[Tensor, Sequence[str]]] = []

    def update(self, features: Sequence[Tensor], ids: Sequence[str]) -> None:
        """Examine the feature maps `(B, C, h, w)` of a batch, one for each source."""
        finite = [maps.sum((1, 2, 3), dtype=torch.float32).isfinite() for maps in features]
        self._pending.append((torch.stack(finite), ids))
        if finite[0].device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Wait for the device, and record the findings in all batches since the last call."""
        for finite, ids in self._pending:
            for source, image in finite.logical_not().nonzero().tolist():
                self._found.setdefault(source, ids[image])
        self._pending.clear()

    def check(self, name: str, feature_indices: Sequence[int]) -> None:
        """Raise an `AfterimageError` with run, source and image if a value of these sources was not finite so far."""
        for source in feature_indices:
            if source in self._found:
                raise AfterimageError(
                    f"{name}: the features of {self.sources[source]} are not finite for image "
                    f"{self._found[source]}"
                )
