"""Measure which modules of a model return feature maps, their shapes, and the network's cost up to each one.

Nothing is declared. The model is observed on images of two sizes, before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence

import torch
from torch import nn

from afterimage.config import AfterimageError, size_pair, split_source, unknown_choice_error
from afterimage.models.encoders.forward_trace import ForwardTrace, storage
from afterimage.models.encoders.layers import (
    OUTPUT,
    ROLES,
    TracedLayer,
    layers_by_role,
    select_listed_layers,
)
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.providers.base import Network, SkipInit, open_branches, seeded
from afterimage.models.encoders.tensor_layout import NotAFeatureMap, Shapes, Size, find_layout, find_vector
from afterimage.runs.results import FeatureMap


class Trace:
    """A network on images of one size: its layers, and the reasons why other modules are not layers.

    Args:
        network: the network
        image_size: `(height, width)` of the images in pixels

    Attributes:
        modules: paths of all modules; the path of the whole network is empty
        layers: the modules whose output is a feature map, by path
        vectors: the modules whose output is one vector, by path
        aliases: module paths by short name
        layers_with_role: layers that the network has by role, a key of `ROLES`
        reads: saved tensors in the order in which they are first read: index of the operation, names, number of
            parameters
        failure: reason why the network stopped before its end; empty if it did not

    Raises:
        AfterimageError: the network cannot be built for images of this size
    """

    def __init__(self, network: Network, image_size: Size) -> None:
        self.network, self.image_size = network, image_size
        try:
            model = _build_without_weights(network, image_size)
        except Exception as error:
            raise cannot_run(network, image_size, f"{type(error).__name__}: {error}") from error
        first = ForwardTrace(model, _images(network, model, 1, image_size), follow=True)
        if (first.failure or first.flow.needs_values) and _device(model) == "meta":
            model = _build_without_weights(network, image_size, "cpu")
            first = ForwardTrace(model, _images(network, model, 1, image_size), follow=True)
        second, later_size = _trace_other_size(network, model, image_size, first)
        self._later = {path: event.shapes for path, event in second.events.items()}
        self._sizes = image_size, later_size
        self._events, self.failure = first.events, first.failure
        self._prefix, self._nhwc = network.prefix_tokens(model), getattr(model, "output_fmt", "") == "NHWC"
        self._uses = first.factors, first.matrices
        self.reads = _reads(model, first)
        self.modules = dict.fromkeys(path for path, _ in model.named_modules())
        self.aliases = network.aliases(model) | ({} if OUTPUT in self.modules else {OUTPUT: ""})
        self.layers: dict[str, TracedLayer] = {}
        self.vectors: dict[str, TracedLayer] = {}
        for path in self._events:
            with contextlib.suppress(NotAFeatureMap):
                found = self._find(path)
                (self.vectors if found.is_vector else self.layers)[path] = found
        self._stages = select_listed_layers(model, self.layers, set(self.aliases.values()) - {""})
        self.layers_with_role: dict[str, TracedLayer] = {}
        if not self.failure:
            pooler = None
            with contextlib.suppress(NotAFeatureMap):
                pooler = self._find("", ("pooler_output",))
            self.layers_with_role = layers_by_role(model, self.layers, self.vectors, pooler)

    def _find(self, path: str, keys: Sequence[str] = ()) -> TracedLayer:
        """Find the feature map or vector that a module returns under some keys.

        Raises:
            NotAFeatureMap: it is neither a feature map nor a vector
        """
        if path not in self._events:
            raise NotAFeatureMap("it does not run as a module of its own")
        event = self._events[path]
        if event.rejection_reason:
            raise NotAFeatureMap(event.rejection_reason)
        if event.runs > 1:
            raise NotAFeatureMap(f"it runs {event.runs} times in one pass, so that its output is ambiguous")
        if path not in self._later:
            raise NotAFeatureMap("it does not run on images of every size")
        shapes, later = (
            [(key, shape) for key, shape in found if [str(step) for step in key[: len(keys)]] == list(keys)]
            for found in (event.shapes, self._later[path])
        )
        if keys and not shapes:
            raise NotAFeatureMap(f"nothing it returns is called {_bracketed(keys)}")
        positions, is_vector = None, False
        try:
            layout = find_layout(shapes, later, self._sizes, self._prefix, self._nhwc, event.positions)
            positions = event.positions[layout.key]
        except NotAFeatureMap as reason:
            layout, is_vector = find_vector(shapes, later), True
            if layout is None:
                raise NotAFeatureMap(f"{reason}{self._hint(path, shapes)}") from None
        total = sum(count for index, _, count in self.reads if index <= event.operation_index)
        return TracedLayer(
            path, layout, event.order, event.operation_index, total, event.macs, is_vector, positions
        )

    def _hint(self, path: str, shapes: Shapes) -> str:
        hint = ""
        if len(shapes) > 1:
            listed = ", ".join(f"{_bracketed(key)} {'x'.join(map(str, shape))}" for key, shape in shapes)
            hint = f"; it returns {listed}: name one as {path or OUTPUT}[KEY]"
        if self.network.is_custom and self._prefix is None and any(len(shape) == 3 for _, shape in shapes):
            hint += "; the network's attribute prefix_tokens may say how many tokens come before the map's"
        return hint

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
        if path in ROLES and path not in self.modules and path not in self.layers_with_role:
            if self.failure:
                raise cannot_run(self.network, self.image_size, self.failure)
            raise AfterimageError(
                f"{model} has no layer {path!r} ({ROLES[path]}). By role it has "
                f"{', '.join(self.layers_with_role) or 'none'}; "
                f"`afterimage layers {model} --all-modules` lists every module"
            )
        if path not in self.modules and path not in self.layers_with_role:
            valid = dict.fromkeys([*self.names, *self.by_order, *self.layers_with_role, OUTPUT])
            raise unknown_choice_error(
                f"layer of {model}", name, valid, limit=min(40, max(12, len(self.names)))
            )
        try:
            return self._find(path, keys) if path in self.modules else self.layers_with_role[path]
        except NotAFeatureMap as reason:
            if path not in self._events and self.failure:
                raise cannot_run(self.network, self.image_size, self.failure) from None
            raise AfterimageError(
                f"{model}:{name} cannot be inverted: {reason}. Valid: {', '.join(self.names or self.by_order)}; "
                f"`afterimage layers {model} --all-modules` lists every module"
            ) from None

    def describe(self, name: str) -> FeatureMap:
        """Describe a layer by its name, see `layer`."""
        return self.layer(name).feature_map(f"{self.network.name}:{name}", self.image_size)

    def list_layers(self, *, all_modules: bool = False) -> list[FeatureMap]:
        """List stages and blocks, or every module that returns a feature map, in order of execution.

        Raises:
            AfterimageError: there are none
        """
        if not self.layers:
            reason = self.failure or "no module returns a feature map"
            raise cannot_run(self.network, self.image_size, reason)
        return [
            self.describe(name) for name in (self.by_order if all_modules else self.names or self.by_order)
        ]

    def list_named(self) -> list[FeatureMap]:
        """List the layers that the network has by role, except roles that are also module paths."""
        return [self.describe(name) for name in self.layers_with_role if name not in self.modules]

    @property
    def early_stop_note(self) -> str:
        """Note on where and why the network stopped before its end, and which image size works.

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
        return [name for name in self.by_order if self.aliases.get(name, name) in self._stages]

    def tensors_read_by(self, layers: Sequence[TracedLayer]) -> list[tuple[str, ...]]:
        """Return the saved tensors that the given layers read, each as a tuple of all its names."""
        last = max(layer.operation_index for layer in layers)
        return [names for index, names, _ in self.reads if index <= last]

    def create_random(self, seed: int, kind: str = "random") -> nn.Module:
        """Build a random control.

        Args:
            seed: seed of the weights
            kind: `random` (every block acts) or `random-init` (its library's own initialisation)
        """
        model = self.network.create_untrained(self.image_size, seed)
        if kind == "random":
            open_branches(model, *self._uses)
        return model


def cannot_run(network: Network, size: Size, reason: str) -> AfterimageError:
    """Create the error for a network that cannot run on images `(height, width)`, with the reason."""
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


def _bracketed(keys: Sequence[int | str]) -> str:
    return "".join(f"[{key}]" for key in keys)


def _build_without_weights(network: Network, image_size: Size, device: str = "meta") -> nn.Module:
    """Build the model without weights, and without storage if that is possible and fast.

    Some models, and some versions of timm, cannot be built on the meta device. Recurrent networks are not run
    on it either, because it unrolls them far too slowly.
    """
    with seeded(0), SkipInit():
        if device == "meta":
            with contextlib.suppress(Exception):
                model = network.create(image_size, device="meta")
                if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
                    return model
        return network.create(image_size)


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _images(network: Network, model: nn.Module, count: int, size: Size) -> torch.Tensor:
    return torch.zeros(count, network.channels, *size, device=_device(model))


def _trace_other_size(
    network: Network, model: nn.Module, size: Size, first: ForwardTrace
) -> tuple[ForwardTrace, Size]:
    """Trace the model on two images that are wider, larger, or of the same size.

    The first of these sizes is used on which the model runs as far as it did on one image.
    """
    height, width = size
    for other in ((height, 2 * width), (2 * height, 2 * width), size):
        candidate = model
        if network.has_fixed_size and other != size:
            try:
                candidate = _build_without_weights(network, other, _device(model))
            except Exception:
                continue
        second = ForwardTrace(candidate, _images(network, candidate, 2, other))
        if len(second.events) >= len(first.events):
            break
    return second, other


def _reads(model: nn.Module, traced: ForwardTrace) -> list[tuple[int, tuple[str, ...], int]]:
    """List saved tensors as `Trace.reads` does."""
    names: dict[int, list[str]] = {}
    counts: dict[int, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(storage(tensor), []).append(name)
        counts[storage(tensor)] = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
    first_read = traced.first_read
    return sorted((first_read[s], tuple(names[s]), counts[s]) for s in names if s in first_read)


trace = functools.lru_cache(maxsize=32)(Trace)
"""Return the `Trace` of a network for images of a size; the last 32 are cached."""


def list_layers(
    model: str, image_size: int | Sequence[int] = 224, *, all_modules: bool = False
) -> list[FeatureMap]:
    """List the layers of a model that can be inverted, in order of execution. No weights are needed.

    Args:
        model: `[provider/]model`
        image_size: side of the images in pixels, or `(height, width)`
        all_modules: whether to list every module that returns a feature map, not only stages and blocks

    Raises:
        AfterimageError: the model is unknown or cannot run on images of that size
    """
    return trace(open_network(model), size_pair(image_size)).list_layers(all_modules=all_modules)


def layer_info(source: str, image_size: int | Sequence[int] = 224) -> FeatureMap:
    """Describe one layer, `model:layer`, which may be any module that returns a feature map.

    Args:
        source: `[provider/]model:layer`
        image_size: side of the images in pixels, or `(height, width)`

    Raises:
        AfterimageError: the model or layer is unknown, or the layer's output is not a feature map
    """
    model, layer = split_source(source)
    return trace(open_network(model), size_pair(image_size)).describe(layer)
