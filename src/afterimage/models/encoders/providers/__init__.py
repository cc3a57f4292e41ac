"""Where encoders come from: one library of networks a file, and one function that opens a network by its name."""

from __future__ import annotations

import functools

from afterimage.config import AfterimageError, split_provider, split_source
from afterimage.models.encoders.providers.base import Network
from afterimage.models.encoders.providers.diffusers import DiffusersNetwork
from afterimage.models.encoders.providers.open_clip import OpenClipNetwork
from afterimage.models.encoders.providers.python import OwnNetwork
from afterimage.models.encoders.providers.timm import TimmNetwork
from afterimage.models.encoders.providers.torchvision import TorchvisionNetwork
from afterimage.models.encoders.providers.transformers import TransformersNetwork

NETWORKS: dict[str, type[Network]] = {
    "timm": TimmNetwork,
    "torchvision": TorchvisionNetwork,
    "transformers": TransformersNetwork,
    "open_clip": OpenClipNetwork,
    "diffusers": DiffusersNetwork,
    "python": OwnNetwork,
}
"""The networks of each provider; `config.PROVIDERS` names them, without torch."""


@functools.lru_cache(maxsize=32)
def open_network(model: str) -> Network:
    """Find a network by its name.

    Args:
        model: `[provider/]model`; timm's where no provider is named

    Raises:
        AfterimageError: the provider does not know the model, or is not installed
    """
    provider, name = split_provider(model.strip())
    if not name:
        raise AfterimageError(f"{model!r} names no model; write {provider}/MODEL")
    return NETWORKS[provider].open(name)


def resolve(source: str) -> str:
    """Pin the tag of the weights in `[provider/]model:layer`: `vgg16:block1` becomes `vgg16.tv_in1k:block1`.

    The layer is not checked; that happens when it is measured.

    Raises:
        AfterimageError: the provider does not know the model or the tag
    """
    model, layer = split_source(source.strip())
    return f"{open_network(model).name}:{layer}"
