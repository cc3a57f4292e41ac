"""What can be inverted: the layers of a model, measured on images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afterimage.config import Axis, split_source
from afterimage.models.encoders.base import size_pair
from afterimage.models.encoders.providers.timm import resolve_model
from afterimage.models.encoders.tracing import TracedLayer, cannot_run, trace


@dataclass(frozen=True)
class LayerInfo:
    """One layer that can be inverted, and what the encoder costs up to there (multiply-adds an image).

    `reduction` is the image's height over the features'; `values_per_pixel_value` the number of feature values over
    the number of values in the image, so that 1 keeps their count. `rows`, `columns` and `unseen` say where its
    locations lie, as `placement.Placement` has it.
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
        return self.channels, self.height, self.width


def _info(name: str, tap: TracedLayer, size: Sequence[int]) -> LayerInfo:
    layout, (height, width) = tap.layout, size
    reduction = height / layout.height
    return LayerInfo(
        name=name,
        module=tap.module,
        channels=layout.channels,
        height=layout.height,
        width=layout.width,
        reduction=int(reduction) if reduction.is_integer() else reduction,
        locations=layout.height * layout.width,
        values_per_pixel_value=layout.channels * layout.height * layout.width / (3 * height * width),
        order=tap.order,
        encoder_parameters=tap.parameters,
        encoder_macs=tap.macs,
        rows=tap.placement.rows,
        columns=tap.placement.columns,
        unseen=tap.placement.unseen,
    )


def list_layers(
    model: str, image_size: int | Sequence[int] | None = None, *, every: bool = False
) -> list[LayerInfo]:
    """The layers of a timm model that can be inverted, in order of execution; no weights are needed.

    Stages and blocks, under the study's names where it has one; `every` module on request. `image_size` is
    224 by default. Raises AfterimageError for a model that is unknown or that cannot run on images of that
    size.
    """
    size = size_pair(224 if image_size is None else image_size)
    traced = trace(resolve_model(model), size)
    if not traced.taps:
        raise cannot_run(traced.model, size, traced.failure or "no module returns a feature map")
    names = traced.by_order if every else traced.names or traced.by_order
    return [_info(name, traced.tap(name), size) for name in names]


def early_end(model: str, image_size: int | Sequence[int] | None = None) -> str:
    """Why a model ended before all of its layers could be listed, and the size that works; "" where it did not."""
    return trace(resolve_model(model), size_pair(224 if image_size is None else image_size)).early_end


def layer_info(source: str, image_size: int | Sequence[int] = 224) -> LayerInfo:
    """One layer, `model:layer`, as `list_layers` describes it; any module that can be inverted."""
    model, layer = split_source(source)
    size = size_pair(image_size)
    return _info(layer, trace(resolve_model(model), size).tap(layer), size)
