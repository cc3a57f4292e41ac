"""Decoders of published autoencoders: `diffusers/FOLDER`, or a repository of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from afterimage.config import AfterimageError, split_provider, split_source, unknown
from afterimage.models.autoencoders import Autoencoder, FromLatents
from afterimage.models.decoders.own import OwnDecoder


class DiffusersDecoder(OwnDecoder):
    """The decoder of an autoencoder of diffusers, used without training.

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
                raise unknown(f"option of {self.name}", option, ("raw",))
        model, layer = split_source(self.spec.source)
        raw = options.get("raw", (split_provider(model)[0], layer) != ("diffusers", "latents"))
        if not isinstance(raw, bool):
            raise AfterimageError(f"raw of {self.name} must be true or false, got {raw!r}")
        found = Autoencoder.open(self.name)
        return FromLatents(found.load(found.find_weights()), raw, found.black)
