"""What every decoder is: built from measured shapes alone, returns images in [0, 1]."""

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
    """A map from feature maps `[(B, C, h, w), ...]` to images `(B, 3, H, W)` in [0, 1].

    What a decoder makes of a map is its `canvas`, the pixels of the map's cells; the canvas then puts it where these
    lie in the image. A decoder with `closed_form` is first shown the data once (`begin_fit`, `partial_fit`,
    `finalize_fit`); one with `trainable` is then trained by gradient descent. The two may go together.
    """

    closed_form = False
    trainable = True
    decays = True
    """Whether the recipe's weight decay applies to it."""
    size_option: str | None = None
    """The option that makes the decoder larger or smaller, in steps of `size_step`."""
    size_step = 1
    fine_option: str | None = None
    """A second option, between half and twice its default, that evens out what a step leaves."""
    smaller: ClassVar[dict[str, Any]] = {}
    """Options with which the decoder can be smaller still, for sizes that are out of reach without them."""
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
        """Rebuild images `(B, 3, H, W)` in [0, 1] from a list with one feature map `(B, C, h, w)`.

        With one of its `feature_crops`, only that part of the images (`cut` cuts it out of an image).
        """
        (features,) = features
        expected = (self.spec.channels, self.spec.height, self.spec.width)
        if features.shape[1:] != expected:
            raise AfterimageError(
                f"this decoder was built for {self.spec.source} with features of shape {expected}, "
                f"got {tuple(features.shape[1:])}"
            )
        if crop is None:
            return clamp(self.canvas.place(self.decode(features)))
        rows, columns = self.canvas.crop(crop)[0]
        return clamp(self.decode(features, crop)[..., rows, columns])

    @abstractmethod
    def decode(self, features: Tensor) -> Tensor:
        """Fill canvases `(B, 3, *canvas.size)`, not yet held to [0, 1].

        A decoder with `feature_crops` takes one as a second argument.
        """

    def feature_crops(self, generator: torch.Generator) -> list[FeatureCrop | None]:
        """The parts of a batch's maps to train on, an optimizer step each; None is all of it."""
        return [None]

    def cut(self, images: Tensor, crop: FeatureCrop | None) -> Tensor:
        """The part of images `(B, 3, H, W)` that belongs to a window of their features."""
        if crop is None:
            return images
        rows, columns = self.canvas.crop(crop)[1]
        return images[..., rows, columns]

    def after_optimizer_step(self) -> None:
        """Called after every optimizer step."""

    def begin_fit(self, images: int, seed: int, ranks: ProcessGroup = SINGLE_PROCESS) -> int:
        """Announce how many training images there are; returns how many views of each are wanted.

        Each of the `ranks` is then given its part of every batch, which may be none, and all solve together.
        """
        return 1

    def partial_fit(self, features: Sequence[Tensor], images: Tensor, *, validation: bool = False) -> None:
        """Take in a batch for the closed-form solution."""

    def finalize_fit(self) -> list[str]:
        """Compute the closed-form solution; returns notes for the report."""
        return []

    @property
    def fit_bytes(self) -> int:
        """Memory that the closed form takes beside the decoder itself."""
        return 0

    def fit_macs(self, images: int) -> int:
        """Multiply-adds of the closed form on so many training images, those in float64 counted twice."""
        return 0
