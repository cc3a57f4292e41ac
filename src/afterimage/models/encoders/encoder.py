"""The encoder of timm models: frozen, normalises images itself, and runs only as deep as its deepest layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, split_source
from afterimage.models.encoders.base import Frozen, size_pair
from afterimage.models.encoders.providers.timm import (
    create_loaded,
    create_random,
    pretrained_config,
    resolve_model,
)
from afterimage.models.encoders.tensor_layout import reorder
from afterimage.models.encoders.tracing import TracedLayer, trace
from afterimage.models.weight_files import read_named_tensors
from afterimage.models.weights import find_weights, random_weights, weight_notes
from afterimage.runs.results import FeatureMap


class _Done(Exception):
    """Ends a forward pass once the deepest layer has run."""


class _Hook:
    """Stores one layer's feature map; the hook of the deepest layer ends the pass."""

    def __init__(
        self, features: list, index: int, layer: TracedLayer, roll: Callable | None, *, last: bool
    ) -> None:
        self.features, self.index, self.layout, self.roll = features, index, layer.layout, roll
        self.copy = layer.overwritten and not last
        self.last = last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.roll is not None:
            output = self.roll(output)
        feature = self.layout(output)
        self.features[self.index] = feature.clone() if self.copy else feature
        if self.last:
            raise _Done


class Encoder(Frozen):
    """The features of one or more layers of a frozen timm model, for images in [0, 1].

    `Encoder("resnet34.tv_in1k:layer1")` has one layer, `Encoder("resnet34", layers=["layer1", "layer2"])` has
    two in one pass. The model normalises images by its own mean and std, stays in evaluation mode and never
    requires gradients. Parameters and buffers that the layers do not read are dropped.

    Args:
        source: `model:layer`, or the model's name if `layers` is given
        layers: names of the layers
        weights: `pretrained` (see `find_weights`), `random` (drawn from `seed`, with acting blocks, see
            `open_branches`), `random-init` (the same draw as timm leaves it), or the path of a file or folder
        image_size: side of the images in pixels, or `(height, width)`
        seed: seed of random weights

    Attributes:
        model_name: timm's name, with the tag of the weights
        sources: `model:layer` for each layer, as written, with the tag pinned
        specs: measured shape of each layer's features
        weights: origin of the weights
        notes: remarks on the weights, for a run's notes

    Raises:
        AfterimageError: the model or a layer is unknown, a layer is not a feature map, the model cannot run on
            images of this size, or weights are missing or do not fit
    """

    def __init__(
        self,
        source: str,
        layers: Sequence[str] | None = None,
        *,
        weights: str | Path = "pretrained",
        image_size: int | tuple[int, int] = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if layers is None:
            source, layer = split_source(source)
            layers = [layer]
        elif isinstance(layers, str) or not layers:
            raise AfterimageError(f"layers must be a list of one layer or more, got {layers!r}")
        self.model_name = resolve_model(source)
        self.image_size = size_pair(image_size)
        traced = trace(self.model_name, self.image_size)
        self._layers = [traced.layer(layer) for layer in layers]
        self.sources = tuple(f"{self.model_name}:{layer}" for layer in layers)
        pairs = zip(self.sources, self._layers, strict=True)
        self._maps = [layer.feature_map(source, self.image_size) for source, layer in pairs]
        self.specs = tuple(found.spec for found in self._maps)
        used = traced.used(self._layers)
        if str(weights) in RANDOM_WEIGHTS:
            self.weights = random_weights(self.model_name, str(weights), seed)
            self.model = create_random(self.model_name, self.image_size, seed, str(weights))
        else:
            self.weights = find_weights(self.model_name, weights)
            file = read_named_tensors(self.weights.file)
            self.model, note = create_loaded(self.model_name, self.image_size, file, used)
            self.weights = replace(self.weights, note=note)
        self.notes = tuple(weight_notes([self.weights.used]))
        _drop(self.model, {name for names in used for name in names})
        for parameter in self.model.parameters():
            if parameter.ndim == 4:  # `to` on the whole model refuses models with 3D convolutions
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.requires_grad_(False).train(False)
        config = pretrained_config(self.model_name)
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.tensor(config.get(name, default), dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self._features: list[Tensor | None] = [None] * len(layers)
        deepest = max(range(len(layers)), key=lambda i: (self._layers[i].order, i))
        for index, layer in enumerate(self._layers):
            hook = _Hook(
                self._features, index, layer, reorder(self.model, layer.module), last=index == deepest
            )
            self.model.get_submodule(layer.module).register_forward_hook(hook)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch channels h w"]]:
        """Compute the feature maps `(B, C, h, w)` of images in [0, 1], one for each of `sources`.

        Features have no gradients outside `gradients()`.

        Raises:
            AfterimageError: the images have another size or are not floats
        """
        if images.ndim != 4 or images.shape[1:] != (3, *self.image_size) or not images.is_floating_point():
            height, width = self.image_size
            raise AfterimageError(
                f"{self.model_name} was built for images (B, 3, {height}, {width}) of floats in [0, 1], "
                f"got {tuple(images.shape)} of {images.dtype}"
            )
        try:
            with torch.set_grad_enabled(self._gradients and torch.is_grad_enabled()):
                inputs = (images - self.mean) / self.std
                self.model(inputs.contiguous(memory_format=torch.channels_last))
        except _Done:
            return list(self._features)
        finally:
            self._features[:] = [None] * len(self._features)
        raise RuntimeError(f"{self.model_name} ended before {self._layers[-1].module} ran")

    def describe(self) -> list[FeatureMap]:
        """Describe each layer: module, shape, reduction, cost up to there, and the positions of its locations."""
        return list(self._maps)

    def extra_repr(self) -> str:
        return ", ".join(f"{s.source} {s.channels}x{s.height}x{s.width}" for s in self.specs)


def _drop(model: nn.Module, used: set[str]) -> None:
    """Drop every parameter and buffer that is not in `used`, so that none is moved, stored or counted."""
    for key in model.state_dict().keys() - used:
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        kept = module._parameters if name in module._parameters else module._buffers
        kept[name] = None
