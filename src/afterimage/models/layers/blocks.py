"""Building blocks that decoders share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        ctx.save_for_backward(images)
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        (images,) = ctx.saved_tensors
        outward = ((images > 1) & (gradient < 0)) | ((images < 0) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


def clamp(images: Tensor) -> Tensor:
    """Hold images to [0, 1] and let gradients pass, but for those that lead further beyond the range.

    A sigmoid saturates where photographs have most of their black and white; a plain clamp has no gradient to
    bring a value back. Straight through, a value beyond the range is drawn back unless its target is the bound.
    Errors of pixels never lead outward there; LPIPS may, and without end, as what it sees does not change.
    """
    return _Clamp.apply(images)


def for_sums(tensor: Tensor) -> Tensor:
    """Where it can be summed in float64: on the CPU where it lies on an Apple GPU, which has no such numbers."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def pixel_shuffle(
    maps: Float[Tensor, "batch cbb h w"], block: tuple[int, int]
) -> Float[Tensor, "batch c hb wb"]:
    """Give every location its block of pixels: a pixel shuffle whose blocks need not be square, also of no maps."""
    (b, cbb, h, w), (bh, bw) = maps.shape, block
    if bh == bw and b:
        return F.pixel_shuffle(maps, bh)
    c = cbb // (bh * bw)
    return maps.view(b, c, bh, bw, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c, h * bh, w * bw)


def pixel_unshuffle(
    maps: Float[Tensor, "batch c hb wb"], block: tuple[int, int]
) -> Float[Tensor, "batch cbb h w"]:
    """The inverse of `pixel_shuffle`."""
    (b, c, height, width), (bh, bw) = maps.shape, block
    if bh == bw and b:  # of no maps it forgets to unshuffle
        return F.pixel_unshuffle(maps, bh)
    maps = maps.view(b, c, height // bh, bh, width // bw, bw).permute(0, 1, 3, 5, 2, 4)
    return maps.reshape(b, c * bh * bw, height // bh, width // bw)


def channel_projection(channels: int, wanted: int | None) -> nn.Module:
    """A 1x1 convolution to `wanted` channels; nothing where none are asked for."""
    return nn.Identity() if wanted is None else nn.Conv2d(channels, wanted, kernel_size=1)


class UpConv2x(nn.ConvTranspose2d):
    """A transposed convolution (4x4) that doubles height and width: `(B, C, h, w)` to `(B, narrower, 2h, 2w)`.

    The bias is added by itself: on a CPU its gradient within the kernel takes as long as the other two together.
    """

    def __init__(self, channels: int, narrower: int) -> None:
        super().__init__(channels, narrower, kernel_size=4, stride=2, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        doubled = F.conv_transpose2d(maps, self.weight, None, self.stride, self.padding)
        return doubled + self.bias.to(doubled.dtype)[:, None, None]


def conv_bn_relu(convolution: nn.Module) -> nn.Sequential:
    """A convolution, batch norm and ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


def stages_between(size: tuple[int, int], target: tuple[int, int]) -> int:
    """The number of doublings that brings `size` nearest to `target`."""
    ratio = math.sqrt((target[0] * target[1]) / (size[0] * size[1]))
    return max(0, round(math.log2(ratio)))


def resize(images: Float[Tensor, "batch c _ _"], size: tuple[int, int]) -> Float[Tensor, "batch c _ _"]:
    """Bilinear, antialiased when it shrinks; the identity where the size already fits."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    shrinks = size[0] < images.shape[-2] or size[1] < images.shape[-1]
    # PyTorch antialiases in float32 only.
    exact = images.float() if shrinks and images.dtype in (torch.bfloat16, torch.float16) else images
    resized = F.interpolate(exact, size=tuple(size), mode="bilinear", antialias=shrinks, align_corners=False)
    return resized.to(images.dtype)


def log2_scale(d: int) -> float:
    """Times this, `q k'` of heads of d channels is the power of two whose value softmax takes."""
    return d**-0.5 / math.log(2)
