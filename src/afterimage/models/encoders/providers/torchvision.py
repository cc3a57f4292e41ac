"""Networks of torchvision: `torchvision/resnet50.IMAGENET1K_V2`, or without a tag for the default weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from afterimage.config import unknown_choice_error
from afterimage.models.encoders.providers.base import Convert, Network, vgg_pool_aliases
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.weights import Weights, search_weights


@dataclass(frozen=True)
class TorchvisionNetwork(Network):
    """A network of torchvision that classifies or segments images.

    Attributes:
        builder: torchvision's name of the network
        entry: torchvision's entry of the weights; None if none are published
    """

    channels_last = True
    blocks = ("encoder.layers",)
    builder: str = ""
    entry: Any = None

    @classmethod
    def open(cls, name: str) -> TorchvisionNetwork:
        """Return the description of a network by torchvision's name, with or without the name of its weights.

        Raises:
            AfterimageError: torchvision does not have the network or the weights
        """
        builder, _, tag = name.partition(".")
        known = [*models.list_models(module=models), *models.list_models(module=models.segmentation)]
        if builder not in known:
            raise unknown_choice_error("torchvision model", builder, known)
        entries = models.get_model_weights(builder)
        if tag and tag not in entries.__members__:
            raise unknown_choice_error(
                f"weights' tag of torchvision/{builder}", tag, list(entries.__members__)
            )
        entry = entries[tag or "DEFAULT"]
        recipe = entry.transforms()
        side = (getattr(recipe, "crop_size", None) or recipe.resize_size)[0]
        return cls(
            f"torchvision/{builder}.{entry.name}",
            tuple(recipe.mean),
            tuple(recipe.std),
            (side, side),
            has_fixed_size=builder.startswith(("vit_", "maxvit_")),
            classifiers=("fc", "classifier", "head", "heads", "aux_classifier", "AuxLogits", "aux1", "aux2"),
            builder=builder,
            entry=entry,
        )

    def build(self, image_size: Size) -> nn.Module:
        options: dict[str, Any] = {}
        if self.builder.startswith("vit_"):
            if image_size[0] != image_size[1]:
                raise ValueError("it takes square images only")
            options = {"image_size": image_size[0]}
        elif self.builder.startswith("maxvit_"):
            options = {"input_size": image_size}
        elif self.builder in ("googlenet", "inception_v3"):
            # The published weights expect images normalised to [-1, 1], which the network then computes
            # itself.
            options = {"transform_input": True, "init_weights": True}
        elif self.builder in models.list_models(module=models.segmentation):
            options = {"weights_backbone": None}
        return models.get_model(self.builder, weights=None, **options)

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        stems = [f"{self.builder}.{self.entry.name}"]
        if self.entry.name == "IMAGENET1K_V1":
            stems.append(f"{self.builder}.torchvision")
        return search_weights(self.name, weights, stems, url=self.entry.url)

    def convert(self, module: nn.Module, image_size: Size) -> Convert | None:
        if not self.builder.startswith("vit_"):
            return None
        return functools.partial(interpolate_embeddings, image_size[0], module.patch_size)

    def aliases(self, module: nn.Module) -> dict[str, str]:
        """Return names `block1` and on for VGG's pooled outputs, or `block0` and on for a ViT's blocks."""
        if self.builder.startswith("vgg"):
            return vgg_pool_aliases(module)
        return super().aliases(module)
