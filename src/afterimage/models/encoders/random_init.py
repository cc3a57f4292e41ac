"""Random controls: an untrained network whose blocks act.

timm starts many residual branches closed, so that training begins with something near the identity: the last norm
of a branch weighs zero (ResNet, RegNet, Swin v2, LeViT), a gain multiplies it by zero (NFNet) or by 1e-6 to 0.1
(LayerScale), or its convolutions are drawn at a standard deviation of 0.02 whatever they add up. As it is, such a
network passes on what its stem and its downsampling make of an image. What follows opens the branches.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afterimage.models.encoders.forward_trace import storage

CLOSED = 0.2
"""A factor or a gain below this closes a branch: LayerScale starts at 0.1 at most, and a draw at 0.02 gains less than
0.2 of up to 99 inputs; above, the smallest that timm's networks have by themselves are 0.28 (192 inputs at 0.02)."""

_ATEN = torch.ops.aten
_FACTORS = {  # which arguments multiply features
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
    """Sees which parameters multiply something (`factors`) and which are matrices on features (`matrices`).

    A view of a parameter counts as the parameter; what is computed from one does not. `images` are followed to tell
    features from what depends on parameters alone.
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


def open_branches(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Let every block of an untrained network act, in place.

    A parameter that multiplies features, elementwise or as a norm's weight, and starts as one value below `CLOSED`
    becomes 1. A matrix, convolutions too, whose gain is below `CLOSED` is scaled to a gain of 1; the gain is its root
    mean square times the root of its number of inputs. Which parameters do what is seen in a pass, so no names are
    needed. What is added (biases, position embeddings, tables of relative positions, class tokens) closes nothing and
    stays as it is, zeros included. All of it is a function of the parameters alone.
    """
    uses = _observe(model, image_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in uses.factors and parameter.amin() == parameter.amax():
                if parameter.amax().abs() < CLOSED:
                    parameter.fill_(1)
            elif name in uses.matrices and parameter.ndim > 1:
                gain = parameter.double().square().mean().sqrt().item() * math.sqrt(parameter[0].numel())
                if 0 < gain < CLOSED:
                    parameter.mul_(1 / gain)


def _observe(model: nn.Module, image_size: tuple[int, int]) -> _Uses:
    """One pass on the meta device, which computes nothing, or a real one where a network cannot run there.

    Of a network that cannot run to its end on images of this size, what runs before that is seen.
    """
    tensors = (*model.parameters(), *model.buffers())
    with contextlib.suppress(Exception):
        uses, finished = _pass(
            copy.deepcopy(model, {id(t): _on_meta(t) for t in tensors}), image_size, "meta"
        )
        if finished:
            return uses
    return _pass(model, image_size, "cpu")[0]


def _on_meta(tensor: Tensor) -> Tensor:
    placed = tensor.detach().to("meta")
    return nn.Parameter(placed, False) if isinstance(tensor, nn.Parameter) else placed


def _pass(model: nn.Module, image_size: tuple[int, int], device: str) -> tuple[_Uses, bool]:
    images = torch.zeros(1, 3, *image_size, device=device)
    uses = _Uses(dict(model.named_parameters(remove_duplicate=False)), images)
    with contextlib.suppress(Exception), torch.no_grad(), torch.device(device), uses:
        model(images)
        return uses, True
    return uses, False


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed on the CPU and leave the global generator as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Blank(TorchFunctionMode):
    """Leave parameters as they were allocated where a model would draw them at random.

    They are loaded anyway, and drawing them takes far longer than all the rest of building a network.
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
