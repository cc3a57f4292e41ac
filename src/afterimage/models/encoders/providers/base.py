"""Base class of networks: how to build them with weights of a file or random ones, and how they normalise images."""

from __future__ import annotations

import abc
import contextlib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from afterimage.config import AfterimageError, join_names
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.weight_files import NamedTensors, read_named_tensors
from afterimage.models.weights import Weights, best_match, most_similar_name

State = Mapping[str, Tensor]
Convert = Callable[[dict[str, Tensor]], State]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLOSED_GAIN = 0.2
"""Factor or gain below which a branch is closed. LayerScale starts at 0.1 at most, and weights with a
standard deviation of 0.02 have a smaller gain for up to 99 inputs; the next larger gain in timm's networks is
0.28 (192 inputs at 0.02).
"""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers inside this block; torch's global generator is restored afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class SkipInit(TorchFunctionMode):
    """Context that skips random draws of parameters, which take longer than the rest of a network's construction.

    For networks whose parameters are loaded afterwards, or never read.
    """

    DRAWS = frozenset(
        [Tensor.normal_, Tensor.uniform_, Tensor.erfinv_]
        + [getattr(nn.init, f"{name}_") for name in ("normal", "uniform", "trunc_normal", "orthogonal")]
        + [
            getattr(nn.init, f"{name}_{kind}_")
            for name in ("kaiming", "xavier")
            for kind in ("normal", "uniform")
        ]
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Network(abc.ABC):
    """One network of one provider.

    Attributes:
        name: provider, model and tag of the weights, as in a source's name; timm's names have no provider
        mean: channel means with which it normalises images in [0, 1]: three, or one if it takes the luminance
            of images
        std: channel standard deviations, likewise
        native_size: `(height, width)` in pixels of the images that its weights are for
        has_fixed_size: whether it is built for one image size; other networks take any size
        classifiers: prefixes of the names of its classifier's tensors; empty if it has none
        channels_last: whether it runs in channels-last memory order, which is faster
        blocks: paths at which its provider's networks have their blocks
        code: SHA-256 of the file with the code of a user's network; empty for others
        is_custom: whether it is a user's network, which brings its own weights and is first tried on images
    """

    channels_last: ClassVar[bool] = False
    blocks: ClassVar[Sequence[str]] = ()
    is_custom: ClassVar[bool] = False
    name: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    native_size: Size = (224, 224)
    has_fixed_size: bool = False
    classifiers: tuple[str, ...] = ()
    code: str = ""

    @property
    def channels(self) -> int:
        """Number of image channels that the network takes: 3, or 1 for the luminance."""
        return len(self.mean)

    @property
    def input_notes(self) -> tuple[str, ...]:
        """Notes for the run's result on how images reach the network."""
        if self.channels == 3:
            return ()
        return (f"{self.name} takes one channel: images reach it as their luminance (ITU-R BT.601)",)

    def __deepcopy__(self, memo: dict) -> Network:
        return self

    @classmethod
    @abc.abstractmethod
    def open(cls, name: str) -> Network:
        """Return the description of a network by its provider's name.

        Raises:
            AfterimageError: the provider does not have the network, or is not installed
        """

    @abc.abstractmethod
    def build(self, image_size: Size) -> nn.Module:
        """Build the network with its library's own initialisation, for images `(height, width)`."""

    def create(self, image_size: Size, *, device: str = "cpu", **options: Any) -> nn.Module:
        """Build the network in evaluation mode on a device, without its library's warnings.

        Args:
            image_size: `(height, width)` of the images in pixels
            device: device of the parameters
            options: further arguments of `build`
        """
        with warnings.catch_warnings(), torch.device(device):
            warnings.simplefilter("ignore")
            return self.build(image_size, **options).eval()

    @abc.abstractmethod
    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        """Find the network's weights: `pretrained`, or the path of a file or folder; see `search_weights`."""

    def aliases(self, module: nn.Module) -> dict[str, str]:
        """Return short names of layers, `{alias: module path}`; real module paths take precedence.

        These are `block0` and on for the children of the first of the paths `blocks` that exists.
        """
        for path in self.blocks:
            with contextlib.suppress(AttributeError):
                children = module.get_submodule(path).named_children()
                return {f"block{i}": f"{path}.{name}" for i, (name, _) in enumerate(children)}
        return {}

    def prefix_tokens(self, module: nn.Module) -> int | None:
        """Return the declared number of tokens before the map's; None if it must be measured."""
        return None

    def convert(self, module: nn.Module, image_size: Size) -> Convert | None:
        """Return a function from a publisher's names and shapes to the module's own, or None."""
        return None

    def create_untrained(self, image_size: Size, seed: int) -> nn.Module:
        """Build the network with its library's own initialisation, drawn from a seed."""
        with seeded(seed):
            return self.create(image_size)

    def load(
        self, image_size: Size, weights: Weights, used: Sequence[tuple[str, ...]]
    ) -> tuple[nn.Module, str]:
        """Build the network with the weights of a file.

        Args:
            image_size: `(height, width)` of the images in pixels
            weights: the weights, from `find_weights`
            used: the tensors that the file must hold, each as a tuple of all its names

        Returns:
            the network, and a note on the position of the weights in the file (see `best_match`), empty if that
                is obvious

        Raises:
            AfterimageError: a used tensor is missing, does not fit or is not finite; the message names the
                file
        """
        file = read_named_tensors(weights.file)
        with seeded(0), SkipInit():
            module = self.create(image_size)
        return module, self.load_tensors(module, image_size, file, used, self.convert(module, image_size))

    def load_tensors(
        self,
        module: nn.Module,
        image_size: Size,
        file: NamedTensors,
        used: Sequence[tuple[str, ...]],
        convert: Convert | None,
    ) -> str:
        """Load a file's tensors into the network as `load` does.

        The file may hold only a part of the network. `convert` turns a publisher's names and shapes into the
        network's own; it may be None.
        """
        name, own = self.name, module.state_dict()
        required = [names for names in used if own[names[0]].is_floating_point()]
        match, note = best_match(
            file, own, required, lambda state: _fit(name, convert, state, own, file.file)
        )
        if match.missing:
            like = most_similar_name(file, match.missing[0])
            hint = f"; most like {match.missing[0]} is {like}" if like else ""
            raise AfterimageError(
                f"{file.file} lacks {join_names(match.missing)}, which the layers in use of {name} read; "
                f"{file.describe()}{hint}"
            )
        read = {key for names in used for key in names}
        known = {key: value for key, value in match.state.items() if key in own}
        misfits = {key: value for key, value in known.items() if value.shape != own[key].shape}
        wrong = [
            f"{key} is {_shape(value)} there and {_shape(own[key])} in the model"
            for key, value in misfits.items()
            if key in read or not key.startswith(self.classifiers)
        ]
        if wrong:
            native = self.native_size
            resized = (
                f" (built for {image_size[0]}x{image_size[1]} images; its weights are for {native[0]}x{native[1]})"
                if self.has_fixed_size and native != image_size
                else ""
            )
            raise AfterimageError(f"{file.file} does not fit {name}: {join_names(wrong)}{resized}")
        broken = [key for key in known if key in read and not known[key].sum(dtype=torch.float32).isfinite()]
        if broken:
            raise AfterimageError(f"{file.file} holds values that are not finite, in {join_names(broken)}")
        module.load_state_dict(
            {key: value for key, value in known.items() if key not in misfits}, strict=False
        )
        return note

    def without_classifier(self, module: nn.Module) -> nn.Module:
        """Replace the classifier by an identity, so that the network returns an embedding."""
        for name in {*self.classifiers} & dict(module.named_children()).keys():
            setattr(module, name, nn.Identity())
        return module


def open_branches(model: nn.Module, factors: Collection[str], matrices: Collection[str]) -> None:
    """Scale the weights of an untrained network in place so that every block acts.

    In timm many residual branches start closed, so that training begins near the identity. The last norm of a
    branch has weight zero (ResNet, RegNet, Swin v2, LeViT), or a gain multiplies the branch by zero (NFNet) or
    by 1e-6 to 0.1 (LayerScale), or its convolutions have a standard deviation of 0.02 whatever their number of
    inputs. Such a network passes on little more than the output of its stem and its downsampling.

    A parameter that multiplies features, elementwise or as a norm's weight, and has the same value below
    `CLOSED_GAIN` everywhere is set to 1. A matrix or convolution whose gain is below `CLOSED_GAIN` is scaled to gain 1,
    where the gain is the root mean square times the square root of the number of inputs. Parameters that are
    added (biases, position embeddings, class tokens) close nothing and stay unchanged. The result depends
    only on the parameters.

    Args:
        model: the network
        factors: names of the parameters that multiply features, see `ForwardTrace`
        matrices: names of the matrices and convolutions that act on features
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in factors and parameter.amin() == parameter.amax():
                if parameter.amax().abs() < CLOSED_GAIN:
                    parameter.fill_(1)
            elif name in matrices and parameter.ndim > 1:
                gain = parameter.double().square().mean().sqrt().item() * math.sqrt(parameter[0].numel())
                if 0 < gain < CLOSED_GAIN:
                    parameter.mul_(1 / gain)


def vgg_pool_aliases(module: nn.Module) -> dict[str, str]:
    """Return the published study's names of a VGG's pooled outputs, `block1` to `block5`."""
    pools = [f"features.{i}" for i, m in module.features.named_children() if isinstance(m, nn.MaxPool2d)]
    return {f"block{n}": path for n, path in enumerate(pools, start=1)}


def per_channel_values(values: Sequence[float | int], channels: int, name: str) -> tuple[float, ...]:
    """Return a network's means or standard deviations (`name` says which) per channel; one channel gets their mean.

    Raises:
        ValueError: there are not as many values, or a network that takes neither 3 channels nor 1
    """
    values = tuple(map(float, values))
    if channels not in (1, 3):
        raise ValueError(f"it takes {channels} channels; encoders of images take 3, or 1 for luminance")
    if len(values) not in (3, channels):
        raise ValueError(f"{name} must be three numbers, got {values}")
    return (sum(values) / len(values),) if channels == 1 else values


def _fit(
    name: str, convert: Convert | None, state: dict[str, Tensor], own: dict[str, Tensor], file: str
) -> State:
    """Convert a state dict to the network's names and shapes.

    Some filters distinguish formats by the classifier's key, so they need a complete network. If the names
    are already the network's own, missing tensors are filled in from it and removed afterwards.
    """
    if convert is None or all(key in own and value.shape == own[key].shape for key, value in state.items()):
        return state
    added = own.keys() - state.keys() if state.keys() <= own.keys() else ()
    try:
        fitted = convert({**state, **{key: own[key] for key in added}})
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise AfterimageError(f"{file} does not fit {name}: it cannot be converted ({reason})") from error
    return {key: value for key, value in fitted.items() if key not in added}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
