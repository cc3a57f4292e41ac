"""The base class of decoders: built from measured shapes alone, they return images in [0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError, FeatureSpec
from afterimage.models.decoders.canvas import Canvas, FeatureCrop
from afterimage.models.layers.blocks import clamp
from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup


class Decoder(nn.Module, ABC):
    """Rebuilds images from one feature map; a subclass says how in `decode`.

    A feature map may not cover the image evenly: `decode` fills the decoder's `canvas`, the pixels of the map's cells,
    and the canvas then puts them where they lie in the image.

    Args:
        specs: the features' shapes, and where they lie in the image; one, since several are fused first.
        image_size: height and width of the images in pixels.
    """

    closed_form = False
    """Whether it is fitted in closed form, before any training: it is shown the data once, between `begin_fit` and
    `finalize_fit`."""
    trainable = True
    """Whether it is trained by gradient descent, after a closed form where it has one."""
    decays = True
    """Whether the recipe's weight decay applies to it."""
    size_option: str | None = None
    """The option that makes the decoder larger or smaller, in steps of `size_step`."""
    size_step = 1
    fine_option: str | None = None
    """A second option, between half and twice its default, that evens out what a step leaves."""
    smaller: ClassVar[dict[str, Any]] = {}
    """Options with which the decoder can be smaller still, for sizes that are out of reach without them."""
    channels_last = True
    """Whether it runs faster with its weights' channels as the last axis in memory, and is right either way."""
    single_location: ClassVar[dict[str, Any]] = {}
    """Options for a vector, a map with a single location, around which there are no neighbours to read."""

    def __init__(self, specs: Sequence[FeatureSpec], image_size: tuple[int, int]) -> None:
        super().__init__()
        if len(specs) != 1:
            names = ", ".join(spec.source for spec in specs)
            raise AfterimageError(
                f"{type(self).__name__} takes one feature map, got {len(specs)} ({names}); fuse them first"
            )
        self.spec = specs[0]
        self.image_size = image_size
        self.canvas = Canvas(self.spec, image_size)

    def forward(
        self, features: Sequence[Float[Tensor, "batch _ _ _"]], crop: FeatureCrop | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Rebuild images from features.

        Args:
            features: a list with one feature map `(B, C, h, w)`.
            crop: the part of the map to decode, one of its `feature_crops`; None for all of it.

        Returns:
            Images `(B, 3, H, W)` in [0, 1], or the part of them that the crop covers (see `cut`).

        Raises:
            AfterimageError: for features of another shape than the decoder was built for.
        """
        (features,) = features
        if features.shape[1:] != self.spec.shape:
            raise AfterimageError(
                f"this decoder was built for {self.spec.source} with features of shape {self.spec.shape}, "
                f"got {tuple(features.shape[1:])}"
            )
        if crop is None:
            return clamp(self.canvas.place(self.decode(features)))
        rows, columns = self.canvas.crop(crop)[0]
        return clamp(self.decode(features, crop)[..., rows, columns])

    @abstractmethod
    def decode(self, features: Tensor) -> Tensor:
        """Decode a feature map `(B, C, h, w)`.

        A decoder with `feature_crops` takes one as a second argument.

        Returns:
            The canvas, `(B, 3, *canvas.size)`, whose values need not lie in [0, 1].
        """

    def feature_crops(self, generator: torch.Generator) -> list[FeatureCrop | None]:
        """Choose the parts of a batch's feature maps to train on, an optimizer step each; None is the whole map."""
        return [None]

    def cut(self, images: Tensor, crop: FeatureCrop | None) -> Tensor:
        """Cut the part that belongs to a crop of the features out of images `(B, 3, H, W)`."""
        if crop is None:
            return images
        rows, columns = self.canvas.crop(crop)[1]
        return images[..., rows, columns]

    def after_optimizer_step(self) -> None:
        """Called after every optimizer step."""

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        """Begin the closed form; what an earlier one has left is forgotten.

        Args:
            images: how many training images there are.
            seed: of what is sampled at random.
            ranks: the processes that fit together; each is shown its part of every batch, which may be empty.

        Returns:
            How many times each training image is to be shown: first its centre crop, then random crops.
        """
        return 1

    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        """Take in a batch: feature maps `(B, C, h, w)` and the images `(B, 3, H, W)` they were made of.

        After the training images come the `validation` images, which may choose between solutions.
        """

    def finalize_fit(self) -> list[str]:
        """Solve, and return notes for whoever reads the results."""
        return []

    @property
    def fit_bytes(self) -> int:
        """Bytes of memory that the closed form takes beside the decoder itself."""
        return 0

    def fit_macs(self, images: int) -> int:
        """Count the multiply-adds of the closed form on so many training images, those in float64 twice.

        A fit that is under way is left alone.
        """
        return 0
