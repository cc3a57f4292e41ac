"""Building blocks shared by decoders, and their batch norm, which covers all ranks and accepts a single value."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup


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


def to_float64_device(tensor: Tensor) -> Tensor:
    """Return the tensor on a device with float64: an Apple GPU (mps) lacks it, and its tensors go to the CPU."""
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


def adapt_batch_norms(module: nn.Module, ranks: ProcessGroup = SINGLE_PROCESS) -> list[BatchNorm]:
    """Replace every batch norm inside a module by one that accepts any batch and covers all ranks.

    Names, parameters and buffers are those of `nn.BatchNorm2d`, so state dicts stay compatible. PyTorch's
    `SyncBatchNorm` exists on CUDA only.

    Args:
        module: the module, changed in place
        ranks: the ranks that share each batch

    Returns:
        the new batch norms
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            # Other subclasses may do more than normalise.
            if type(child) in (nn.BatchNorm2d, BatchNorm, DistributedBatchNorm):
                own = BatchNorm if ranks.world_size == 1 else DistributedBatchNorm
                setattr(parent, name, own(child, ranks))
    return [child for child in module.modules() if isinstance(child, BatchNorm)]


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that accepts a single value per channel, such as a 1x1 map of one image.

    Such a batch has no variance, for which PyTorch raises an error. It is normalised by the running statistics, as in
    evaluation, and leaves them unchanged; `met_single` counts such batches.
    """

    def __init__(self, plain: nn.BatchNorm2d, ranks: ProcessGroup = SINGLE_PROCESS) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum, device="meta")
        self.__dict__.update(plain.__dict__)
        self.ranks = ranks
        self.met_single = 0

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and self.track_running_stats and maps.numel() == maps.shape[1]:
            return self.by_running_statistics(maps)
        return super().forward(maps)

    def by_running_statistics(self, maps: Tensor) -> Tensor:
        """Normalise by the running statistics, because the batch has no variance."""
        self.met_single += 1
        return F.batch_norm(
            maps, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class DistributedBatchNorm(BatchNorm):
    """`BatchNorm` over the images `(B, C, h, w)` of all ranks, some of which may have none (B = 0)."""

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return nn.BatchNorm2d.forward(self, maps)
        moments = self.ranks.moments(maps.detach().permute(0, 2, 3, 1).flatten(0, 2))
        count, mean, variance = moments
        if count == 1:  # the same on all ranks, so none waits for another in the backward pass
            return self.by_running_statistics(maps)
        result = _Normalise.apply(maps, self.weight, self.bias, self.eps, self.ranks, *moments)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return result


class _Normalise(torch.autograd.Function):
    """Normalisation by the moments of all ranks' images; the gradient accounts for their dependence on the images."""

    @staticmethod
    def forward(ctx, maps, weight, bias, eps, ranks, count, mean, variance):
        ctx.save_for_backward(maps, weight, mean.float(), (variance + eps).rsqrt().float(), count)
        ctx.ranks = ranks
        return F.batch_norm(maps, mean.float(), variance.float(), weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, gradient):
        maps, weight, mean, scale, count = ctx.saved_tensors
        wide = (slice(None), None, None)
        gradient = gradient.float()
        standard = (maps.float() - mean[wide]) * scale[wide]
        of_rank = torch.stack([gradient.sum((0, 2, 3)), (gradient * standard).sum((0, 2, 3))])
        total = of_rank.double()
        ctx.ranks.sum([total])
        shift, slope = (total / count).float()
        back = (gradient - shift[wide] - standard * slope[wide]) * (weight * scale)[wide]
        # The trainer sums the parameters' gradients over ranks, like all others.
        return back.to(maps.dtype), of_rank[1].to(weight.dtype), of_rank[0].to(weight.dtype), *[None] * 5
