"""The base class of decoders, which are built from measured shapes alone and return images in [0, 1]."""

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


class ClosedForm:
    """Base class of decoders and fusions: methods that a part fitted in closed form overrides."""

    closed_form = False
    """True if the part is fitted in closed form before any training: it is shown the data once, between
    `begin_fit` and `finalize_fit`."""
    trainable = True
    """True if the part is trained by gradient descent, after its closed form if it has one."""

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        """Begin the closed form and discard the state of an earlier one.

        Args:
            images: number of training images.
            seed: seed of random sampling.
            ranks: processes that fit together; each is shown its part of every batch, which may be empty.

        Returns:
            Number of times that each training image must be shown: first its centre crop, then random crops.
        """
        return 1

    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        """Add a batch of feature maps `(B, C, h, w)` and their images `(B, 3, H, W)` to the closed form.

        After the training images come the `validation` images, on which solutions may be compared.
        """

    def finalize_fit(self) -> list[str]:
        """Solve the closed form, and return notes for the run's result."""
        return []

    @property
    def fit_bytes(self) -> int:
        """Memory in bytes that the closed form needs in addition to the part itself."""
        return 0

    def fit_macs(self, images: int) -> int:
        """Count the multiply-adds of the closed form on a number of images; those in float64 count twice.

        A fit in progress is not affected.
        """
        return 0


class Decoder(ClosedForm, nn.Module, ABC):
    """Base class of decoders, which rebuild images from one feature map; subclasses implement `decode`.

    A feature map may not cover the image evenly. So `decode` fills the decoder's `canvas`, the pixels of the
    map's cells, and the canvas then places them at their position in the image.

    Args:
        specs: shape of the features and their position in the image; exactly one, since several are fused
            first.
        image_size: height and width of the images in pixels.
    """

    uses_weight_decay = True
    """True if the recipe's weight decay applies to the decoder."""
    size_option: str | None = None
    """Option that sets the decoder's size, in steps of `size_step`."""
    size_step = 1
    fine_option: str | None = None
    """Second option for the size, varied between half and twice its default to correct the difference that
    `size_step` leaves."""
    fallback_options: ClassVar[dict[str, Any]] = {}
    """Options to try if the requested number of parameters is too small for every value of `size_option`."""
    channels_last = True
    """True if the decoder runs faster with channels-last weights; the results are right in either memory
    order."""
    vector_options: ClassVar[dict[str, Any]] = {}
    """Options to use for a vector, a feature map with a single location: an audit passes them to the constructor."""

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
            crop: the part of the map to decode, one of `feature_crops`; None for the whole map.

        Returns:
            Images `(B, 3, H, W)` in [0, 1], or the part of them that the crop covers (see `crop_images`).

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

        A decoder with `feature_crops` takes a crop as second argument.

        Returns:
            The canvas, `(B, 3, *canvas.size)`; its values need not lie in [0, 1].
        """

    def feature_crops(self, generator: torch.Generator) -> list[FeatureCrop | None]:
        """Choose the parts of a batch's feature maps to train on, one optimizer step each; None means all."""
        return [None]

    def crop_images(self, images: Tensor, crop: FeatureCrop | None) -> Tensor:
        """Crop images `(B, 3, H, W)` to the part that belongs to a crop of the features."""
        if crop is None:
            return images
        rows, columns = self.canvas.crop(crop)[1]
        return images[..., rows, columns]

    @property
    def notes(self) -> list[str]:
        """Notes for the run's result on the images decoded so far."""
        return []

    def after_optimizer_step(self) -> None:
        """Update state that depends on the weights; called after every optimizer step."""
