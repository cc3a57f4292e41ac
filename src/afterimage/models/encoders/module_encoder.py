"""Use any network as an encoder, imported as `package.module:factory`; layers may return maps, tokens or vectors."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import AfterimageError, FeatureSpec, local_path, unknown
from afterimage.models.encoders.base import Frozen, size_pair
from afterimage.models.encoders.forward_trace import ForwardTrace, ModuleCall
from afterimage.models.encoders.placement import Placement, find_placement
from afterimage.models.encoders.random_init import seeded
from afterimage.models.encoders.tensor_layout import Key, Layout, Refused, Shapes, find_grid, find_layout
from afterimage.models.weights import Weights

OUTPUT = "output"
"""The layer's name for what the whole network returns."""


class VectorLayout(Layout):
    """The layout of vectors `(B, C)`, which become maps of one location."""

    def __call__(self, output: Any) -> Tensor:
        return super().__call__(output)[:, :, None, None]


@dataclass(frozen=True)
class LayerOutput:
    """The source of a layer's features.

    Attributes:
        module: path of the module; empty for the whole network
        layout: how its output becomes a feature map
        placement: positions of its locations in the image
    """

    module: str
    layout: Layout
    placement: Placement = Placement()


class _Root(nn.Module):
    """Gives the network itself a module path, so that it can be observed like its modules."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.output = network

    def forward(self, images: Tensor) -> Any:
        return self.output(images)


class CustomEncoder(Frozen):
    """The features of layers of any network, for images in [0, 1]; frozen and in evaluation mode.

    A layer is a module's path, or `output` for what the network returns. If that is a dict or a tuple with
    several maps, brackets select one: `output[features]`, `neck[0]`. Shapes, the order of axes (NCHW, NHWC,
    tokens, vectors), prefix tokens and the positions of locations are measured.

    Args:
        network: the network
        layers: names of the layers
        name: name of the encoder
        image_size: side of the images in pixels, or `(height, width)`
        mean: channel means by which images are normalised
        std: channel standard deviations for the same
        prefix_tokens: number of prefix tokens, needed only where it cannot be measured

    Attributes:
        model_name: name of the encoder
        sources: `name:layer` for each layer
        specs: measured shape of each layer's features
        weights: origin of the weights
        places: where the features of each layer come from
        notes: remarks for a run's notes

    Raises:
        AfterimageError: the network raises an error, has no such layer, or returns no feature map there
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        *,
        name: str = "own",
        image_size: int | tuple[int, int] = 224,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._prefix_tokens = prefix_tokens
        self.model_name, self.image_size = name, size_pair(image_size)
        self.model = network
        self.requires_grad_(False).train(False)
        self.weights = Weights(name, "own", name, _digest(network))
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(
                key, torch.tensor(tuple(values), dtype=torch.float32).view(1, 3, 1, 1), False
            )
        self.places = [self._place(layer, seen) for seen in [self._observe()] for layer in layers]
        self.sources = tuple(f"{name}:{layer}" for layer in layers)
        self.specs = tuple(
            FeatureSpec(
                source,
                place.layout.channels,
                place.layout.height,
                place.layout.width,
                place.placement.rows,
                place.placement.columns,
            )
            for source, place in zip(self.sources, self.places, strict=True)
        )
        self.notes = self._try()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Compute the feature maps `(B, C, h, w)` of images in [0, 1], one for each layer.

        Raises:
            AfterimageError: the network raises an error, or features have another shape than before or are not
                finite
        """
        found: dict[int, Tensor] = {}
        hooks = []
        for index, place in enumerate(self.places):
            module = self.model.get_submodule(place.module)
            hooks.append(module.register_forward_hook(_keep(found, index, place.layout)))
        try:
            with torch.set_grad_enabled(self._gradients and torch.is_grad_enabled()):
                self.run(images)
        finally:
            for hook in hooks:
                hook.remove()
        for index, spec in enumerate(self.specs):
            expected = (len(images), *spec.shape)
            if index not in found or tuple(found[index].shape) != expected:
                got = tuple(found[index].shape) if index in found else "nothing"
                raise AfterimageError(f"{spec.source} returned {got} where {expected} was measured before")
            if not found[index].isfinite().all():
                raise AfterimageError(f"{spec.source} returns values that are not finite")
        return [found[index] for index in range(len(self.places))]

    def run(self, images: Float[Tensor, "batch 3 height width"]) -> Any:
        """Return what the network returns for images in [0, 1]."""
        try:
            # Out of place, so that a network that writes into its input cannot change the images.
            return self.model((images - self.mean) / self.std)
        except AfterimageError:
            raise
        except Exception as error:
            raise _raised(self.model_name, tuple(images.shape), f"{type(error).__name__}: {error}") from error

    def _observe(self) -> tuple[ForwardTrace, ForwardTrace, tuple[int, int]]:
        root = _Root(self.model)
        height, width = self.image_size
        first = ForwardTrace(root, torch.zeros(1, 3, height, width), follow=True)
        if first.failure:
            raise _raised(self.model_name, (1, 3, height, width), first.failure)
        # To see which axes grow with the image: a wider image, or a larger one, or two of the same size.
        for size in ((height, 2 * width), (2 * height, 2 * width), (height, width)):
            second = ForwardTrace(root, torch.zeros(2, 3, *size))
            if not second.failure:
                return first, second, size
        raise _raised(self.model_name, (2, 3, height, width), second.failure)

    def _place(self, layer: str, seen: tuple[ForwardTrace, ForwardTrace, tuple[int, int]]) -> LayerOutput:
        path, keys = _parse(layer)
        module = "" if path == OUTPUT else path
        first, second, size = seen
        name = f"output.{module}" if module else OUTPUT
        known = [OUTPUT, *(event.removeprefix("output.") for event in first.events if event != OUTPUT)]
        if name not in first.events:
            raise unknown(f"layer of {self.model_name}", path, known)
        event = first.events[name]
        try:
            if event.refused or event.runs > 1:
                raise Refused(event.refused or f"it runs {event.runs} times in one pass")
            if name not in second.events:
                raise Refused("it does not run on images of every size")
            shapes, later = _chosen(event, keys), _chosen(second.events[name], keys)
            layout = self._layout(shapes, later, size, event)
            if layout.axes == "NC":
                return LayerOutput(module, layout)
            return LayerOutput(
                module, layout, find_placement(event.positions[layout.key], layout, self.image_size)
            )
        except Refused as reason:
            shapes = ", ".join(f"{_text(key)} {'x'.join(map(str, shape))}" for key, shape in event.shapes)
            hint = f"; it returns {shapes}, name one as {path}[KEY]" if len(event.shapes) > 1 else ""
            if any(len(shape) == 3 for _, shape in event.shapes) and self._prefix_tokens is None:
                hint += "; of tokens, prefix_tokens (--prefix-tokens) says how many come before the map's"
            raise AfterimageError(
                f"{self.model_name}:{layer} cannot be audited: {reason}{hint}. Layers: {', '.join(known[:40])}"
            ) from None

    def _layout(self, shapes: Shapes, later: Shapes, size: tuple[int, int], event: ModuleCall) -> Layout:
        vectors = [(key, shape) for key, shape in shapes if len(shape) == 2 and shape[0] == 1]
        if len(shapes) == len(vectors) == 1 and dict(later).get(vectors[0][0]) == (2, vectors[0][1][1]):
            key, (_, channels) = vectors[0]
            return VectorLayout("NC", channels, 1, 1, key=key)
        given, sizes = self._prefix_tokens, (self.image_size, size)
        try:
            layout = find_layout(shapes, later, sizes, positions=event.positions)
        except Refused:
            tokens = [(key, shape) for key, shape in shapes if len(shape) == 3 and shape[0] == 1]
            if given is None or len(tokens) != 1:
                raise
            grid = find_grid(tokens[0][1][1] - given, self.image_size)
            if grid is None:
                raise
            key, (_, _, channels) = tokens[0]
            return Layout("NLC", channels, *grid, prefix=given, key=key)
        if given is not None and layout.axes in ("NLC", "NCL") and layout.prefix != given:
            raise Refused(
                f"prefix_tokens is {given}, but {layout.prefix} of its tokens come before the map's"
            )
        return layout

    @torch.no_grad()
    def _try(self) -> list[str]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, *self.image_size, generator=generator)
        once, again, alone = self(images), self(images), self(images[:1])
        notes = []
        if any(not torch.equal(a, b) for a, b in zip(once, again, strict=True)):
            notes.append(
                f"the features of {self.model_name} differ from one pass to the next on equal images"
            )
        elif any(
            not torch.allclose(a[:1], b, rtol=1e-3, atol=1e-4) for a, b in zip(once, alone, strict=True)
        ):
            notes.append(f"an image's features in {self.model_name} depend on the others in its batch")
        return notes


def load_factory(text: str) -> nn.Module:
    """Import and call a factory of a network.

    Args:
        text: `package.module:factory` or `path/to/file.py:factory`; the working folder is searched too

    Raises:
        AfterimageError: the factory cannot be imported, does not exist, raises an error, or returns no
            `nn.Module`
    """
    where, colon, name = text.rpartition(":")
    if not (where and colon and name):
        raise AfterimageError(f"--encoder {text!r} must be written package.module:factory")
    try:
        module = _import(where)
        factory: Callable[[], Any] = getattr(module, name, None)
        if factory is None:
            raise unknown(f"factory in {where}", name, [n for n in vars(module) if not n.startswith("_")])
        with seeded(0):
            network = factory()
    except AfterimageError:
        raise
    except (Exception, SystemExit) as error:
        raise AfterimageError(f"--encoder {text} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise AfterimageError(f"--encoder {text} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _import(where: str) -> Any:
    if where.endswith(".py"):
        file = Path(local_path(where))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not search the working folder
    return importlib.import_module(where)


def _keep(found: dict[int, Tensor], index: int, layout: Layout) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        try:
            found[index] = layout(output).clone()
        except Exception as error:
            raise AfterimageError(f"the network returned something else than before: {error}") from error

    return hook


def _parse(layer: str) -> tuple[str, list[str]]:
    """Split `neck[0][map]` into its path and its keys."""
    match = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]+\])*)", layer)
    if match is None:
        raise AfterimageError(
            f"layer {layer!r} must be a module's path, with keys in brackets: output[features]"
        )
    return match[1], re.findall(r"\[([^\[\]]+)\]", match[2])


def _chosen(event: ModuleCall, keys: Sequence[str]) -> Shapes:
    shapes = [(key, s) for key, s in event.shapes if [str(step) for step in key[: len(keys)]] == list(keys)]
    if keys and not shapes:
        raise Refused(f"nothing it returns is called {''.join(f'[{key}]' for key in keys)}")
    return shapes


def _text(key: Key) -> str:
    return "".join(f"[{step}]" for step in key)


def _raised(name: str, shape: tuple[int, ...], reason: str) -> AfterimageError:
    return AfterimageError(f"{name} cannot run on images {shape} in [0, 1]: {reason}")


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
