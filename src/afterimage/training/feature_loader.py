"""Batches of images with their features, for training and for evaluation."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afterimage.config import RecipeConfig
from afterimage.data.images import Data, ImageSet
from afterimage.data.sampling import order
from afterimage.models.reconstructor import no_maps
from afterimage.runtime.device import retry_with_smaller_batch
from afterimage.runtime.failures import ENCODERS, concerning
from afterimage.training.checks import FeatureWatch, check_frozen, check_images
from afterimage.training.context import RunContext

VALIDATION_BYTES = 1 << 30
"""Largest total size of validation images and features, in bytes, that is kept in memory after the first pass."""

Batch = tuple[Tensor, Tensor, list[Tensor]]
"""`(indices, images, features)`: indices in the image set, `(B,)`; images, `(B, 3, H, W)` in [0, 1]; and one feature
map `(B, C, h, w)` for each source. Images and features are on the device."""


class FeatureLoader:
    """Loader of images with their features: runs images through frozen encoders, batch by batch.

    If several ranks train together, each gets its part of every batch, which may be empty.

    Args:
        encoders: module that returns a feature map for each of its `sources`; it is never changed
        data: training, validation and test images
        recipe: batch size, and whether training images are cropped and flipped at random
        fabric: device and precision of the encoders
        seed: seed of the order of the training images and of their crops
        context: the context of training
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
        self.watch = FeatureWatch(encoders.sources)
        self._encoder_batch = recipe.batch_size
        self._validation: list[Batch] | None = None
        self._validation_fits = True

    def training_batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        """Yield the training batches of an epoch, a pure function of seed and epoch.

        Args:
            epoch: number of the epoch, from 0
            position: number of images to skip, to resume within an epoch
        """
        train = self.data.train
        indices = order(len(train), seed=self.seed, epoch=epoch)[position:]
        crop = {"seed": self.seed, "epoch": epoch} if self.recipe.augment else {}
        return self.batches(train, indices, **crop) if len(indices) else iter(())

    def views(self, view: int) -> Iterator[Batch]:
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
        # Parts differ in size. Ranks that kept theirs would leave out the messages of those that encode again.
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
                        if (
                            number == 0 or images.device.type == "cpu"
                        ):  # on other devices the check would make every step wait for the device
                            check_images(images, ids)
                    with self.context.section("encoder"):
                        features = self.encode_batch(image_set, chunk, images, **crop)
                        self.watch.look(features, ids)
                yield chunk, images, features
        self.watch.settle()

    def _rank_chunks(self, indices: Tensor) -> Iterator[Tensor]:
        """Yield this rank's part of every batch."""
        for start in range(0, len(indices), self.recipe.batch_size):
            batch = indices[start : start + self.recipe.batch_size]
            yield batch[self.context.ranks.part(len(batch))]

    def encode_batch(self, image_set: ImageSet, indices: Tensor, images: Tensor, **crop: Any) -> list[Tensor]:
        """Return the feature maps that decoders receive for images; a subclass may override this.

        Args:
            image_set: the split
            indices: indices of the images
            images: `(B, 3, H, W)` in [0, 1]
            crop: `seed` and `epoch` of random crops, as for `batches`
        """
        return self.encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of images `(B, 3, H, W)`, computed on fewer images at a time if memory runs out."""

        def work(size: int) -> list[Tensor]:
            with self.fabric.autocast():
                parts = [self.encoders(part) for part in images.split(size)]
            return parts[0] if len(parts) == 1 else [torch.cat(maps) for maps in zip(*parts, strict=True)]

        if len(images) == 0:
            return no_maps(self.encoders.specs, images.device)
        wanted = min(self._encoder_batch, len(images))
        with concerning(ENCODERS):
            features, size = retry_with_smaller_batch(work, wanted, "the encoders")
        if size < wanted:
            self._encoder_batch = size
            self.context.log(f"out of memory: the encoders see {size} images at a time from here on")
        return features
