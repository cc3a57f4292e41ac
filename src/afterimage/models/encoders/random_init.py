"""Random controls: untrained networks whose blocks act.

In timm many residual branches start closed, so that training begins near the identity. The last norm of a
branch has weight zero (ResNet, RegNet, Swin v2, LeViT), or a gain multiplies the branch by zero (NFNet) or by
1e-6 to 0.1 (LayerScale), or its convolutions have a standard deviation of 0.02 whatever their number of
inputs. Such a network passes on little more than the output of its stem and its downsampling. `open_branches`
opens the branches.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afterimage.models.encoders.forward_trace import storage

CLOSED = 0.2
"""Factor or gain below which a branch is closed. LayerScale starts at 0.1 at most, and weights with a
standard deviation of 0.02 have a smaller gain for up to 99 inputs; the next larger gain in timm's networks is
0.28 (192 inputs at 0.02).
"""

_ATEN = torch.ops.aten
_FACTORS = {  # indices of the arguments that multiply features
    _ATEN.mul: (0, 1),
    _ATEN.mul_: (0, 1),
    _ATEN.addcmul: (1, 2),
    _ATEN.native_batch_norm: (1,),
    _ATEN._native_batch_norm_legit_no_training: (1,),
    _ATEN.native_layer_norm: (2,),
    _ATEN.native_group_norm: (1,),
    _ATEN._fused_rms_norm: (2,),
}
_MATRICES = frozenset([_ATEN.convolution, _ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm])


class _Uses(TorchDispatchMode):
    """Record of parameters that multiply something (`factors`) or are matrices on features (`matrices`).

    A view of a parameter counts as the parameter; a result computed from it does not. The tensors computed
    from `images` are followed, to distinguish features from tensors that depend on parameters only.
    """

    def __init__(self, parameters: dict[str, Tensor], images: Tensor) -> None:
        super().__init__()
        self.factors: set[str] = set()
        self.matrices: set[str] = set()
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            self._names[storage(parameter)].append(name)
        self._features = {storage(images)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func._overloadpacket
        read = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        on_features = not self._features.isdisjoint(read)
        for index, argument in enumerate(args):
            if isinstance(argument, Tensor):
                names = self._names.get(storage(argument), ())
                if index in _FACTORS.get(operation, ()):
                    self.factors.update(names)
                elif operation in _MATRICES and on_features:
                    self.matrices.update(names)
        result = func(*args, **(kwargs or {}))
        made = {storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        (self._features.update if on_features else self._features.difference_update)(made)
        return result


@dataclass(frozen=True)
class ParameterUses:
    """Uses of a network's parameters, by name; they depend on the architecture alone.

    Attributes:
        factors: parameters that multiply features, elementwise or as a norm's weight
        matrices: matrices and convolutions that act on features
    """

    factors: frozenset[str]
    matrices: frozenset[str]


def open_branches(model: nn.Module, uses: ParameterUses) -> None:
    """Scale the weights of an untrained network in place so that every block acts.

    A parameter that multiplies features, elementwise or as a norm's weight, and has the same value below
    `CLOSED` everywhere is set to 1. A matrix or convolution whose gain is below `CLOSED` is scaled to gain 1,
    where the gain is the root mean square times the square root of the number of inputs. Parameters that are
    added (biases, position embeddings, class tokens) close nothing and stay unchanged. The result depends
    only on the parameters.

    Args:
        model: the network
        uses: uses of its parameters, from `parameter_uses`
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in uses.factors and parameter.amin() == parameter.amax():
                if parameter.amax().abs() < CLOSED:
                    parameter.fill_(1)
            elif name in uses.matrices and parameter.ndim > 1:
                gain = parameter.double().square().mean().sqrt().item() * math.sqrt(parameter[0].numel())
                if 0 < gain < CLOSED:
                    parameter.mul_(1 / gain)


def parameter_uses(model: nn.Module, image_size: tuple[int, int], channels: int = 3) -> ParameterUses:
    """Find the uses of a network's parameters without relying on their names.

    One forward pass is observed, on the meta device, where nothing is computed, or on the CPU if the network
    cannot run on meta. If the network fails on images of this size, the uses seen before the failure are
    returned.

    Args:
        model: the network; the values of its parameters do not matter
        image_size: `(height, width)` of the images of the pass, in pixels
        channels: number of image channels that the model takes
    """
    tensors = (*model.parameters(), *model.buffers())
    with contextlib.suppress(Exception):
        uses, finished = _pass(
            copy.deepcopy(model, {id(t): _on_meta(t) for t in tensors}), (channels, *image_size), "meta"
        )
        if finished:
            return uses
    return _pass(model, (channels, *image_size), "cpu")[0]


def _on_meta(tensor: Tensor) -> Tensor:
    placed = tensor.detach().to("meta")
    return nn.Parameter(placed, False) if isinstance(tensor, nn.Parameter) else placed


def _pass(model: nn.Module, shape: tuple[int, int, int], device: str) -> tuple[ParameterUses, bool]:
    images, finished = torch.zeros(1, *shape, device=device), False
    seen = _Uses(dict(model.named_parameters(remove_duplicate=False)), images)
    with contextlib.suppress(Exception), torch.no_grad(), torch.device(device), seen:
        model(images)
        finished = True
    return ParameterUses(frozenset(seen.factors), frozenset(seen.matrices)), finished


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers inside this block; torch's global generator is restored afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Blank(TorchFunctionMode):
    """Context that skips the random initialisation of parameters.

    Their values are loaded later, and drawing them would take far longer than the rest of the construction.
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
    SCALINGS = frozenset([Tensor.mul_, Tensor.div_, Tensor.add_, Tensor.clamp_])

    def __init__(self) -> None:
        super().__init__()
        self.blank: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.DRAWS or func in self.SCALINGS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter) and (func in self.DRAWS or id(tensor) in self.blank):
                self.blank.add(id(tensor))
                return tensor
        return func(*args, **(kwargs or {}))
