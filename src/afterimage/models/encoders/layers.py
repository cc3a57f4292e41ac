"""List the layers of a model that can be inverted, as measured on images of one size."""

from __future__ import annotations

from collections.abc import Sequence

from afterimage.config import size_pair, split_source
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.tracing import cannot_run, trace
from afterimage.runs.results import FeatureMap


def list_layers(
    model: str, image_size: int | Sequence[int] | None = None, *, every: bool = False
) -> list[FeatureMap]:
    """List the layers of a model that can be inverted, in order of execution. No weights are needed.

    Args:
        model: `[provider/]model`
        image_size: side of the images in pixels, or `(height, width)`; 224 by default
        every: whether to list every module that returns a feature map, not only stages and blocks

    Raises:
        AfterimageError: the model is unknown or cannot run on images of that size
    """
    size = size_pair(224 if image_size is None else image_size)
    traced = trace(open_network(model), size)
    if not traced.layers:
        raise cannot_run(traced.network, size, traced.failure or "no module returns a feature map")
    names = traced.by_order if every else traced.names or traced.by_order
    return [traced.layer(name).feature_map(f"{traced.network.name}:{name}", size) for name in names]


def list_named(model: str, image_size: int | Sequence[int] | None = None) -> list[FeatureMap]:
    """List the layers that a model has by role (`ROLES`), except roles that are also module paths.

    Args:
        model: `[provider/]model`
        image_size: side of the images in pixels, or `(height, width)`; 224 by default
    """
    traced = trace(open_network(model), size_pair(224 if image_size is None else image_size))
    names = [name for name in traced.named if name not in traced.modules]
    return [
        traced.layer(name).feature_map(f"{traced.network.name}:{name}", traced.image_size) for name in names
    ]


def early_end(model: str, image_size: int | Sequence[int] | None = None) -> str:
    """Explain why a model stopped before all its layers could be listed, and which image size works.

    Args:
        model: `[provider/]model`
        image_size: side of the images in pixels, or `(height, width)`; 224 by default

    Returns:
        the explanation; empty if the model did not stop
    """
    return trace(open_network(model), size_pair(224 if image_size is None else image_size)).early_end


def layer_info(source: str, image_size: int | Sequence[int] = 224) -> FeatureMap:
    """Describe one layer, `model:layer`, which may be any module that returns a feature map.

    Args:
        source: `[provider/]model:layer`
        image_size: side of the images in pixels, or `(height, width)`

    Raises:
        AfterimageError: the model or layer is unknown, or the layer's output is not a feature map
    """
    model, layer = split_source(source)
    size = size_pair(image_size)
    traced = trace(open_network(model), size)
    return traced.layer(layer).feature_map(f"{traced.network.name}:{layer}", size)
