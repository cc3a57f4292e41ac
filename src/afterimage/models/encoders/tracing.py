"""Measure which modules of a model return feature maps, their shapes, and the network's cost up to each.

Nothing is declared. The model is observed on images of two sizes, before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from afterimage.config import AfterimageError, unknown
from afterimage.models.encoders.forward_trace import ForwardTrace, storage
from afterimage.models.encoders.placement import Placement, find_placement
from afterimage.models.encoders.positions import Positions
from afterimage.models.encoders.providers.timm import aliases, create_model, has_fixed_size, native_size
from afterimage.models.encoders.random_init import Blank, seeded
from afterimage.models.encoders.tensor_layout import Layout, Refused, Size, find_layout
from afterimage.runs.results import FeatureMap


@dataclass(frozen=True)
class TracedLayer:
    """A module whose output is a feature map.

    Attributes:
        module: path of the module
        layout: how its output becomes a feature map
        order: number of modules that finish before it
        clock: number of operations until it finishes
        parameters: parameters of the network up to there
        macs: multiply-adds of the network up to there, for one image
        overwritten: whether the network later changes the module's output in place
        placement: positions of its locations in the image
    """

    module: str
    layout: Layout
    order: int
    clock: int
    parameters: int
    macs: int
    overwritten: bool
    placement: Placement = Placement()

    def feature_map(self, source: str, image_size: Size) -> FeatureMap:
        """Describe the layer's features on images of a size, `(height, width)`, under the name `model:layer`."""
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
    """A model on images of one size: its layers, and why other modules are not layers.

    Attributes:
        model: timm's name, with the tag
        image_size: `(height, width)` of the images in pixels
        modules: paths of all modules
        layers: the modules whose output is a feature map, by path
        refused: the reason for each other module that ran
        reads: saved tensors in the order in which they are first read: clock, names, number of parameters
        aliases: module path of each name that the published study uses
        stages: paths of the layers worth listing
        failure: why the network stopped before its end; empty if it did not
        positions: positions in the image of each layer's values, from which `layer` computes its placement
        placements: placements computed so far
    """

    model: str
    image_size: Size
    modules: Sequence[str]
    layers: Mapping[str, TracedLayer]
    refused: Mapping[str, str]
    reads: Sequence[tuple[int, tuple[str, ...], int]]
    aliases: Mapping[str, str]
    stages: Sequence[str]
    failure: str
    positions: Mapping[str, Positions | None]
    placements: dict[str, Placement] = field(default_factory=dict)

    def layer(self, name: str) -> TracedLayer:
        """Return a layer by its module path or alias.

        Raises:
            AfterimageError: it is not a layer; the message gives the reason and the valid names
        """
        path = name if name in self.modules else self.aliases.get(name, name)
        if path in self.layers:
            found = self.layers[path]
            if path not in self.placements:
                self.placements[path] = find_placement(self.positions[path], found.layout, self.image_size)
            return replace(found, placement=self.placements[path])
        if path not in self.modules:
            valid = dict.fromkeys([*self.names, *self.by_order])
            raise unknown(f"layer of {self.model}", name, valid, limit=min(40, max(12, len(self.names))))
        if path not in self.refused and self.failure:
            raise cannot_run(self.model, self.image_size, self.failure)
        reason = self.refused.get(path, "it does not run as a module of its own")
        raise AfterimageError(
            f"{self.model}:{name} cannot be inverted: {reason}. Valid: {', '.join(self.names)}; "
            f"`afterimage layers {self.model} --all-modules` lists every module"
        )

    @property
    def early_end(self) -> str:
        """Explain where and why the network stopped before its end, and on which size it does not.

        Empty if it did not stop.
        """
        if not self.failure:
            return ""
        works = _size_that_works(self.model, self.image_size)
        return (
            f"{self.model} ended early on {self.image_size[0]}x{self.image_size[1]} images ({self.failure}): layers "
            f"after {self.by_order[-1] if self.layers else 'its start'} are not listed"
            + (f"; it runs to its end on {works}" if works else "")
        )

    @property
    def by_order(self) -> list[str]:
        """Names of all layers in order of execution, by alias if there is one."""
        short = {path: alias for alias, path in self.aliases.items()}
        return [
            short.get(path, path) for path in sorted(self.layers, key=lambda path: self.layers[path].order)
        ]

    @property
    def names(self) -> list[str]:
        """Names of the layers worth listing, in order of execution."""
        return [name for name in self.by_order if self.aliases.get(name, name) in self.stages]

    def used(self, layers: Sequence[TracedLayer]) -> list[tuple[str, ...]]:
        """Return the saved tensors that the given layers read, each by all of its names."""
        last = max(layer.clock for layer in layers)
        return [names for clock, names, _ in self.reads if clock <= last]


class _Unbuildable(Exception):
    """A model cannot be built for a size; the message gives the reason."""


def cannot_run(model: str, size: Size, reason: str) -> AfterimageError:
    """Create the error for a model that cannot run on images of a size.

    Args:
        model: name of the model
        size: `(height, width)` of the images in pixels
        reason: why it cannot run
    """
    works = _size_that_works(model, size)
    return AfterimageError(
        f"{model} cannot run on {size[0]}x{size[1]} images ({reason})"
        + (f"; it can on {works}" if works else "")
    )


def _size_that_works(model: str, size: Size) -> str:
    """Describe the size of a model's pretraining if the model runs to its end there.

    Otherwise return the empty string.
    """
    native = native_size(model)
    with contextlib.suppress(AfterimageError):
        if native != size and not trace(model, native).failure:
            return f"{native[0]}x{native[1]}, the size of its pretraining"
    return ""


@functools.lru_cache(maxsize=32)
def trace(name: str, image_size: Size) -> Trace:
    """Trace a timm model.

    Args:
        name: timm's name, with the tag
        image_size: `(height, width)` of the images in pixels

    Raises:
        AfterimageError: the model cannot be built for images of this size
    """
    try:
        model = _blank(name, image_size)
    except _Unbuildable as reason:
        raise cannot_run(name, image_size, str(reason)) from reason
    first = ForwardTrace(model, _images(model, 1, image_size), follow=True)
    if (first.failure or first.flow.needs_values) and _device(model) == "meta":
        model = _blank(name, image_size, "cpu")
        first = ForwardTrace(model, _images(model, 1, image_size), follow=True)
    second, size = _observe_again(name, model, image_size, first)
    reads = _reads(model, first)
    clocks = [clock for clock, _, _ in reads]
    totals = [0, *itertools.accumulate(count for _, _, count in reads)]
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)  # some timm models lack the attribute
    nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
    layers, refused, positions = {}, {}, {}
    for path, event in first.events.items():
        try:
            if event.refused:
                raise Refused(event.refused)
            if event.runs > 1:
                raise Refused(f"it runs {event.runs} times in one pass, so that its output is not one thing")
            if path not in second.events:
                raise Refused("it does not run on images of every size")
            later = second.events[path].shapes
            layout = find_layout(event.shapes, later, (image_size, size), prefix, nhwc, event.positions)
        except Refused as reason:
            refused[path] = str(reason)
            continue
        total = totals[bisect_right(clocks, event.clock)]
        positions[path] = event.positions[layout.key]
        layers[path] = TracedLayer(
            path, layout, event.order, event.clock, total, event.macs, event.overwritten
        )
    modules = tuple(path for path, _ in model.named_modules() if path)
    short = aliases(model, name)
    stages = _stages(model, layers, short.values())
    return Trace(name, image_size, modules, layers, refused, reads, short, stages, first.failure, positions)


def _blank(name: str, image_size: Size, device: str = "meta") -> nn.Module:
    """Build the model without weights, and without storage if that is possible and fast.

    Some models, and some versions of timm, cannot be built on the meta device, which also unrolls recurrent
    networks far too slowly.
    """
    with seeded(0), Blank():
        if device == "meta":
            with contextlib.suppress(Exception):
                model = create_model(name, image_size, device="meta")
                if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
                    return model
        try:
            return create_model(name, image_size)
        except Exception as error:
            raise _Unbuildable(f"{type(error).__name__}: {error}") from error


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _images(model: nn.Module, count: int, size: Size) -> torch.Tensor:
    return torch.zeros(count, 3, *size, device=_device(model))


def _observe_again(name: str, model: nn.Module, size: Size, first: ForwardTrace) -> tuple[ForwardTrace, Size]:
    """Observe two images that are wider, larger, or of the same size.

    The first of these sizes counts at which the model runs as far as it did on one image.
    """
    height, width = size
    for other in ((height, 2 * width), (2 * height, 2 * width), size):
        candidate = model
        if has_fixed_size(name) and other != size:
            try:
                candidate = _blank(name, other, _device(model))
            except _Unbuildable:
                continue
        second = ForwardTrace(candidate, _images(candidate, 2, other))
        if len(second.events) >= len(first.events):
            break
    return second, other


def _reads(model: nn.Module, seen: ForwardTrace) -> list[tuple[int, tuple[str, ...], int]]:
    """List the saved tensors in the order in which they are first read: clock, names, number of parameters."""
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

    These are the layers in `named`, which the published study names, those that timm declares, and the
    outermost composite modules that are less than half of the network. Where the study names layers, single
    operations are left out.
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
