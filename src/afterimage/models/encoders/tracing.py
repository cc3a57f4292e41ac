"""Measure which modules of a model return feature maps, their shapes, and the network's cost up to each one.

Nothing is declared. The model is observed on images of two sizes, before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from afterimage.config import AfterimageError, unknown
from afterimage.models.encoders.forward_trace import ForwardTrace, storage
from afterimage.models.encoders.placement import Placement, find_placement
from afterimage.models.encoders.positions import Positions
from afterimage.models.encoders.providers.base import Network
from afterimage.models.encoders.random_init import Blank, seeded
from afterimage.models.encoders.tensor_layout import Layout, Refused, Size, find_layout, find_vector
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
Found = tuple["TracedLayer", Positions | None]


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
        placement: positions of its locations in the image
        is_vector: whether the output is one vector for the whole image
    """

    module: str
    layout: Layout
    order: int
    clock: int
    parameters: int
    macs: int
    overwritten: bool
    placement: Placement = Placement()
    is_vector: bool = False

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


@dataclass(frozen=True)
class Trace:
    """A network on images of one size: its layers, and the reasons why other modules are not layers.

    Attributes:
        network: the network
        image_size: `(height, width)` of the images in pixels
        modules: paths of all modules; the path of the whole network is empty
        layers: the modules whose output is a feature map, by path
        refused: for each other module that ran, the reason why it is not a layer
        reads: saved tensors in the order in which they are first read: clock, names, number of parameters
        aliases: module paths by short name
        stages: paths of the layers worth listing
        failure: reason why the network stopped before its end; empty if it did not
        find: function that finds what a module returns under some keys, and the positions of its values in
            the image
        named: layers that the network has by role, see `_named`
        placements: placements computed so far, by layer name
    """

    network: Network
    image_size: Size
    modules: Collection[str]
    layers: Mapping[str, TracedLayer]
    refused: Mapping[str, str]
    reads: Sequence[tuple[int, tuple[str, ...], int]]
    aliases: Mapping[str, str]
    stages: Sequence[str]
    failure: str
    find: Callable[[str, Sequence[str]], Found]
    named: Mapping[str, Found]
    placements: dict[str, Placement] = field(default_factory=dict)

    def layer(self, name: str) -> TracedLayer:
        """Return a layer by module path or alias, followed by keys in brackets if it has several tensors.

        Raises:
            AfterimageError: there is no such layer; the message gives the reason and the valid names
        """
        model = self.network.name
        match = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]+\])*)", name)
        if match is None:
            raise AfterimageError(
                f"layer {name!r} must be a module's path, with keys in brackets: {OUTPUT}[features]"
            )
        path, keys = match[1], re.findall(r"\[([^\[\]]+)\]", match[2])
        path = path if path in self.modules else self.aliases.get(path, path)
        if path in ROLES and path not in self.modules and path not in self.named:
            if self.failure:
                raise cannot_run(self.network, self.image_size, self.failure)
            raise AfterimageError(
                f"{model} has no layer {path!r} ({ROLES[path]}). By role it has {', '.join(self.named) or 'none'}; "
                f"`afterimage layers {model} --all-modules` lists every module"
            )
        if path not in self.modules and path not in self.named:
            valid = dict.fromkeys([*self.names, *self.by_order, *self.named, OUTPUT])
            raise unknown(f"layer of {model}", name, valid, limit=min(40, max(12, len(self.names))))
        try:
            found, positions = self.find(path, keys) if path in self.modules else self.named[path]
        except Refused as reason:
            if path not in self.refused and path not in self.layers and self.failure:
                raise cannot_run(self.network, self.image_size, self.failure) from None
            raise AfterimageError(
                f"{model}:{name} cannot be inverted: {reason}. Valid: {', '.join(self.names or self.by_order)}; "
                f"`afterimage layers {model} --all-modules` lists every module"
            ) from None
        if name not in self.placements:
            self.placements[name] = (
                Placement() if found.is_vector else find_placement(positions, found.layout, self.image_size)
            )
        return replace(found, placement=self.placements[name])

    @property
    def early_end(self) -> str:
        """Explanation of where and why the network stopped before its end, and which image size works.

        Empty if the network did not stop.
        """
        if not self.failure:
            return ""
        works = _size_that_works(self.network, self.image_size)
        height, width = self.image_size
        return (
            f"{self.network.name} ended early on {height}x{width} images ({self.failure}): layers "
            f"after {self.by_order[-1] if self.layers else 'its start'} are not listed"
            + (f"; it runs to its end on {works}" if works else "")
        )

    @property
    def by_order(self) -> list[str]:
        """Names of all layers in order of execution; aliases are preferred."""
        short = {path: alias for alias, path in self.aliases.items()}
        return [
            short.get(path, path) for path in sorted(self.layers, key=lambda path: self.layers[path].order)
        ]

    @property
    def names(self) -> list[str]:
        """Names of the layers worth listing, in order of execution."""
        return [name for name in self.by_order if self.aliases.get(name, name) in self.stages]

    def used(self, layers: Sequence[TracedLayer]) -> list[tuple[str, ...]]:
        """Return the saved tensors that the given layers read, each as a tuple of all its names."""
        last = max(layer.clock for layer in layers)
        return [names for clock, names, _ in self.reads if clock <= last]


class _Unbuildable(Exception):
    """Error for a model that cannot be built for an image size; the message gives the reason."""


def cannot_run(network: Network, size: Size, reason: str) -> AfterimageError:
    """Create the error for a network that cannot run on images of a size.

    Args:
        network: the network
        size: `(height, width)` of the images in pixels
        reason: reason why it cannot run
    """
    works = _size_that_works(network, size)
    return AfterimageError(
        f"{network.name} cannot run on {size[0]}x{size[1]} images ({reason})"
        + (f"; it can on {works}" if works else "")
    )


def _size_that_works(network: Network, size: Size) -> str:
    """Describe the native size of a network's weights, if it differs and the network runs to its end there.

    Otherwise return an empty string.
    """
    native = network.native_size
    with contextlib.suppress(AfterimageError):
        if native != size and not trace(network, native).failure:
            return f"{native[0]}x{native[1]}, the size of its pretraining"
    return ""


@functools.lru_cache(maxsize=32)
def trace(network: Network, image_size: Size) -> Trace:
    """Trace a network.

    Args:
        network: the network
        image_size: `(height, width)` of the images in pixels

    Raises:
        AfterimageError: the network cannot be built for images of this size
    """
    try:
        model = _blank(network, image_size)
    except _Unbuildable as reason:
        raise cannot_run(network, image_size, str(reason)) from reason
    first = ForwardTrace(model, _images(network, model, 1, image_size), follow=True)
    if (first.failure or first.flow.needs_values) and _device(model) == "meta":
        model = _blank(network, image_size, "cpu")
        first = ForwardTrace(model, _images(network, model, 1, image_size), follow=True)
    second, size = _observe_again(network, model, image_size, first)
    modules = dict.fromkeys(path for path, _ in model.named_modules())
    aliases = network.aliases(model) | ({} if OUTPUT in modules else {OUTPUT: ""})
    find = _finder(network, model, first, second, (image_size, size))
    layers, vectors, refused = {}, {}, {}
    for path in first.events:
        try:
            found, _ = find(path, ())
            (vectors if found.is_vector else layers)[path] = found
        except Refused as reason:
            refused[path] = str(reason)
    stages = _stages(model, layers, set(aliases.values()) - {""})
    named = {} if first.failure else _named(model, layers, vectors, find)
    reads = _reads(model, first)
    return Trace(
        network, image_size, modules, layers, refused, reads, aliases, stages, first.failure, find, named
    )


def _named(
    model: nn.Module,
    layers: Mapping[str, TracedLayer],
    vectors: Mapping[str, TracedLayer],
    find: Callable[[str, Sequence[str]], Found],
) -> dict[str, Found]:
    """Find the layers of `ROLES` that a network has.

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
    found: dict[str, Found] = {}
    for path, layer in inner.items():
        is_norm = "norm" in type(modules[path]).__name__.lower()
        if is_norm and not any(part.isdigit() for part in path.split(".")):
            others = [block for block in blocks if not path.startswith(f"{block.module}.")]
            if all(layer.order > block.order for block in others):
                found["norm"] = find(path, ())
    tokens = [
        layer for layer in inner.values() if layer.layout.axes in ("NLC", "NCL") and layer.layout.prefix
    ]
    has_class = any(
        word in name.rpartition(".")[2] for name, _ in model.named_parameters() for word in ("cls", "class_")
    )
    if tokens and has_class:
        layer = found["norm"][0] if "norm" in found else max(tokens, key=lambda layer: layer.order)
        layout = layer.layout
        if layout.prefix:
            beside = layout.prefix + layout.height * layout.width + layout.suffix - 1
            one = replace(layout, prefix=0, height=1, width=1, suffix=beside)
            found["cls"] = replace(layer, layout=one, is_vector=True), None
    with contextlib.suppress(Refused):
        found["pooled"] = find("", ("pooler_output",))
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
        found["pooled"] = before[-1], None
    if "" in vectors:
        found["head"] = vectors[""], None
    return found


def _finder(
    network: Network, model: nn.Module, first: ForwardTrace, second: ForwardTrace, sizes: tuple[Size, Size]
) -> Callable[[str, Sequence[str]], Found]:
    """Return `find` of a `Trace`; the function keeps no tensors of the passes."""
    reads = _reads(model, first)
    clocks = [clock for clock, _, _ in reads]
    totals = [0, *itertools.accumulate(count for _, _, count in reads)]
    prefix, nhwc = network.prefix_tokens(model), getattr(model, "output_fmt", "NCHW") == "NHWC"
    overwritten = {path: event.overwritten for path, event in first.events.items()}
    events = {path: replace(event, returned=[]) for path, event in first.events.items()}
    later_shapes = {path: event.shapes for path, event in second.events.items()}

    def find(path: str, keys: Sequence[str]) -> Found:
        if path not in events:
            raise Refused("it does not run as a module of its own")
        event = events[path]
        if event.refused:
            raise Refused(event.refused)
        if event.runs > 1:
            raise Refused(f"it runs {event.runs} times in one pass, so that its output is not one thing")
        if path not in later_shapes:
            raise Refused("it does not run on images of every size")
        shapes, later = (
            [(key, shape) for key, shape in found if [str(step) for step in key[: len(keys)]] == list(keys)]
            for found in (event.shapes, later_shapes[path])
        )
        if keys and not shapes:
            raise Refused(f"nothing it returns is called {_bracketed(keys)}")
        try:
            layout = find_layout(shapes, later, sizes, prefix, nhwc, event.positions)
            positions, vector = event.positions[layout.key], None
        except Refused as reason:
            layout = vector = find_vector(shapes, later)
            positions = None
            if vector is None:
                hint = ""
                if len(shapes) > 1:
                    listed = ", ".join(
                        f"{_bracketed(key)} {'x'.join(map(str, shape))}" for key, shape in shapes
                    )
                    hint = f"; it returns {listed}: name one as {path or OUTPUT}[KEY]"
                if network.is_own and prefix is None and any(len(shape) == 3 for _, shape in shapes):
                    hint += "; the network's attribute prefix_tokens may say how many tokens come before the map's"
                raise Refused(f"{reason}{hint}") from None
        total = totals[bisect_right(clocks, event.clock)]
        counted = event.order, event.clock, total, event.macs, overwritten[path]
        return TracedLayer(path, layout, *counted, is_vector=vector is not None), positions

    return find


def _bracketed(keys: Sequence[int | str]) -> str:
    return "".join(f"[{key}]" for key in keys)


def _blank(network: Network, image_size: Size, device: str = "meta") -> nn.Module:
    """Build the model without weights, and without storage if that is possible and fast.

    Some models, and some versions of timm, cannot be built on the meta device. Recurrent networks are not run
    on it either, because it unrolls them far too slowly.
    """
    with seeded(0), Blank():
        if device == "meta":
            with contextlib.suppress(Exception):
                model = network.create(image_size, device="meta")
                if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
                    return model
        try:
            return network.create(image_size)
        except Exception as error:
            raise _Unbuildable(f"{type(error).__name__}: {error}") from error


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _images(network: Network, model: nn.Module, count: int, size: Size) -> torch.Tensor:
    return torch.zeros(count, network.channels, *size, device=_device(model))


def _observe_again(
    network: Network, model: nn.Module, size: Size, first: ForwardTrace
) -> tuple[ForwardTrace, Size]:
    """Observe the model on two images that are wider, larger, or of the same size.

    The first of these sizes is used on which the model runs as far as it did on one image.
    """
    height, width = size
    for other in ((height, 2 * width), (2 * height, 2 * width), size):
        candidate = model
        if network.has_fixed_size and other != size:
            try:
                candidate = _blank(network, other, _device(model))
            except _Unbuildable:
                continue
        second = ForwardTrace(candidate, _images(network, candidate, 2, other))
        if len(second.events) >= len(first.events):
            break
    return second, other


def _reads(model: nn.Module, seen: ForwardTrace) -> list[tuple[int, tuple[str, ...], int]]:
    """List saved tensors in the order in which they are first read: clock, names, number of parameters."""
    names: dict[int, list[str]] = {}
    counts: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(storage(tensor), []).append(name)
        counts[storage(tensor)] = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
    return sorted((seen.first_read[s], tuple(names[s]), counts[s]) for s in names if s in seen.first_read)


def _stages(
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
            if path in layers and (path in named or whole or (path in declared and (composite or not named))):
                found.append(path)
            elif level < depth:
                visit(module, f"{path}.", level + 1)

    visit(model, "", 1)
    return found
