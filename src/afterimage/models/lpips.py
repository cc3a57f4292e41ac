"""LPIPS, the learned perceptual distance, on torchvision's networks with the published linear heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import LPIPS_MIN_SIDE, AfterimageError, check_choice, join_names
from afterimage.models.weight_files import read_named_tensors
from afterimage.models.weights import WEIGHTS_VARIABLE, Weights, best_match, search_weights

Images = Float[Tensor, "batch 3 height width"]


BACKBONES = {
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
"""The backbones of Zhang et al. (2018): torchvision's name of the network, and the indices in its `features` of the
ReLU layers whose outputs are compared."""


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
        self.weights = weights if isinstance(weights, Weights) else find_lpips_weights(net, weights)
        ends = [index + 1 for index in BACKBONES[net][1]]
        layers = _layers(net, ends[-1], self.weights.file)
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
        smallest = LPIPS_MIN_SIDE[self.net]
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
    """Find torchvision's ImageNet weights of an LPIPS network; see `search_weights`.

    Args:
        net: `alex`, `vgg` or `squeeze`
        weights: a file, a folder with `NAME.torchvision.safetensors` or `.pth`, or `pretrained` to search for the file

    Raises:
        AfterimageError: the network is unknown, or nothing was found; the message lists what was tried
    """
    from torchvision.models import get_model_weights

    check_choice("LPIPS network", net, BACKBONES)
    name = BACKBONES[net][0]
    stem, url = f"{name}.torchvision", get_model_weights(name).IMAGENET1K_V1.url
    # No command has an option for these weights: --weights is for the encoder's.
    files = f"{stem}.safetensors or {stem}.pth"
    advice = f"set {WEIGHTS_VARIABLE} to a folder with {files}, or choose another network with --lpips"
    return search_weights(f"torchvision/{name}", weights, [stem], url=url, advice=advice)


def _layers(net: str, count: int, file: Path) -> nn.Sequential:
    """Return the first layers of a backbone with the weights of a file."""
    import torchvision

    name = BACKBONES[net][0]
    with torch.device("meta"):
        layers = getattr(torchvision.models, name)(weights=None).features[:count]
    own = {f"features.{key}": value for key, value in layers.state_dict().items()}
    match, _ = best_match(read_named_tensors(file), own, [(key,) for key in own], dict)
    if match.missing:
        raise AfterimageError(f"{file} lacks {join_names(match.missing)}, which LPIPS needs of {name}")
    for key, value in own.items():
        if match.state[key].shape != value.shape:
            shapes = f"{tuple(match.state[key].shape)}, expected {tuple(value.shape)}"
            raise AfterimageError(f"{file}: {key} of {name} has shape {shapes}")
    state = {key.removeprefix("features."): match.state[key].float() for key in own}
    layers.load_state_dict(state, assign=True)
    return layers


def _heads(net: str, count: int) -> list[Tensor]:
    """Read the published linear heads from the authors' package: one weight per channel of each map.

    The package itself is not imported, because its network would load its own ImageNet weights.
    """
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise AfterimageError("LPIPS' linear heads come with the package lpips, which is not installed")
    tensors = read_named_tensors(Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth").tensors
    return [tensors[f"lin{index}.model.1.weight"].float().flatten() for index in range(count)]
