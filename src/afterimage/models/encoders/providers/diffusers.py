"""Encoders of published autoencoders: `diffusers/FOLDER:latents`, or a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from afterimage.config import AfterimageError, absolute_model, join_names
from afterimage.models.autoencoders import Autoencoder, LatentEncoder
from afterimage.models.encoders.providers.base import Network
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.weights import Weights


@dataclass(frozen=True)
class DiffusersNetwork(Network):
    """The encoder of an autoencoder of diffusers; its layer `latents` is the input of a diffusion model.

    Attributes:
        autoencoder: description of the whole autoencoder
    """

    # Those in the towers of representation autoencoders.
    blocks = (
        "autoencoder.encoder.encoder.layer",
        "autoencoder.encoder.encoder.layers",
        "autoencoder.encoder.vision_model.encoder.layers",
    )
    autoencoder: Autoencoder | None = field(default=None, repr=False)

    @classmethod
    def open(cls, name: str) -> DiffusersNetwork:
        name = absolute_model(f"diffusers/{name}")
        found = Autoencoder.open(name)
        mean, std = (0.0, 1.0) if found.normalises else (0.5, 0.5)
        size = (found.image_size, found.image_size)
        return cls(name, (mean,) * 3, (std,) * 3, size, autoencoder=found)

    def build(self, image_size: Size) -> nn.Module:
        return LatentEncoder(self.autoencoder.create())

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        return self.autoencoder.find_weights(weights)

    def load(
        self, image_size: Size, weights: Weights, used: Sequence[tuple[str, ...]]
    ) -> tuple[nn.Module, str]:
        module = LatentEncoder(self.autoencoder.load(weights)).eval()
        state = module.state_dict()
        broken = [names[0] for names in used if not state[names[0]].isfinite().all()]
        if broken:
            raise AfterimageError(f"{weights.file} holds values that are not finite, in {join_names(broken)}")
        return module, ""

    def aliases(self, module: nn.Module) -> dict[str, str]:
        return super().aliases(module) | {"latents": "latents"}
