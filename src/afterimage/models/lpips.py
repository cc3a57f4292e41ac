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
    """One of torchvision's networks, and which of its `features` LPIPS compares."""

    model: str
    taps: tuple[int, ...]


BACKBONES = {
    "alex": Backbone("alexnet", (1, 4, 7, 9, 11)),
    "vgg": Backbone("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": Backbone("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al., 2018), version 0.1: 0 for equal images.

    `net` is `alex`, `vgg` or `squeeze`. `weights` is torchvision's file for it (its `features` part is
    enough), a folder, `pretrained` to look for it, or what `find_lpips_weights` found. The linear heads are
    its authors', from their package `lpips`. Frozen, always in evaluation mode, and in float32 also under autocast.

    Raises `AfterimageError` for an unknown net, weights that cannot be had, and a tensor that the file lacks.
    """

    def __init__(self, net: str = "alex", weights: Weights | str | Path = "pretrained") -> None:
        super().__init__()
        self.net = net
        self.backbone = _backbone(net)
        self.weights = weights if isinstance(weights, Weights) else find_lpips_weights(net, weights)
        layers = _layers(self.backbone, self.weights)
        ends = [tap + 1 for tap in self.backbone.taps]
        self.slices = nn.ModuleList(layers[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
        for index, head in enumerate(_heads(net, len(ends))):
            self.register_buffer(f"head{index}", head)
        # The reference's constants are for images in [-1, 1]; carried over to [0, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("mean", ((shift + 1) / 2).view(1, 3, 1, 1))
        self.register_buffer("std", (scale / 2).view(1, 3, 1, 1))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def features(self, images: Images) -> list[Tensor]:
        """Feature maps `(B, C, h, w)` of images in [0, 1], of unit length at every location."""
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
                # Not by a plain square root: where no feature is active its gradient is NaN.
                maps.append(F.normalize(values, dim=1, eps=1e-10))
        return maps

    def distance(self, prediction: Sequence[Tensor], target: Sequence[Tensor]) -> Float[Tensor, " batch"]:
        """The distance of two results of `features`, one value an image."""
        total = 0
        with torch.autocast(target[0].device.type, enabled=False):
            for index, (p, t) in enumerate(zip(prediction, target, strict=True)):
                # Heads and mean over locations are both linear; the mean first is cheaper.
                total = total + (p - t).square_().mean((2, 3)) @ getattr(self, f"head{index}")
        return total

    def forward(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        """The distance of images in [0, 1], one value an image. Gradients flow to the prediction alone."""
        with torch.no_grad():
            features = self.features(target)
        return self.distance(self.features(prediction), features)


def find_lpips_weights(net: str, weights: str | Path = "pretrained") -> Weights:
    """Where the weights of an LPIPS network are. Raises `AfterimageError` that says what was tried."""
    return find_torchvision_weights(_backbone(net).model, weights)


def _backbone(net: str) -> Backbone:
    if net not in BACKBONES:
        raise unknown("LPIPS network", net, BACKBONES)
    return BACKBONES[net]


def _layers(backbone: Backbone, weights: Weights) -> nn.Sequential:
    import torchvision

    with torch.device("meta"):
        network = getattr(torchvision.models, backbone.model)(weights=None)
    layers = network.features[: backbone.taps[-1] + 1]
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
    """The published linear heads, a weight for each channel of each map; a few kB in the authors' package.

    The package itself is not imported: its network would load ImageNet weights of its own.
    """
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise AfterimageError("LPIPS' linear heads come with the package lpips, which is not installed")
    tensors = read_weights(Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth")
    return [tensors[f"lin{index}.model.1.weight"].float().flatten() for index in range(count)]
