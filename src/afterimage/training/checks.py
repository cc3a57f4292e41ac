"""Checks that stop a run before it produces wrong numbers: encoders not frozen, images out of range, NaN features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afterimage.config import AfterimageError
from afterimage.evaluation.metrics import problem


def check_frozen(encoders: nn.Module) -> None:
    """Check that encoders are in evaluation mode and take no gradients.

    Raises:
        AfterimageError: a module or parameter is not frozen; the message names it
    """
    for name, module in encoders.named_modules():
        container = module is encoders or isinstance(module, nn.ModuleList)
        if module.training and not container:
            raise AfterimageError(
                f"the encoder's {name} is in training mode: its batch statistics would change with every "
                "image, and with them all scores"
            )
    for name, parameter in encoders.named_parameters():
        if parameter.requires_grad:
            raise AfterimageError(f"the encoder's parameter {name} takes gradients, but encoders stay frozen")


def check_images(images: Tensor, ids: Sequence[str]) -> None:
    """Check that images are finite and lie in [0, 1].

    Args:
        images: `(B, 3, H, W)`
        ids: ids of the images

    Raises:
        AfterimageError: an image has other values; the message names it
    """
    if found := problem(images):
        raise AfterimageError(f"image {ids[found[0]]} {found[1]}")


class FeatureWatch:
    """Record of feature maps with values that are not finite: for each source, the first image with such values.

    On a CPU feature maps are examined at once, on other devices when `settle` is called, so that steps need not wait.

    Args:
        sources: names of the feature maps
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self._found: dict[int, str] = {}
        self._pending: list[tuple[Tensor, Sequence[str]]] = []

    def look(self, features: Sequence[Tensor], ids: Sequence[str]) -> None:
        """Examine the feature maps of a batch.

        Args:
            features: `(B, C, h, w)` for each source
            ids: ids of the images
        """
        finite = [maps.sum((1, 2, 3), dtype=torch.float32).isfinite() for maps in features]
        self._pending.append((torch.stack(finite), ids))
        if finite[0].device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Wait for the device, and record the findings in all batches since the last call."""
        for finite, ids in self._pending:
            for source, image in finite.logical_not().nonzero().tolist():
                self._found.setdefault(source, ids[image])
        self._pending.clear()

    def check(self, name: str, feature_indices: Sequence[int]) -> None:
        """Check that all values of a run's feature maps have been finite so far.

        Args:
            name: name of the run, for the error
            feature_indices: indices of its sources

        Raises:
            AfterimageError: a value was not finite; the message names source and image
        """
        for source in feature_indices:
            if source in self._found:
                raise AfterimageError(
                    f"{name}: the features of {self.sources[source]} are not finite for image "
                    f"{self._found[source]}"
                )
