"""Random controls: untrained networks whose blocks act.

In timm many residual branches start closed, so that training begins near the identity. The last norm of a
branch has weight zero (ResNet, RegNet, Swin v2, LeViT), or a gain multiplies the branch by zero (NFNet) or by
1e-6 to 0.1 (LayerScale), or its convolutions have a standard deviation of 0.02 whatever their number of
inputs. Such a network passes on little more than the output of its stem and its downsampling. `open_branches`
opens the branches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CLOSED = 0.2
"""Factor or gain below which a branch is closed. LayerScale starts at 0.1 at most, and weights with a
standard deviation of 0.02 have a smaller gain for up to 99 inputs; the next larger gain in timm's networks is
0.28 (192 inputs at 0.02).
"""


def open_branches(model: nn.Module, factors: Collection[str], matrices: Collection[str]) -> None:
    """Scale the weights of an untrained network in place so that every block acts.

    A parameter that multiplies features, elementwise or as a norm's weight, and has the same value below
    `CLOSED` everywhere is set to 1. A matrix or convolution whose gain is below `CLOSED` is scaled to gain 1,
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
                if parameter.amax().abs() < CLOSED:
                    parameter.fill_(1)
            elif name in matrices and parameter.ndim > 1:
                gain = parameter.double().square().mean().sqrt().item() * math.sqrt(parameter[0].numel())
                if 0 < gain < CLOSED:
                    parameter.mul_(1 / gain)


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
