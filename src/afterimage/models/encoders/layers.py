"""List the layers of a model that can be inverted, measured on images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afterimage.config import Axis, split_source
from afterimage.models.encoders.base import size_pair
from afterimage.models.encoders.providers.timm import resolve_model
from afterimage.models.encoders.tracing import TracedLayer, cannot_run, trace


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be inverted, and the cost of the encoder up to it.

    Attributes:
        name: name of the layer
        module: path of its module
        channels: number of channels
        height: locations from top to bottom
        width: locations from left to right
        reduction: the image's height over the features'
        locations: number of locations
        values_per_pixel_value: feature values over the image's values, so that 1 preserves their number
        order: number of modules that finish before it
        encoder_parameters: parameters of the encoder up to there
        encoder_macs: multiply-adds of the encoder up to there, for one image
        rows: vertical positions of the locations; None if they divide the image evenly and see every pixel
        columns: horizontal positions, likewise
        unseen: the pixels that no location sees, or why positions are unknown; empty if neither applies
    """

    name: str
    module: str
    channels: int
    height: int
    width: int
    reduction: int | float
    locations: int
    values_per_pixel_value: float
    order: int
    encoder_parameters: int
    encoder_macs: int
    rows: Axis | None = None
    columns: Axis | None = None
    unseen: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width


def _info(name: str, layer: TracedLayer, size: Sequence[int]) -> LayerInfo:
    layout, (height, width) = layer.layout, size
    reduction = height / layout.height
    return LayerInfo(
        name=name,
        module=layer.module,
        channels=layout.channels,
        height=layout.height,
        width=layout.width,
        reduction=int(reduction) if reduction.is_integer() else reduction,
        locations=layout.height * layout.width,
        values_per_pixel_value=layout.channels * layout.height * layout.width / (3 * height * width),
        order=layer.order,
        encoder_parameters=layer.parameters,
        encoder_macs=layer.macs,
        rows=layer.placement.rows,
        columns=layer.placement.columns,
        unseen=layer.placement.unseen,
    )


def list_layers(
    model: str, image_size: int | Sequence[int] | None = None, *, every: bool = False
) -> list[LayerInfo]:
    """List the layers of a timm model that can be inverted, in order of execution. No weights are needed.

    Args:
        model: timm's name, with or without a tag, or a repository of the hub
        image_size: side of the images in pixels, or `(height, width)`; 224 by default
        every: whether to list every module that returns a feature map, not only stages and blocks

    Raises:
        AfterimageError: the model is unknown or cannot run on images of that size
    """
    size = size_pair(224 if image_size is None else image_size)
    traced = trace(resolve_model(model), size)
    if not traced.layers:
        raise cannot_run(traced.model, size, traced.failure or "no module returns a feature map")
    names = traced.by_order if every else traced.names or traced.by_order
    return [_info(name, traced.layer(name), size) for name in names]


def early_end(model: str, image_size: int | Sequence[int] | None = None) -> str:
    """Explain why a model stopped before all of its layers could be listed, and which size works.

    Empty if it did not stop.

    Args:
        model: timm's name, with or without a tag, or a repository of the hub
        image_size: side of the images in pixels, or `(height, width)`; 224 by default
    """
    return trace(resolve_model(model), size_pair(224 if image_size is None else image_size)).early_end


def layer_info(source: str, image_size: int | Sequence[int] = 224) -> LayerInfo:
    """Describe one layer, `model:layer`, which may be any module that returns a feature map.

    Args:
        source: `model:layer`
        image_size: side of the images in pixels, or `(height, width)`

    Raises:
        AfterimageError: the model or layer is unknown, or is not a feature map
    """
    model, layer = split_source(source)
    size = size_pair(image_size)
    return _info(layer, trace(resolve_model(model), size).layer(layer), size)
