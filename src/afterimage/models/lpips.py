"""LPIPS, the learned perceptual distance, on torchvision's networks with the published linear heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import LPIPS_SMALLEST, AfterimageError, unknown
from afterimage.models.weights import Weights, find_torchvision_weights, read_weights

Images = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision, and the indices in its `features` of the layers that LPIPS compares."""

    model: str
    layers: tuple[int, ...]


BACKBONES = {
    "alex": Backbone("alexnet", (1, 4, 7, 9, 11)),
    "vgg": Backbone("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": Backbone("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
"""The backbones of Zhang et al. (2018): the outputs of the ReLU layers at these indices are compared."""


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), version 0.1: 0 for equal images.

    The network is frozen, stays in evaluation mode, and runs in float32 even under autocast. Its linear heads
    come from the authors' package `lpips`.

    Args:
        net: `alex`, `vgg` or `squeeze`
        weights: torchvision's file for that network (the part `features` is enough), a folder, `pretrained`
            to search for the file, or the result of `find_lpips_weights`

    Raises:
        AfterimageError: the network is unknown, or its weights are not found or lack a tensor
    """

    def __init__(self, net: str = "alex", weights: Weights | str | Path = "pretrained") -> None:
        super().__init__()
        self.net = net
        self.backbone = _backbone(net)
        self.weights = weights if isinstance(weights, Weights) else find_lpips_weights(net, weights)
        layers = _layers(self.backbone, self.weights)
        ends = [index + 1 for index in self.backbone.layers]
        self.slices = nn.ModuleList(layers[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
        for index, head in enumerate(_heads(net, len(ends))):
            self.register_buffer(f"head{index}", head)
        # The reference implementation's constants are for images in [-1, 1]; these are for [0, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("mean", ((shift + 1) / 2).view(1, 3, 1, 1))
        self.register_buffer("std", (scale / 2).view(1, 3, 1, 1))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in evaluation mode."""
        return super().train(False)

    def features(self, images: Images) -> list[Tensor]:
        """Compute feature maps `(B, C, h, w)` of images in [0, 1], with unit length at every location.

        Raises:
            AfterimageError: the images are too small for the network
        """
        smallest = LPIPS_SMALLEST[self.net]
        if min(images.shape[-2:]) < smallest:
            size = "x".join(map(str, images.shape[-2:]))
            raise AfterimageError(
                f"LPIPS ({self.net}) needs images of {smallest}x{smallest} or more, got {size}"
            )
        maps = []
        with torch.autocast(images.device.type, enabled=False):
            values = (images.float() - self.mean) / self.std
            for part in self.slices:
                values = part(values)
                # The gradient of a plain square root is NaN where no feature is active.
                maps.append(F.normalize(values, dim=1, eps=1e-10))
        return maps

    def distance(self, prediction: Sequence[Tensor], target: Sequence[Tensor]) -> Float[Tensor, " batch"]:
        """Compute the distance between two results of `features`.

        Args:
            prediction: feature maps of the reconstructions
            target: feature maps of the originals

        Returns:
            distances `(B,)`
        """
        total = 0
        with torch.autocast(target[0].device.type, enabled=False):
            for index, (p, t) in enumerate(zip(prediction, target, strict=True)):
                # Heads and the mean over locations are both linear; taking the mean first is cheaper.
                total = total + (p - t).square_().mean((2, 3)) @ getattr(self, f"head{index}")
        return total

    def forward(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        """Compute the LPIPS distance of each image. Gradients flow to the prediction only.

        Args:
            prediction: reconstructions `(B, 3, H, W)` in [0, 1]
            target: originals, likewise

        Returns:
            distances `(B,)`, 0 for equal images
        """
        with torch.no_grad():
            features = self.features(target)
        return self.distance(self.features(prediction), features)


def find_lpips_weights(net: str, weights: str | Path = "pretrained") -> Weights:
    """Find the weights of an LPIPS network; see `find_torchvision_weights`.

    Args:
        net: `alex`, `vgg` or `squeeze`
        weights: a file, a folder, or `pretrained` to search for the file

    Raises:
        AfterimageError: nothing was found; the message lists what was tried
    """
    return find_torchvision_weights(_backbone(net).model, weights)


def _backbone(net: str) -> Backbone:
    if net not in BACKBONES:
        raise unknown("LPIPS network", net, BACKBONES)
    return BACKBONES[net]


def _layers(backbone: Backbone, weights: Weights) -> nn.Sequential:
    import torchvision

    with torch.device("meta"):
        network = getattr(torchvision.models, backbone.model)(weights=None)
    layers = network.features[: backbone.layers[-1] + 1]
    if weights.file is None:
        raise AfterimageError(
            f"LPIPS needs pretrained weights of {backbone.model}; these are {weights.label}"
        )
    tensors, state = read_weights(weights.file), {}
    for name, parameter in layers.state_dict().items():
        key = f"features.{name}"
        if key not in tensors:
            raise AfterimageError(f"{weights.file} lacks {key}, which LPIPS needs of {backbone.model}")
        if tensors[key].shape != parameter.shape:
            shapes = f"{tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}"
            raise AfterimageError(f"{weights.file}: {key} of {backbone.model} has shape {shapes}")
        state[name] = tensors[key].float()
    layers.load_state_dict(state, assign=True)
    return layers


def _heads(net: str, count: int) -> list[Tensor]:
    """Read the published linear heads from the authors' package: one weight per channel of each map.

    The package itself is not imported, because its network would load its own ImageNet weights.
    """
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise AfterimageError("LPIPS' linear heads come with the package lpips, which is not installed")
    tensors = read_weights(Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth")
    return [tensors[f"lin{index}.model.1.weight"].float().flatten() for index in range(count)]
