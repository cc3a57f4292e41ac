"""Building blocks shared by decoders."""

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
    """Clamp images to [0, 1]; gradients pass, except those that would move a value further out of the range.

    A sigmoid saturates at black and white, which are common in photographs, and a plain clamp has no gradient
    that could bring a value back. Here a value outside the range is drawn back unless its target is the bound
    itself. Pixel losses never push outwards there, but LPIPS could push without end, as the clamped image
    does not change.
    """
    return _Clamp.apply(images)


def for_sums(tensor: Tensor) -> Tensor:
    """Move a tensor to a device that has float64: from an Apple GPU, which lacks it, to the CPU."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def pixel_shuffle(
    maps: Float[Tensor, "batch cbb h w"], block: tuple[int, int]
) -> Float[Tensor, "batch c hb wb"]:
    """Turn the channels of each location into a block of pixels; blocks may be oblong, and the batch may be empty.

    Args:
        maps: `(B, C bh bw, h, w)`
        block: `(bh, bw)`, pixels of a block

    Returns:
        `(B, C, h bh, w bw)`
    """
    (b, cbb, h, w), (bh, bw) = maps.shape, block
    if bh == bw and b:
        return F.pixel_shuffle(maps, bh)
    c = cbb // (bh * bw)
    return maps.view(b, c, bh, bw, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c, h * bh, w * bw)


def pixel_unshuffle(
    maps: Float[Tensor, "batch c hb wb"], block: tuple[int, int]
) -> Float[Tensor, "batch cbb h w"]:
    """Invert `pixel_shuffle`.

    Args:
        maps: `(B, C, h bh, w bw)`
        block: `(bh, bw)`, pixels of a block

    Returns:
        `(B, C bh bw, h, w)`
    """
    (b, c, height, width), (bh, bw) = maps.shape, block
    if bh == bw and b:  # PyTorch returns an empty batch unchanged
        return F.pixel_unshuffle(maps, bh)
    maps = maps.view(b, c, height // bh, bh, width // bw, bw).permute(0, 1, 3, 5, 2, 4)
    return maps.reshape(b, c * bh * bw, height // bh, width // bw)


class UpConv2x(nn.ConvTranspose2d):
    """A transposed convolution (4x4) that doubles height and width: `(B, C, h, w)` to `(B, narrower, 2h, 2w)`.

    The bias is added separately: on a CPU its gradient inside the kernel takes as long as the rest of the
    backward pass.
    """

    def __init__(self, channels: int, narrower: int) -> None:
        super().__init__(channels, narrower, kernel_size=4, stride=2, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        doubled = F.conv_transpose2d(maps, self.weight, None, self.stride, self.padding)
        return doubled + self.bias.to(doubled.dtype)[:, None, None]


def conv_bn_relu(convolution: nn.Module) -> nn.Sequential:
    """Chain a convolution, batch norm and ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


def resize(images: Float[Tensor, "batch c _ _"], size: tuple[int, int]) -> Float[Tensor, "batch c _ _"]:
    """Resize images bilinearly, with antialiasing if they shrink; return images of the right size unchanged.

    Args:
        images: `(B, C, H, W)`
        size: `(height, width)` in pixels
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    shrinks = size[0] < images.shape[-2] or size[1] < images.shape[-1]
    # PyTorch antialiases only in float32 and wider types.
    exact = images.float() if shrinks and images.dtype in (torch.bfloat16, torch.float16) else images
    resized = F.interpolate(exact, size=tuple(size), mode="bilinear", antialias=shrinks, align_corners=False)
    return resized.to(images.dtype)


def log2_scale(d: int) -> float:
    """Return the factor on `q k'` with which the softmax can use powers of two, for heads of `d` channels."""
    return d**-0.5 / math.log(2)
