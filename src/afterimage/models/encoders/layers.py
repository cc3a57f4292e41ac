"""Layers of a network: their measured properties, the positions of their locations, and the choice of those to list."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from afterimage.config import Axis
from afterimage.models.encoders.positions import Positions, average_centres, compress
from afterimage.models.encoders.tensor_layout import Layout, NotAFeatureMap, Size
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
SHIFT = 0.5
"""Locations by which a whole map may be shifted and still count as even. Padded convolutions of stride s put
location i at pixel i s, half a location (less half a pixel) from its position in an even grid; decoders learn
to compensate for this.
"""
DRIFT = 0.125
"""Locations by which the shifts at the two ends of a map may differ while the map still counts as even."""
STEPS_PER_PIXEL = 1024
"""Steps per pixel to which starts and strides are rounded, so that they are the same on every machine."""


@dataclass(frozen=True)
class TracedLayer:
    """A module whose output is a feature map, or a vector.

    Attributes:
        module: path of the module; empty for the whole network
        layout: conversion of its output into a feature map
        order: number of modules that finish before it
        operation_index: number of operations that the network ran until it finished
        parameters: number of parameters of the network up to there
        macs: multiply-adds of the network up to there, for one image
        is_vector: whether the output is one vector for the whole image
        positions: positions in the image of the output's values; None for a vector
    """

    module: str
    layout: Layout
    order: int
    operation_index: int
    parameters: int
    macs: int
    is_vector: bool
    positions: Positions | None = field(default=None, repr=False)

    def feature_map(self, source: str, image_size: Size) -> FeatureMap:
        """Describe the layer, named `model:layer`, on images of a size `(height, width)`."""
        rows, columns, unseen = None, None, ""
        if not self.is_vector:
            rows, columns, unseen = find_placement(self.positions, self.layout, image_size)
        return FeatureMap(
            source,
            self.layout.channels,
            self.layout.height,
            self.layout.width,
            rows,
            columns,
            module=self.module,
            order=self.order,
            reduction=image_size[0] / self.layout.height,
            encoder_parameters=self.parameters,
            encoder_macs=self.macs,
            unseen=unseen,
        )


def find_placement(
    positions: Positions | None, layout: Layout, size: Size
) -> tuple[Axis | None, Axis | None, str]:
    """Find the positions of a feature map's rows and columns on images of a size `(height, width)`.

    Args:
        positions: positions of the values that the module returned, or None
        layout: conversion of these values into a feature map
        size: size of the images in pixels

    Returns:
        the positions of rows, and of columns, each None if they divide the image evenly and every pixel is
            seen; and a description of the pixels that no location sees, or the reason why positions are
            unknown, empty if neither applies
    """
    try:
        if (
            positions is None
            or not positions.centres
            or all(mixed.isinf().all() for _, _, mixed in positions.centres)
        ):
            operations = sorted(positions.unknown_operations) if positions is not None else []
            raise NotAFeatureMap(
                f"the effect of {', '.join(operations)} on positions is not known"
                if operations
                else "its values have no position in the image"
            )
        centres = _over_channels(positions, layout)
        boxes = [
            [_map(array, positions, layout).amin() for array in box] for box in positions.receptive_field
        ]
        top, left, bottom, right = (int(min(values).item()) for values in zip(*boxes, strict=True))
        rows = _axis(centres[0], layout.height, size[0], top, -bottom)
        columns = _axis(centres[1].T, layout.width, size[1], left, -right)
    except NotAFeatureMap as reason:
        unknown = (
            f"where its locations lie in the image is not known ({reason}); it is taken to be divided evenly"
        )
        return None, None, unknown
    return rows, columns, describe_unseen(rows, columns, size)


def _map(array: Tensor, positions: Positions, layout: Layout) -> Tensor:
    return compress(replace(layout, key=())(array.expand(positions.shape)))


def _over_channels(positions: Positions, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the centres `(y, x)` of a map's locations, each `(h, w)` with size 1 along axes of equal values.

    If a location has several centres, the least mixed ones are used.

    Raises:
        NotAFeatureMap: the centres of a location lie far apart
    """
    candidates = [
        average_centres(tuple(_map(array, positions, layout) for array in centre), 1)
        for centre in positions.centres
    ]
    least = min(centre[2].min().item() for centre in candidates)
    candidates = [centre for centre in candidates if centre[2].min().item() == least]
    cells = (layout.height, layout.width)
    centres = []
    for axis in range(2):
        several = torch.stack([centre[axis][0, 0].expand(cells) for centre in candidates])
        spread, steps = several.amax(0) - several.amin(0), several[0].diff(dim=axis)
        if len(candidates) > 1 and (spread > steps.median() if steps.numel() else spread > 0).any():
            raise NotAFeatureMap("each of its locations combines several distant positions")
        centres.append(compress(several.mean(0)))
    return centres[0], centres[1]


def _axis(centres: Tensor, count: int, size: int, first: int, last: int) -> Axis | None:
    """Fit an axis to the centres `(count, others)` of its locations, which see the pixels `first` to `last`.

    Raises:
        NotAFeatureMap: the centres are not on a line
    """
    sees_all = (first, last) == (0, size)
    if count == 1:
        return None if sees_all else Axis(float(first), float(last - first), first, last)
    if (centres.amax(1) - centres.amin(1)).max() > SHIFT * size / count:
        raise NotAFeatureMap("its rows or columns are not straight")
    line = centres.expand(count, -1)[:, centres.shape[1] // 2]
    steps = line.diff()
    if line[0] == line[-1]:
        raise NotAFeatureMap("all of its locations depend on the whole image equally")
    if (steps < 0).any():
        raise NotAFeatureMap("its rows or columns are not in the image's order")
    index = torch.arange(count, dtype=torch.float64, device="cpu")
    mean = index.mean()
    # Most steps equal the stride except at the border of an interpolation; if steps alternate, only their
    # mean does.
    typical, middle = steps.median(), (count - 1) // 2
    fits = [
        (typical, line[middle] - middle * typical),
        (slope := (index - mean) @ line / (index - mean).square().sum(), line.mean() - slope * mean),
    ]
    errors = [(line - origin - index * stride).abs() for stride, origin in fits]
    best = min(range(2), key=lambda number: errors[number].median().item())
    if errors[best].quantile(0.75) > SHIFT * max(fits[best][0], steps.max()):
        raise NotAFeatureMap("its locations are not evenly spaced")
    stride, origin = (round(value.item() * STEPS_PER_PIXEL) / STEPS_PER_PIXEL for value in fits[best])
    start = origin - stride / 2
    drift = (count * stride - size) / stride
    shift = abs(start + count * stride / 2 - size / 2) / stride
    if sees_all and abs(drift) <= DRIFT and shift <= SHIFT:
        return None
    return Axis(start, stride, first, last)


def describe_unseen(rows: Axis | None, columns: Axis | None, size: Size) -> str:
    """Describe the pixels that no location sees: `the last 8 rows and columns of 104x104 images are not seen`.

    Empty if all are seen.
    """
    named = [
        [(end, count) for end, count in (("first", axis.first), ("last", length - axis.last)) if count]
        if axis
        else []
        for axis, length in zip((rows, columns), size, strict=True)
    ]
    if named[0] == named[1]:
        parts = [f"the {end} {_counted(count, 'row', 'column')}" for end, count in named[0]]
    else:
        words = zip(named, ("row", "column"), strict=True)
        parts = [f"the {end} {_counted(count, word)}" for ends, word in words for end, count in ends]
    return f"{' and '.join(parts)} of {size[0]}x{size[1]} images are not seen" if parts else ""


def _counted(count: int, *words: str) -> str:
    text = " and ".join(words if count == 1 else [f"{word}s" for word in words])
    return text if count == 1 else f"{count} {text}"


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
        pooler: the pooled vector that the network itself returns; None if it returns none

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


def select_listed_layers(
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
