"""Checks that stop a run whose numbers would be wrong: a woken encoder, an image out of range, a NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afterimage.config import AfterimageError
from afterimage.evaluation.metrics import problem


def check_frozen(encoders: nn.Module) -> None:
    """Raise `AfterimageError` where a part of the encoders is in training mode or takes gradients."""
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
    """Raise `AfterimageError` naming the image whose values are not finite or leave [0, 1]."""
    if found := problem(images):
        raise AfterimageError(f"image {ids[found[0]]} {found[1]}")


class FeatureWatch:
    """Looks for values that are not finite in feature maps, and remembers of which source and image.

    On a CPU at once; on other devices when `settle` is called, so that steps need not wait.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self._found: dict[int, str] = {}
        self._pending: list[tuple[Tensor, Sequence[str]]] = []

    def look(self, features: Sequence[Tensor], ids: Sequence[str]) -> None:
        """Look at maps `(B, C, h, w)`, one a source, of the images `ids`."""
        finite = [maps.sum((1, 2, 3), dtype=torch.float32).isfinite() for maps in features]
        self._pending.append((torch.stack(finite), ids))
        if finite[0].device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        for finite, ids in self._pending:
            for source, image in finite.logical_not().nonzero().tolist():
                self._found.setdefault(source, ids[image])
        self._pending.clear()

    def check(self, name: str, feature_indices: Sequence[int]) -> None:
        """Raise `AfterimageError` for the run `name` where one of its sources was found not finite."""
        for source in feature_indices:
            if source in self._found:
                raise AfterimageError(
                    f"{name}: the features of {self.sources[source]} are not finite for image "
                    f"{self._found[source]}"
                )
