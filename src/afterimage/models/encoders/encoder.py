"""Encoder: any timm model, frozen, normalising inside, run only as deep as the deepest layer asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, FeatureSpec, split_source
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
    """Keeps one layer's feature map; the last one ends the pass."""

    def __init__(
        self, features: list, index: int, tap: TracedLayer, roll: Callable | None, *, last: bool
    ) -> None:
        self.features, self.index, self.layout, self.roll = features, index, tap.layout, roll
        self.copy = tap.overwritten and not last
        self.last = last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.roll is not None:
            output = self.roll(output)
        feature = self.layout(output)
        self.features[self.index] = feature.clone() if self.copy else feature
        if self.last:
            raise _Done


class Encoder(Frozen):
    """The features of one or more layers of a frozen timm model, on images in [0, 1].

    `Encoder("resnet34.tv_in1k:layer1")`, or `Encoder("resnet34", layers=["layer1", "layer2"])`: several
    layers cost one pass. `weights` is `pretrained` (see `weights.find_weights`), `random` (drawn from `seed`,
    every block acts: see `random_init`), `random-init` (the same draw as timm leaves it), or a path to a file
    or folder. The model keeps its own mean and std, stays in eval mode and never
    requires gradients; parameters and buffers that the layers in use do not read are dropped.

    Attributes:
        model_name: timm's name, with the tag of the weights
        sources: `model:layer` for each layer, as it was written, with the tag pinned
        specs: the measured shape of each layer's features
        weights: where the weights come from
        notes: what is to be said of them in a run's notes

    Raises:
        AfterimageError: unknown model or layer, a layer that is no feature map, an image size at which the
            model cannot run, or weights that are missing or do not fit.
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
        self._taps = [traced.tap(layer) for layer in layers]
        self.sources = tuple(f"{self.model_name}:{layer}" for layer in layers)
        self.specs = tuple(
            FeatureSpec(
                source,
                tap.layout.channels,
                tap.layout.height,
                tap.layout.width,
                tap.placement.rows,
                tap.placement.columns,
            )
            for source, tap in zip(self.sources, self._taps, strict=True)
        )
        used = traced.used(self._taps)
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
            if parameter.ndim == 4:  # the whole model's `to` refuses one that also has 3D convolutions
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.requires_grad_(False).train(False)
        config = pretrained_config(self.model_name)
        for name, default in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            values = torch.tensor(config.get(name, default), dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self._features: list[Tensor | None] = [None] * len(layers)
        deepest = max(range(len(layers)), key=lambda i: (self._taps[i].order, i))
        for index, tap in enumerate(self._taps):
            hook = _Hook(self._features, index, tap, reorder(self.model, tap.module), last=index == deepest)
            self.model.get_submodule(tap.module).register_forward_hook(hook)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch channels h w"]]:
        """Feature maps of images in [0, 1], one `(B, C, h, w)` a layer, in the order of `sources`.

        Without gradients, unless inside `gradients()`. Raises AfterimageError for images of another size.
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
        raise RuntimeError(f"{self.model_name} ended before {self._taps[-1].module} ran")

    def describe(self) -> list[FeatureMap]:
        """Per layer: source, module, shape, reduction, order of execution, cost up to there, and placement."""
        return [
            FeatureMap(
                **vars(spec),
                module=tap.module,
                order=tap.order,
                reduction=self.image_size[0] / spec.height,
                encoder_parameters=tap.parameters,
                encoder_macs=tap.macs,
                unseen=tap.placement.unseen,
            )
            for spec, tap in zip(self.specs, self._taps, strict=True)
        ]

    def extra_repr(self) -> str:
        return ", ".join(f"{s.source} {s.channels}x{s.height}x{s.width}" for s in self.specs)


def _drop(model: nn.Module, used: set[str]) -> None:
    """Let go of every parameter and buffer that is not used: none of them is moved, stored or counted."""
    for key in model.state_dict().keys() - used:
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        kept = module._parameters if name in module._parameters else module._buffers
        kept[name] = None
