"""The encoder: a frozen network that normalises images itself and runs only as deep as its deepest layer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import RANDOM_WEIGHTS, AfterimageError, size_pair, split_source
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.providers.python import CustomNetwork
from afterimage.models.encoders.tensor_layout import reorder
from afterimage.models.encoders.tracing import Trace, trace
from afterimage.models.weights import Weights, weight_notes
from afterimage.runs.results import FeatureMap

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance of ITU-R BT.601, as in Pillow's conversion to grey."""


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images for a network.

    Args:
        images: `(B, 3, H, W)` in [0, 1]
        mean: means `(1, C, 1, 1)`; if C is 1, images are first converted to their luminance
        std: standard deviations of the same shape
    """
    if mean.shape[1] == 1:
        shares = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        images = (images * shares).sum(1, keepdim=True)
    return (images - mean) / std


class _StopForward(Exception):
    """Exception that ends a forward pass once the deepest layer has run."""


class Encoder(nn.Module):
    """Features of one or more layers of a frozen network, for images in [0, 1].

    `Encoder("resnet34.tv_in1k:layer1")` has one layer, `Encoder("resnet34", layers=["layer1", "layer2"])` has
    two in one pass. The network normalises images with its own mean and std, stays in evaluation mode and
    never requires gradients. Parameters and buffers that the layers do not read are dropped.

    A layer is named by a module's path or its short name, or by `output` for the output of the network. If
    that output has several tensors, brackets select one: `output[features]`, `neck[0]`. Shapes, the order of
    axes (NCHW, NHWC, tokens, vectors), prefix tokens and the positions of locations are measured.

    Args:
        source: `[provider/]model:layer`, or the model's name if `layers` is given, or an `nn.Module`, whose
            attributes `mean`, `std` and `prefix_tokens` are used (see `CustomNetwork`)
        layers: names of the layers
        weights: `pretrained` (see `search_weights`), `random` (drawn from `seed`, with acting blocks, see
            `open_branches`), `random-init` (the same draw without opening branches), or the path of a file or
            folder
        image_size: side of the images in pixels, or `(height, width)`
        seed: seed of random weights

    Attributes:
        network: the network as its provider describes it
        model_name: name of the network, with the tag of the weights
        sources: `model:layer` for each layer as given, with the tag pinned
        specs: measured shape of each layer's features
        weights: origin of the weights
        input_notes: notes on how images reach the network, and how its features vary
        notes: `input_notes` and notes on the weights, for a run's result

    Raises:
        AfterimageError: the model or a layer is unknown, a layer is neither feature map nor vector, the model
            cannot run on images of this size, or weights are missing or do not fit
    """

    def __init__(
        self,
        source: str | nn.Module,
        layers: Sequence[str] | None = None,
        *,
        weights: str | Path = "pretrained",
        image_size: int | tuple[int, int] = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._gradients = False  # features have gradients with respect to the images inside `gradients()`
        if layers is None and isinstance(source, str):
            source, layer = split_source(source)
            layers = [layer]
        elif isinstance(layers, str) or not layers:
            raise AfterimageError(f"layers must be a list of one layer or more, got {layers!r}")
        self.network = open_network(source) if isinstance(source, str) else CustomNetwork.of(source)
        self.model_name = self.network.name
        self.image_size = size_pair(image_size)
        # The trace of an `nn.Module` object is not cached, so that the cache does not keep the module alive.
        traced = (trace if isinstance(source, str) else Trace)(self.network, self.image_size)
        self._layers = [traced.layer(layer) for layer in layers]
        self.sources = tuple(f"{self.model_name}:{layer}" for layer in layers)
        pairs = zip(self.sources, self._layers, strict=True)
        self._maps = [layer.feature_map(source, self.image_size) for source, layer in pairs]
        self.specs = tuple(entry.spec for entry in self._maps)
        used = traced.tensors_read_by(self._layers)
        if str(weights) in RANDOM_WEIGHTS:
            found, note = Weights(self.model_name, str(weights), f"seed {seed}"), ""
            self.model = traced.create_random(seed, str(weights))
        else:
            found = self.network.find_weights(weights)
            self.model, note = self.network.load(self.image_size, found, used)
        self.weights = replace(found, note=note, code=self.network.code)
        if not self.network.is_custom:
            _drop(self.model, {name for names in used for name in names})
        if self.network.channels_last:
            for parameter in self.model.parameters():
                if parameter.ndim == 4:  # `to` on the whole model refuses models with 3D convolutions
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.requires_grad_(False).train(False)
        for name, values in (("mean", self.network.mean), ("std", self.network.std)):
            values = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self._features: list[Tensor | None] = [None] * len(layers)
        deepest = max(range(len(layers)), key=lambda i: (self._layers[i].order, i))
        for index, layer in enumerate(self._layers):
            roll = reorder(self.model, layer.module)
            hook = functools.partial(self._store, index, roll, index == deepest)
            self.model.get_submodule(layer.module).register_forward_hook(hook)
        self.input_notes = self.network.input_notes
        if self.network.is_custom:
            self.input_notes += tuple(self._try())
        self.notes = (*weight_notes([self.weights.record]), *self.input_notes)

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Enable gradients of the features with respect to the images in this block."""
        before, self._gradients = self._gradients, True
        try:
            yield
        finally:
            self._gradients = before

    def train(self, mode: bool = True) -> Encoder:
        """Stay in evaluation mode, including the batch norms."""
        return super().train(False)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch channels h w"]]:
        """Compute the feature maps `(B, C, h, w)` of images in [0, 1], one for each of `sources`.

        Features have no gradients outside `gradients()`.

        Raises:
            AfterimageError: the images have another size or are not floats, or a user's network returns
                features of another shape than before or that are not finite
        """
        if images.ndim != 4 or images.shape[1:] != (3, *self.image_size) or not images.is_floating_point():
            height, width = self.image_size
            raise AfterimageError(
                f"{self.model_name} was built for images (B, 3, {height}, {width}) of floats in [0, 1], "
                f"got {tuple(images.shape)} of {images.dtype}"
            )
        try:
            with (
                torch.set_grad_enabled(self._gradients and torch.is_grad_enabled()),
                contextlib.suppress(_StopForward),
            ):
                # Not in place, so that a network that writes into its input cannot change the images.
                inputs = normalise(images, self.mean, self.std)
                if self.network.channels_last:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                self.model(inputs)
            features = list(self._features)
        finally:
            self._features[:] = [None] * len(self._features)
        for spec, feature in zip(self.specs, features, strict=True):
            if feature is None:
                raise RuntimeError(f"{spec.source} did not run")
            if self.network.is_custom:
                expected = (len(images), *spec.shape)
                if tuple(feature.shape) != expected:
                    raise AfterimageError(
                        f"{spec.source} returned {tuple(feature.shape)} where {expected} was measured before"
                    )
                if not feature.isfinite().all():
                    raise AfterimageError(f"{spec.source} returns values that are not finite")
        return features

    def _store(
        self, index: int, roll: Callable | None, last: bool, module: nn.Module, args: Any, output: Any
    ) -> None:
        """Store the feature map of a layer, as its module's hook; that of the deepest layer also ends the pass."""
        try:
            feature = self._layers[index].layout(output if roll is None else roll(output))
        except (KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            raise AfterimageError(
                f"the network returned an output of another structure than when it was traced: {error}"
            ) from error
        if last:
            self._features[index] = feature
            raise _StopForward
        self._features[index] = feature.clone()  # the network may change it in place later in this pass

    @torch.no_grad()
    def _try(self) -> list[str]:
        """Run a user's network on two images; return a note if its features vary between passes or batches."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, *self.image_size, generator=generator)
        once, again, alone = self(images), self(images), self(images[:1])
        if any(not torch.equal(a, b) for a, b in zip(once, again, strict=True)):
            return [f"the features of {self.model_name} differ from one pass to the next on equal images"]
        if all(torch.allclose(a[:1], b, rtol=1e-3, atol=1e-4) for a, b in zip(once, alone, strict=True)):
            return []
        return [f"an image's features in {self.model_name} depend on the others in its batch"]

    def describe(self) -> list[FeatureMap]:
        """Describe each layer: module, shape, reduction, cost up to there, and positions of its locations."""
        return list(self._maps)


def _drop(model: nn.Module, used: set[str]) -> None:
    """Drop every parameter and buffer that is not in `used`, so that it is not moved, stored or counted."""
    for key in model.state_dict().keys() - used:
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        registry = module._parameters if name in module._parameters else module._buffers
        registry[name] = None
