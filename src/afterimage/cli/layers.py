"""`afterimage layers`: what can be inverted in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from afterimage.config import MAX_SIDE, check_range
from afterimage.terminal import console


@dataclass(frozen=True)
class Layers:
    """List what can be inverted in a model: every layer with its shape and cost."""

    model: Annotated[str, tyro.conf.Positional]
    """A timm name, for example resnet34.tv_in1k; the default weights' tag is taken where none is given."""
    image_size: int = 224
    """Side of the picture in pixels."""
    every: bool = False
    """List each module whose output can be inverted, not only stages and blocks."""

    def run(self) -> None:
        check_range("--image-size", self.image_size, 1, MAX_SIDE)
        from afterimage.encoders import list_layers

        print_layers(self.model, list_layers(self.model, self.image_size, every=self.every))


def print_layers(model: str, layers: list) -> None:
    from rich.table import Table

    table = Table(title=model, title_justify="left")
    table.add_column("layer", overflow="fold")
    for column in (
        "shape",
        "reduction",
        "locations",
        "values per pixel value",
        "parameters",
        "multiply-adds",
    ):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.channels}×{layer.height}×{layer.width}",
            f"{layer.reduction:g}",
            f"{layer.locations:,}",
            f"{layer.values_per_pixel_value:.3f}",
            f"{layer.encoder_parameters:,}",
            f"{layer.encoder_macs / 1e6:,.1f} M",
        )
    console(140).print(table)
