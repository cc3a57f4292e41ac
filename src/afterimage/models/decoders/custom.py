"""Decoders from outside this package: any module that turns a feature map into images, and published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afterimage.config import (
    AfterimageError,
    FeatureSpec,
    first_line,
    split_provider,
    split_source,
    unknown_choice_error,
)
from afterimage.models.autoencoders import Autoencoder, LatentDecoder
from afterimage.models.decoders.base import Decoder
from afterimage.models.factories import call_factory, source_digest

FAR, MAX_SHARE = 0.1, 0.05
"""Distance from [0, 1] beyond which values are counted, and share of such values above which a note says that they
were clamped."""


class CustomDecoder(Decoder):
    """A user's module as a decoder, from a feature map `(B, C, h, w)` to images `(B, 3, H, W)`.

    The module's images have values in [0, 1], or in the range that its attribute `image_range` gives, for
    example `(-1, 1)`. H and W are those of the canvas: of the image, or of the part that the map's cells
    cover (see `Canvas`). A module without trainable parameters is not trained: it is measured as given, and
    stays in evaluation mode.

    Args:
        specs: shape of the features; exactly one.
        image_size: height and width of the images in pixels.
        name: name for messages.
        options: keyword arguments of its factory.
    """

    channels_last = False  # foreign code may use views that this memory order does not allow

    def __init__(
        self,
        specs: Sequence[FeatureSpec],
        image_size: tuple[int, int],
        *,
        name: str,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(specs, image_size)
        self.name = name
        self._seed = self._values = self._outside = 0
        device = torch.empty(0).device
        with torch.device("cpu"):  # it may load weights, and is tried on the CPU
            self.module = self.build(options)
            self.trainable = any(parameter.requires_grad for parameter in self.module.parameters())
            self.low, self.high = _image_range(self.module, name)
            self.eval()
            self._try()
        self.train().to(device)

    @staticmethod
    def digest(name: str) -> str:
        """Return the SHA-256 that identifies the decoder's code."""
        return source_digest(name)

    def build(self, options: Mapping[str, Any]) -> nn.Module:
        """Call the factory with the features' shapes, the size of the images to return, and its options."""
        return call_factory(self.name, [self.spec], self.canvas.size, **options)

    def train(self, mode: bool = True) -> CustomDecoder:
        """Switch to training mode, unless the module has no trainable parameters."""
        if mode:
            self._values = self._outside = 0
        return super().train(mode and self.trainable)

    def feature_crops(self, generator: torch.Generator) -> list[None]:
        """Choose the whole map, and draw a seed for the module's step: a resumed run draws the same one."""
        self._seed = int(torch.randint(2**62, (1,), generator=generator))
        return [None]

    def decode(self, features: Tensor) -> Tensor:
        devices = [features.device] if features.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.training):
            if self.training:
                torch.manual_seed(self._seed)
            images = self.module(features.contiguous())
        expected = (len(features), 3, *self.canvas.size)
        if not isinstance(images, Tensor) or images.shape != expected or not images.is_floating_point():
            got = type(images).__name__
            if isinstance(images, Tensor):
                got = f"{tuple(images.shape)} of {images.dtype}"
                if images.ndim == 4 and images.shape[2:] != self.canvas.size:
                    height, width = images.shape[2:]
                    got += f"; a decoder of one size needs images of it, --size {height}x{width}"
            raise AfterimageError(
                f"{self.name} must return images {expected} of floats for features {tuple(features.shape)}, got {got}"
            )
        if (self.low, self.high) != (0, 1):
            images = (images - self.low) / (self.high - self.low)
        if not self.training:
            self._values += images.numel()
            self._outside += int((images.detach() - 0.5).abs().gt(0.5 + FAR).sum())
        return images

    @property
    def notes(self) -> list[str]:
        """A note if many values lay far outside [0, 1], as those of a module with another range do."""
        share = self._outside / max(1, self._values)
        if share <= MAX_SHARE:
            return []
        return [
            f"{share:.0%} of the values that {self.name} returned lay more than {FAR:g} outside [0, 1] and were "
            "clamped: if its images have another range, give it the attribute image_range, which is "
            f"({self.low:g}, {self.high:g}) now"
        ]

    @torch.no_grad()
    def _try(self) -> None:
        """Run the module on the features of two images, to report errors now rather than during training."""
        features = torch.randn(2, *self.spec.shape, generator=torch.Generator().manual_seed(0))
        try:
            images = self.decode(features)
        except AfterimageError:
            raise
        except Exception as error:
            raise AfterimageError(
                f"{self.name} fails on features {tuple(features.shape)} of {self.spec.source}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if not images.isfinite().all():
            raise AfterimageError(
                f"{self.name} returns values that are not finite for features {tuple(features.shape)} of "
                f"{self.spec.source}"
            )


class DiffusersDecoder(CustomDecoder):
    """The decoder of an autoencoder of diffusers, a folder or a repository of the hub, used without training.

    Its one option is `raw`: true if the features are not normalised like the autoencoder's latents, so that
    they are normalised first. The default is false for the layer `latents` of an encoder of diffusers, and
    true for all others.
    """

    trainable = False

    @staticmethod
    def digest(name: str) -> str:
        return Autoencoder.open(name).find_weights().sha256

    def build(self, options: Mapping[str, Any]) -> nn.Module:
        for option in options:
            if option != "raw":
                raise unknown_choice_error(f"option of {self.name}", option, ("raw",))
        model, layer = split_source(self.spec.source)
        raw = options.get("raw", (split_provider(model)[0], layer) != ("diffusers", "latents"))
        if not isinstance(raw, bool):
            raise AfterimageError(f"raw of {self.name} must be true or false, got {raw!r}")
        autoencoder = Autoencoder.open(self.name)
        return LatentDecoder(autoencoder.load(autoencoder.find_weights()), raw)


def _image_range(module: nn.Module, name: str) -> tuple[float, float]:
    given = getattr(module, "image_range", (0.0, 1.0))
    try:
        low, high = map(float, given)
        if not -float("inf") < low < high < float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        raise AfterimageError(
            f"the attribute image_range of {name} must be two numbers, the values of black and of white, got {given!r}"
        ) from None
    return low, high
