"""Users' networks: `python/package.module:factory`, `python/path/to/file.py:factory`, or an `nn.Module`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afterimage.config import AfterimageError, absolute_model, size_pair, split_provider
from afterimage.models.encoders.providers.base import Network, seeded
from afterimage.models.encoders.tensor_layout import Size
from afterimage.models.factories import call_factory, source_digest
from afterimage.models.weights import Weights, search_weights


@dataclass(frozen=True, eq=False)
class CustomNetwork(Network):
    """A user's network, which brings its own weights.

    It describes itself by attributes that are numbers: `mean` and `std` (without them images reach it in [0,
    1]), `image_size`, and `prefix_tokens`, the number of tokens before those of the map, for networks in
    which it cannot be measured.

    Attributes:
        module: the network
        prefix: its `prefix_tokens`
    """

    is_custom = True
    module: nn.Module | None = None
    prefix: int | None = None

    @classmethod
    def open(cls, name: str) -> CustomNetwork:
        """Import and call a factory.

        Args:
            name: `package.module:factory` or `path/to/file.py:factory`; the working folder is searched too

        Raises:
            AfterimageError: the factory cannot be imported, does not exist, raises an error, or returns no `nn.Module`
        """
        name = absolute_model(f"python/{name}")
        code = ""
        with contextlib.suppress(AfterimageError):  # calling it below says what is wrong
            code = source_digest(name)
        with seeded(0):
            return replace(cls.of(call_factory(name), name), code=code)

    @classmethod
    def of(cls, module: nn.Module, name: str = "own") -> CustomNetwork:
        """Return the description of a network by its attributes.

        Args:
            module: the network
            name: name of the encoder
        """

        def given(attribute: str) -> Any:
            # A tensor of that name is a part of the network, with which it normalises images itself.
            value = getattr(module, attribute, None)
            return None if isinstance(value, Tensor) else value

        size = size_pair(given("image_size") or 224)
        channels = _channels(module, size)
        pairs = ((given("mean"), 0.0), (given("std"), 1.0))
        asked = [default if value is None else value for value, default in pairs]
        try:
            mean, std = (
                (float(value),) * channels if isinstance(value, Real) else tuple(map(float, value))
                for value in asked
            )
            finite = torch.tensor([*mean, *std]).isfinite().all()
            if not len(mean) == len(std) == channels or min(std) <= 0 or not finite:
                raise ValueError
        except (TypeError, ValueError):
            raise AfterimageError(
                f"the attributes mean and std of {name} must be one number{' or three' if channels == 3 else ''} each, "
                f"std greater than 0, got {asked[0]!r} and {asked[1]!r}"
            ) from None
        prefix = given("prefix_tokens")
        if prefix is not None and not (isinstance(prefix, int) and prefix >= 0):
            raise AfterimageError(
                f"the attribute prefix_tokens of {name} must be a whole number from 0 on, got {prefix!r}"
            )
        return cls(name, mean, std, size, module=module, prefix=prefix)

    @property
    def input_notes(self) -> tuple[str, ...]:
        if {*self.mean} != {0.0} or {*self.std} != {1.0}:
            return super().input_notes
        as_is = (
            f"images reach {self.name} as they are, in [0, 1]: it has no mean and std in numbers, but 0 and 1"
        )
        return (*super().input_notes, as_is)

    def create(self, image_size: Size, *, device: str = "cpu", **options: Any) -> nn.Module:
        return self.build(image_size).eval()

    def build(self, image_size: Size) -> nn.Module:
        with torch.no_grad():  # otherwise a scripted part's copy would have an autograd history
            return copy.deepcopy(self.module)

    def find_weights(self, weights: str | Path = "pretrained") -> Weights:
        if str(weights) == "pretrained":
            return Weights(self.name, "own", self.name, _digest(self.module))
        stem = split_provider(self.name)[1].rpartition(":")[2]
        return search_weights(self.name, weights, [stem])

    def load(
        self, image_size: Size, weights: Weights, used: Sequence[tuple[str, ...]]
    ) -> tuple[nn.Module, str]:
        if weights.file is None:
            return self.create(image_size), ""
        return super().load(image_size, weights, used)

    def prefix_tokens(self, module: nn.Module) -> int | None:
        return self.prefix

    def create_untrained(self, image_size: Size, seed: int) -> nn.Module:
        """Build the network and let torch's own initialisation draw every module again.

        The values of parameters in modules without such an initialisation are permuted, which keeps their
        distribution.
        """
        model = self.create(image_size)
        with seeded(seed), torch.no_grad():
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None) or getattr(
                    module, "_reset_parameters", None
                )
                if callable(reset):
                    reset()
                    continue
                for parameter in module.parameters(recurse=False):
                    order = torch.randperm(parameter.numel()).reshape(parameter.shape)
                    parameter.copy_(parameter.flatten()[order])
        return model


def _digest(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _channels(network: nn.Module, size: Size) -> int:
    """Return a network's number of image channels: 1 if a convolution takes 1 and 3 fail, else 3."""
    if not any(isinstance(module, nn.Conv2d) and module.in_channels == 1 for module in network.modules()):
        return 3
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with torch.no_grad():
        network = copy.deepcopy(network).eval()
        for channels in (3, 1):
            with contextlib.suppress(Exception):
                network(torch.zeros(1, channels, *size, device=device))
                return channels
    return 3
