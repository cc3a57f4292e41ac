"""Layers of a network: what is measured of each, which are worth listing, and which have a role."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from afterimage.models.encoders.placement import Placement
from afterimage.models.encoders.positions import Positions
from afterimage.models.encoders.tensor_layout import Layout, Size
from afterimage.runs.results import FeatureMap

OUTPUT = "output"
"""Name of the layer that is the output of the whole network."""
ROLES = {
    "norm": "the final norm over a map's locations, behind all blocks",
    "cls": "the class token behind the last block and the final norm",
    "pooled": "the vector that the classifier reads, as one module returns it",
    "head": "the vector that the whole network returns: classes or an embedding",
}
"""Names of layers by their role, with a description of each."""


@dataclass(frozen=True)
class TracedLayer:
    """A module whose output is a feature map, or a vector.

    Attributes:
        module: path of the module; empty for the whole network
        layout: conversion of its output into a feature map
        order: number of modules that finish before it
        clock: number of operations until it finishes
        parameters: number of parameters of the network up to there
        macs: multiply-adds of the network up to there, for one image
        overwritten: whether the network later changes the module's output in place
        is_vector: whether the output is one vector for the whole image
        positions: positions in the image of the output's values, from which the placement follows
        placement: positions of its locations in the image
    """

    module: str
    layout: Layout
    order: int
    clock: int
    parameters: int
    macs: int
    overwritten: bool
    is_vector: bool
    positions: Positions | None = field(default=None, repr=False)
    placement: Placement = Placement()

    def feature_map(self, source: str, image_size: Size) -> FeatureMap:
        """Describe the layer, named `model:layer`, on images of a size `(height, width)`."""
        return FeatureMap(
            source,
            self.layout.channels,
            self.layout.height,
            self.layout.width,
            self.placement.rows,
            self.placement.columns,
            module=self.module,
            order=self.order,
            reduction=image_size[0] / self.layout.height,
            encoder_parameters=self.parameters,
            encoder_macs=self.macs,
            unseen=self.placement.unseen,
        )


def layers_by_role(
    model: nn.Module,
    layers: Mapping[str, TracedLayer],
    vectors: Mapping[str, TracedLayer],
    pooler: TracedLayer | None,
) -> dict[str, TracedLayer]:
    """Find the layers of `ROLES` that a network has.

    Args:
        model: the network
        layers: modules whose output is a map, by path
        vectors: modules whose output is a vector, by path
        pooler: what the network itself returns as its pooled vector; None if it does not

    The final norm lies outside the blocks, whose paths contain a number, and runs after them. The class token
    is the first of the tokens outside the map, in a network with a parameter for it. The classifier is the
    last matrix or convolution that returns a vector as long as the network's own output.
    """
    modules = dict(model.named_modules())
    inner = {path: layer for path, layer in layers.items() if path}
    # Without maps of one channel, such as the weights of an attention that pools locations (SigLIP's head).
    blocks = [
        layer
        for path, layer in inner.items()
        if layer.layout.channels > 1 and any(True for _ in modules[path].children())
    ]
    found: dict[str, TracedLayer] = {}
    for path, layer in inner.items():
        is_norm = "norm" in type(modules[path]).__name__.lower()
        if is_norm and not any(part.isdigit() for part in path.split(".")):
            others = [block for block in blocks if not path.startswith(f"{block.module}.")]
            if all(layer.order > block.order for block in others):
                found["norm"] = layers[path]
    tokens = [
        layer for layer in inner.values() if layer.layout.axes in ("NLC", "NCL") and layer.layout.prefix
    ]
    has_class = any(
        word in name.rpartition(".")[2] for name, _ in model.named_parameters() for word in ("cls", "class_")
    )
    if tokens and has_class:
        layer = found["norm"] if "norm" in found else max(tokens, key=lambda layer: layer.order)
        layout = layer.layout
        if layout.prefix:
            beside = layout.prefix + layout.height * layout.width + layout.suffix - 1
            one = replace(layout, prefix=0, height=1, width=1, suffix=beside)
            found["cls"] = replace(layer, layout=one, is_vector=True)
    if pooler is not None:
        found["pooled"] = pooler
    channels = vectors[""].layout.channels if "" in vectors else 0
    last = max((layer.order for layer in inner.values()), default=-1)
    late = sorted((v for path, v in vectors.items() if path and v.order > last), key=lambda v: v.order)
    heads = [
        v.order
        for v in late
        if v.layout.channels == channels
        and not any(modules[v.module].children())
        and any(p.ndim > 1 for p in modules[v.module].parameters())
    ]
    before = [v for v in late if not heads or v.order < heads[-1]]
    if before and "" in vectors and "pooled" not in found:
        found["pooled"] = before[-1]
    if "" in vectors:
        found["head"] = vectors[""]
    return found


def stages(
    model: nn.Module, layers: Mapping[str, TracedLayer], named: Collection[str], depth: int = 4
) -> list[str]:
    """Choose the layers worth listing.

    These are the layers in `named`, which have names in the published study, those that timm declares, and
    the outermost composite modules that contain less than half of the network's layers. If the study names
    layers, single operations are left out.
    """
    infos = getattr(model, "feature_info", None) or ()
    declared = {info["module"] for info in infos if isinstance(info, dict)}
    found: list[str] = []

    def visit(parent: nn.Module, prefix: str, level: int) -> None:
        for name, module in parent.named_children():
            path = f"{prefix}{name}"
            composite = any(True for _ in module.children())
            inside = [other for other in layers if other.startswith(f"{path}.")]
            whole = composite and len(inside) < len(layers) / 2 and set(named).isdisjoint(inside)
            # A map of one channel is the weights of an attention that pools locations (SigLIP's head).
            whole = whole and path in layers and layers[path].layout.channels > 1
            if path in layers and (path in named or whole or (path in declared and (composite or not named))):
                found.append(path)
            elif level < depth:
                visit(module, f"{path}.", level + 1)

    visit(model, "", 1)
    return found
