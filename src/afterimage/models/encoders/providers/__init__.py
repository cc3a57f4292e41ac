"""Sources of networks: one library per file, and a function that opens a network by its name."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from afterimage.config import NATIVE, AfterimageError, DataConfig, size_text, split_provider, split_source
from afterimage.models.encoders.providers.base import Network
from afterimage.models.encoders.providers.diffusers import DiffusersNetwork
from afterimage.models.encoders.providers.open_clip import OpenClipNetwork
from afterimage.models.encoders.providers.python import CustomNetwork
from afterimage.models.encoders.providers.timm import TimmNetwork
from afterimage.models.encoders.providers.torchvision import TorchvisionNetwork
from afterimage.models.encoders.providers.transformers import TransformersNetwork

NETWORKS: dict[str, type[Network]] = {
    "timm": TimmNetwork,
    "torchvision": TorchvisionNetwork,
    "transformers": TransformersNetwork,
    "open_clip": OpenClipNetwork,
    "diffusers": DiffusersNetwork,
    "python": CustomNetwork,
}
"""Network class of each provider; `config.PROVIDERS` lists the providers without importing torch."""


@functools.lru_cache(maxsize=32)
def open_network(model: str) -> Network:
    """Open a network by its name.

    Args:
        model: `[provider/]model`; without a provider, a model of timm

    Raises:
        AfterimageError: the provider does not have the model, or is not installed
    """
    provider, name = split_provider(model.strip())
    if not name:
        raise AfterimageError(f"{model!r} names no model; write {provider}/MODEL")
    return NETWORKS[provider].open(name)


def resolve_source(source: str) -> str:
    """Pin the tag of the weights in `[provider/]model:layer`: `vgg16:block1` becomes `vgg16.tv_in1k:block1`.

    The layer is not checked until it is measured.

    Raises:
        AfterimageError: the provider does not have the model or the tag
    """
    model, layer = split_source(source.strip())
    return f"{open_network(model).name}:{layer}"


def at_native_size(data: DataConfig, sources: Sequence[str]) -> DataConfig:
    """Return data settings with the networks' native image size if the crop is `native`.

    Args:
        data: the settings
        sources: names `[provider/]model:layer`

    Raises:
        AfterimageError: the networks have different native sizes
    """
    if data.crop != NATIVE:
        return data
    models = dict.fromkeys(split_source(source)[0] for source in sources)
    sizes = {model: size_text(open_network(model).native_size) for model in models}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{model} is for {size}" for model, size in sizes.items())
        raise AfterimageError(
            f"the native sizes differ: {listed}; give one size, such as {max(sizes.values())}"
        )
    return data.with_size(next(iter(sizes.values())))
