"""Tracing: which modules of a model can be inverted, their shapes, and what the network costs up to each.

Nothing is declared. The model is observed twice, on images of two sizes, before any weights are loaded.
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


@dataclass(frozen=True)
class TracedLayer:
    """A module whose output is a feature map.

    `order` counts finished modules, `clock` operations; `parameters` and `macs` (of one image) are the
    network's up to there. `overwritten` says that the network later changes what the module returned. `placement` is
    where its locations lie in the image.
    """

    module: str
    layout: Layout
    order: int
    clock: int
    parameters: int
    macs: int
    overwritten: bool
    placement: Placement = Placement()


@dataclass(frozen=True)
class Trace:
    """A model on images of `image_size`: what can be inverted (`taps`) and why the rest cannot (`refused`).

    `reads` are the saved tensors in the order in which they are first read: clock, names, number of
    parameters. `positions` say where in the image the values of each tap lie; `tap` works its placement out of them.
    """

    model: str
    image_size: Size
    modules: Sequence[str]
    taps: Mapping[str, TracedLayer]
    refused: Mapping[str, str]
    reads: Sequence[tuple[int, tuple[str, ...], int]]
    aliases: Mapping[str, str]
    stages: Sequence[str]
    failure: str
    positions: Mapping[str, Positions | None]
    placements: dict[str, Placement] = field(default_factory=dict)

    def tap(self, layer: str) -> TracedLayer:
        """The tap of a layer, by module path or alias. Raises AfterimageError that says what is valid."""
        path = layer if layer in self.modules else self.aliases.get(layer, layer)
        if path in self.taps:
            tap = self.taps[path]
            if path not in self.placements:
                self.placements[path] = find_placement(self.positions[path], tap.layout, self.image_size)
            return replace(tap, placement=self.placements[path])
        if path not in self.modules:
            valid = dict.fromkeys([*self.names, *self.by_order])
            raise unknown(f"layer of {self.model}", layer, valid, limit=min(40, max(12, len(self.names))))
        if path not in self.refused and self.failure:
            raise cannot_run(self.model, self.image_size, self.failure)
        reason = self.refused.get(path, "it does not run as a module of its own")
        raise AfterimageError(
            f"{self.model}:{layer} cannot be inverted: {reason}. Valid: {', '.join(self.names)}; "
            f"`afterimage layers {self.model} --all-modules` lists every module"
        )

    @property
    def early_end(self) -> str:
        """Where and why the network ended before its end, and the size that works; "" where it ran through."""
        if not self.failure:
            return ""
        works = _size_that_works(self.model, self.image_size)
        return (
            f"{self.model} ended early on {self.image_size[0]}x{self.image_size[1]} images ({self.failure}): layers "
            f"after {self.by_order[-1] if self.taps else 'its start'} are not listed"
            + (f"; it runs to its end on {works}" if works else "")
        )

    @property
    def by_order(self) -> list[str]:
        """Every module that can be inverted, in order of execution, by alias where there is one."""
        short = {path: alias for alias, path in self.aliases.items()}
        return [short.get(path, path) for path in sorted(self.taps, key=lambda path: self.taps[path].order)]

    @property
    def names(self) -> list[str]:
        """The layers worth listing, likewise."""
        return [name for name in self.by_order if self.aliases.get(name, name) in self.stages]

    def used(self, taps: Sequence[TracedLayer]) -> list[tuple[str, ...]]:
        """The saved tensors that the layers in use read, each by all the names that it goes by."""
        last = max(tap.clock for tap in taps)
        return [names for clock, names, _ in self.reads if clock <= last]


class _Unbuildable(Exception):
    """Why a model cannot be built for a size."""


def cannot_run(model: str, size: Size, reason: str) -> AfterimageError:
    works = _size_that_works(model, size)
    return AfterimageError(
        f"{model} cannot run on {size[0]}x{size[1]} images ({reason})"
        + (f"; it can on {works}" if works else "")
    )


def _size_that_works(model: str, size: Size) -> str:
    """The size of a model's pretraining, in words, if it runs to the end there; else ""."""
    native = native_size(model)
    with contextlib.suppress(AfterimageError):
        if native != size and not trace(model, native).failure:
            return f"{native[0]}x{native[1]}, the size of its pretraining"
    return ""


@functools.lru_cache(maxsize=32)
def trace(name: str, image_size: Size) -> Trace:
    """Trace a timm model (name with tag). Raises AfterimageError if it cannot be built for `image_size`."""
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
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)  # of a timm model without any too
    nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
    taps, refused, positions = {}, {}, {}
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
        taps[path] = TracedLayer(path, layout, event.order, event.clock, total, event.macs, event.overwritten)
    modules = tuple(path for path, _ in model.named_modules() if path)
    short = aliases(model, name)
    stages = _stages(model, taps, short.values())
    return Trace(name, image_size, modules, taps, refused, reads, short, stages, first.failure, positions)


def _blank(name: str, image_size: Size, device: str = "meta") -> nn.Module:
    """The model without weights, and without storage where that is possible and not slow.

    Not every model, nor every version of timm, can be built on the meta device, and it unrolls a recurrent
    network far too slowly.
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
    """Two images, wider, else larger, else just two: the first that gets as far as one did."""
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
    names: dict[int, list[str]] = {}
    counts: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(storage(tensor), []).append(name)
        counts[storage(tensor)] = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
    return sorted((seen.first_read[s], tuple(names[s]), counts[s]) for s in names if s in seen.first_read)


def _stages(
    model: nn.Module, taps: Mapping[str, TracedLayer], named: Collection[str], depth: int = 4
) -> list[str]:
    """The layers worth listing: those with a name in the study (`named`), those that timm declares, and the
    outermost other modules that are made of several, unless they are most of the network.

    Where layers have a name in the study, single operations are left out.
    """
    infos = getattr(model, "feature_info", None) or ()
    declared = {info["module"] for info in infos if isinstance(info, dict)}
    found: list[str] = []

    def visit(parent: nn.Module, prefix: str, level: int) -> None:
        for name, module in parent.named_children():
            path = f"{prefix}{name}"
            composite = any(True for _ in module.children())
            inside = [other for other in taps if other.startswith(f"{path}.")]
            whole = composite and len(inside) < len(taps) / 2 and set(named).isdisjoint(inside)
            if path in taps and (path in named or whole or (path in declared and (composite or not named))):
                found.append(path)
            elif level < depth:
                visit(module, f"{path}.", level + 1)

    visit(model, "", 1)
    return found
