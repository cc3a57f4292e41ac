"""The objective of a search: the distance of an image's features to the targets, and the regularisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from afterimage.config import AfterimageError
from afterimage.config.inversion import InvertConfig

Images = Float[Tensor, "batch 3 height width"]
PerImage = Float[Tensor, " batch"]
FeatureFunction = Callable[[Images], Sequence[Tensor]]

GREY, RANGE = 0.5, 0.5
"""Images lie in `GREY` ± `RANGE`: the paper's mean image and its B."""
BF16_LOSS_RATIO = 30.0
"""bfloat16 is used while the loss exceeds the loss that its rounding alone causes by this factor: the error of the
gradients is then at most a fifth.

More costs seconds and gives no better image in the same time (docs/LOG.md, what searches cost)."""
NEIGHBOUR_DIFFERENCE = 0.01
"""The paper's a: neighbouring pixels differ by about this share of the range."""
MAX_ATTENTION_WEIGHTS = 2**25
"""Largest number of attention weights of a batch for `MatmulAttention`; larger ones are left to PyTorch's kernel."""


def feature_distance(features: Sequence[Tensor], targets: Sequence[Tensor]) -> PerImage:
    """Compute the feature distance `|f - f0|^2 / |f0|^2` of each image, averaged over layers.

    Mahendran & Vedaldi 2015, section 3.
    """
    distances = [
        (f - t).flatten(1).square().sum(1) / t.flatten(1).square().sum(1).clamp_min(1e-20)
        for f, t in zip(features, targets, strict=True)
    ]
    return torch.stack(distances).mean(0)


def alpha_norm(images: Images, alpha: float = 6.0) -> PerImage:
    """Compute `sum |x / B|^alpha / (H W)` of images around grey, which keeps values in range.

    Mahendran & Vedaldi 2015, `R_alpha = |x|_alpha^alpha` (section 3) at the weight that the paper proposes,
    `sigma^alpha / (H W B^alpha)`; sigma cancels against the paper's images of unit norm.
    """
    height, width = images.shape[-2:]
    return ((images - GREY) / RANGE).abs().pow(alpha).flatten(1).sum(1) / (height * width)


def total_variation(images: Images, beta: float = 2.0) -> PerImage:
    """Compute `sum (dx^2 + dy^2)^(beta/2) / (H W (a B)^beta)` from forward differences inside the image.

    Mahendran & Vedaldi 2015, equation 3 with the weight that goes with it, `sigma^beta / (H W (a B)^beta)`.
    """
    height, width = images.shape[-2:]
    down = F.pad(images.diff(dim=-2), (0, 0, 0, 1))
    right = F.pad(images.diff(dim=-1), (0, 1))
    square = down.square() + right.square()
    # The root of 0 has no gradient; at beta = 2 there is no root.
    terms = square if beta == 2 else (square + 1e-12).pow(beta / 2)
    return terms.flatten(1).sum(1) / (height * width * (NEIGHBOUR_DIFFERENCE * RANGE) ** beta)


class Objective:
    """Objective of a search: the loss of each image, and its feature distance alone: `(loss, distance)`, both `(B,)`.

    With the `whitening` of a decoder's errors the loss is the mean square of the whitened differences, 1 for an
    error as large as the decoder's, instead of the distance.

    In `bf16-mixed` the encoder runs in bfloat16 for an image whose loss is well above what the rounding alone makes
    (measured at the start), and in float32 from there on, so that rounding does not limit the result.

    Raises `AfterimageError` where targets and features differ in number or shape, or targets are not finite.
    """

    def __init__(
        self,
        feature_function: FeatureFunction,
        targets: Sequence[Tensor],
        config: InvertConfig,
        whitening: Sequence[Tensor] | None = None,
    ) -> None:
        self.feature_function, self.config, self.whitening = feature_function, config, whitening
        self.targets = [target.detach() for target in targets]
        for i, target in enumerate(self.targets):
            if not torch.isfinite(target).all():
                raise AfterimageError(f"target {i + 1} holds values that are not finite")
        self._mixed = config.precision == "bf16-mixed"
        self._rounding: Tensor | None = None

    def __call__(self, images: Images, shift: tuple[int, int] = (0, 0)) -> tuple[PerImage, PerImage]:
        seen = images.roll(shift, (-2, -1)) if any(shift) else images
        features = self._features(seen)
        distance = feature_distance(features, self.targets)
        loss = fit = distance if self.whitening is None else self._whitened(features, self.targets)
        if self.config.tv:
            loss = loss + self.config.tv * total_variation(images, self.config.beta)
        if self.config.alpha_norm:
            loss = loss + self.config.alpha_norm * alpha_norm(images, self.config.alpha)
        if self._rounding is not None:
            self._coarse &= (fit > BF16_LOSS_RATIO * self._rounding).detach()
        return loss, distance.detach()

    @torch.no_grad()
    def distance(self, images: Images) -> PerImage:
        """Return the feature distance of images, in float32."""
        return feature_distance(self._exact(images), self.targets)

    def _features(self, images: Images) -> list[Tensor]:
        """Return float32 feature maps of `images`, computed in bfloat16 where that is exact enough."""
        if self._mixed and self._rounding is None:
            with torch.no_grad():
                exact, rounded = self._exact(images), self._rounded(images)
                measure = feature_distance if self.whitening is None else self._whitened
                self._rounding = measure(rounded, exact)
                self._coarse = torch.ones_like(self._rounding, dtype=torch.bool)
        if not self._mixed or not self._coarse.any():
            return self._exact(images)
        if self._coarse.all():
            return self._rounded(images)
        coarse, fine = self._coarse.nonzero()[:, 0], (~self._coarse).nonzero()[:, 0]
        order = torch.cat([coarse, fine]).argsort()
        parts = zip(self._rounded(images[coarse]), self._exact(images[fine]), strict=True)
        return [torch.cat(pair)[order] for pair in parts]

    def _exact(self, images: Images) -> list[Tensor]:
        features = list(self.feature_function(images))
        shapes = [[tuple(t.shape[1:]) for t in part] for part in (features, self.targets)]
        if shapes[0] != shapes[1] or any(len(map_) != len(images) for map_ in features):
            raise AfterimageError(
                f"the targets have shapes {[tuple(t.shape) for t in self.targets]}, "
                f"the features of {len(images)} images {[tuple(t.shape) for t in features]}"
            )
        return features

    def _rounded(self, images: Images) -> list[Tensor]:
        on_cpu = images.device.type == "cpu"
        with (
            torch.autocast(images.device.type, torch.bfloat16),
            MatmulAttention() if on_cpu else nullcontext(),
        ):
            return [map_.float() for map_ in self.feature_function(images)]

    def _whitened(self, features: Sequence[Tensor], targets: Sequence[Tensor]) -> PerImage:
        """Return the mean square of the whitened differences, over channels, locations and layers."""
        parts = zip(self.whitening, features, targets, strict=True)
        return torch.stack(
            [torch.einsum("dc,bcn->bdn", w, (f - t).flatten(2)).square().mean((1, 2)) for w, f, t in parts]
        ).mean(0)


class MatmulAttention(TorchFunctionMode):
    """Context in which attention over an image's few hundred tokens uses plain matrix products in bfloat16.

    PyTorch's kernel for CPUs never stores the attention matrix, which only long sequences need, and takes a third of
    a vision transformer's pass. Matrix products need a third of its time; most of the saving is in the backward pass
    (docs/LOG.md). PyTorch still handles calls that are causal or have a mask, dropout or fewer heads of keys than of
    queries.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and len(args) == 3:
            query, key, value = args
            others = ("dropout_p", "is_causal", "enable_gqa")
            plain = kwargs.get("attn_mask") is None and not any(map(kwargs.get, others))
            same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
            if plain and same and query.shape[:-1].numel() * key.shape[-2] <= MAX_ATTENTION_WEIGHTS:
                scale = kwargs.get("scale") or query.shape[-1] ** -0.5
                return _Attention.apply(query.bfloat16(), key.bfloat16(), value.bfloat16(), scale)
        return function(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """`softmax(scale * query @ key^T) @ value` of `(..., tokens, channels)`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        weights = (query * scale @ key.mT).softmax(-1)
        output = weights @ value
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, weights, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, output = ctx.saved_tensors
        of_logits = gradient @ value.mT
        of_logits.sub_((gradient * output).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
        return of_logits @ key, of_logits.mT @ query, weights.mT @ gradient, None
