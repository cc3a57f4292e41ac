"""`afterimage layers`: list the layers of a model that can be inverted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import tyro

from afterimage.cli.shared import table
from afterimage.config import MAX_SIDE, NATIVE, Axis, check_range, size_pair
from afterimage.runtime.terminal import console, print_lines


@dataclass(frozen=True)
class Layers:
    """List the layers of a model that can be inverted, with kind, shape and cost; vectors come last."""

    model: Annotated[str, tyro.conf.Positional]
    """Encoder: [PROVIDER/]MODEL, for example resnet34.tv_in1k; without a tag, with the library's default weights."""
    size: Annotated[str, tyro.conf.arg(metavar="SIDE|HxW|native", aliases=("--image-size",))] = "224"
    """Image size in pixels: 256, 256x384 (height x width), or native, the encoder's own."""
    all_modules: bool = False
    """List every module whose output can be inverted, not only stages and blocks."""

    def run(self) -> None:
        size = None if self.size == NATIVE else size_pair(self.size, "--size")
        check_range("--size", max(size or (1,)), 1, MAX_SIDE)
        from afterimage.models.encoders.providers import open_network
        from afterimage.models.encoders.tracing import trace

        network = open_network(self.model)
        size = size or network.native_size
        traced = trace(network, size)
        layers = traced.list_layers(all_modules=self.all_modules) + traced.list_named()
        numbers = ("shape", "reduction", "locations", "values per pixel value", "parameters", "multiply-adds")
        placed = any(layer.rows or layer.columns for layer in layers)
        found = table(self.model, ("layer", "kind"), numbers, ("locations lie",) if placed else ())
        for layer in layers:
            found.add_row(
                layer.layer,
                "vector" if layer.locations == 1 else "map",
                f"{layer.channels}×{layer.height}×{layer.width}",
                f"{layer.reduction:g}",
                f"{layer.locations:,}",
                f"{layer.values / (3 * size[0] * size[1]):.3f}",
                f"{layer.encoder_parameters:,}",
                f"{layer.encoder_macs / 1e6:,.1f} M",
                *([_placement(layer.rows, layer.columns)] if placed else []),
            )
        console(140).print(found)
        print_unseen({layer.layer: layer.unseen for layer in layers})
        print_lines(*network.input_notes)
        if ended := traced.early_stop_note:
            print_lines(f"WARNING: {ended}")


def _placement(rows: Axis | None, columns: Axis | None) -> str:
    """Describe where a map's locations lie, in pixels: `every 16 from 0`; rows `by` columns if these differ."""
    texts = [
        "evenly" if axis is None else f"every {axis.stride:g} from {axis.start:g}" for axis in (rows, columns)
    ]
    return " by ".join(dict.fromkeys(texts))


def print_unseen(unseen: Mapping[str, str]) -> None:
    """Print each remark on unseen pixels or unknown positions once, with its layers; `unseen` maps layers to them."""
    for text in dict.fromkeys(filter(None, unseen.values())):
        named = [name for name, own in unseen.items() if own == text]
        listed = "every layer" if len(named) == len(unseen) > 1 else ", ".join(named)
        print_lines(f"{listed}: {text}")
