"""Where encoders come from: one library of networks a file, and one function that opens a network by its name."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from afterimage.config import NATIVE, AfterimageError, DataConfig, size_text, split_provider, split_source
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


def at_native_size(data: DataConfig, sources: Sequence[str]) -> DataConfig:
    """Return settings of images whose crops, where `native` is asked for, have the size that networks are for.

    Args:
        data: the settings
        sources: `[provider/]model:layer` each

    Raises:
        AfterimageError: the networks are for images of different sizes
    """
    if data.crop != NATIVE:
        return data
    models = dict.fromkeys(split_source(source)[0] for source in sources)
    sizes = {model: size_text(open_network(model).native_size) for model in models}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{model} is for {size}" for model, size in sizes.items())
        raise AfterimageError(
            f"the native sizes differ: {told}; give one size, such as {max(sizes.values())}"
        )
    return data.sized(next(iter(sizes.values())))
