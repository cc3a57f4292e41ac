"""Training losses of decoders: MSE, L1, LPIPS, and weighted sums of them.

Every loss takes images `(B, 3, H, W)` in [0, 1] and returns the mean over the batch, in float32 even under
autocast. The range of values is not checked, because every step would then wait for the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.config import LOSS_NAMES, LPIPS_NETS, AfterimageError, parse_loss
from afterimage.models.lpips import LPIPS

Images = Float[Tensor, "batch 3 height width"]


class Loss(nn.Module):
    """Base class of losses: a distance between two images, whose `forward` returns the mean over the batch."""

    @abstractmethod
    def per_image(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        """Return the distance between the two images of each pair, `(B,)`."""

    def forward(self, prediction: Images, target: Images) -> Float[Tensor, ""]:
        if prediction.shape != target.shape:
            raise AfterimageError(
                f"prediction and target differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        return self.per_image(prediction, target).mean()


class MSE(Loss):
    """Mean squared error, on which PSNR is based (Dosovitskiy and Brox, 2016, invert features with it)."""

    def per_image(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        return (prediction.float() - target.float()).square().flatten(1).mean(1)


class L1(Loss):
    """Mean absolute error (Zhao et al., 2017, Loss Functions for Image Restoration with Neural Networks)."""

    def per_image(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        return (prediction.float() - target.float()).abs().flatten(1).mean(1)


class Perceptual(Loss):
    """LPIPS (Zhang et al., 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric)."""

    def __init__(self, net: str = "alex") -> None:
        super().__init__()
        try:
            self.lpips = LPIPS(net)
        except AfterimageError as error:
            others = " or ".join(f"lpips:{other}" for other in LPIPS_NETS if other != net)
            raise AfterimageError(f"the loss lpips:{net} ({others} are others): {error}") from None

    def per_image(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        return self.lpips(prediction, target)


class WeightedSum(Loss):
    """A weighted sum of losses."""

    def __init__(self, terms: Mapping[Loss, float]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.weights = tuple(terms.values())

    def per_image(self, prediction: Images, target: Images) -> Float[Tensor, " batch"]:
        values = (
            w * term.per_image(prediction, target) for w, term in zip(self.weights, self.terms, strict=True)
        )
        return torch.stack(list(values)).sum(0)


LOSSES: dict[str, type[Loss]] = {
    name: {"mse": MSE, "l1": L1, "lpips": Perceptual}[name.partition(":")[0]] for name in LOSS_NAMES
}


def create_loss(text: str) -> Loss:
    """Create a loss from its description.

    Args:
        text: weighted sum of terms, such as `0.5*mse + 0.5*lpips:squeeze`, see `parse_loss`

    Raises:
        AfterimageError: the description is not valid, or weights are not available
    """
    weights = parse_loss(text)
    terms = []
    for name in weights:
        net = name.partition(":")[2]
        terms.append(LOSSES[name](net) if net else LOSSES[name]())
    if list(weights.values()) == [1.0]:
        return terms[0]
    return WeightedSum(dict(zip(terms, weights.values(), strict=True)))
