"""Batch norm for training decoders and fusions, over the whole batch on all ranks, and also over a single value.

If a batch holds a single value of each channel (a 1x1 map of one image), there is no variance, and PyTorch raises an
error. Here such a batch is normalised by the running statistics, as in evaluation, and leaves them unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.runtime.distributed import SINGLE_PROCESS, ProcessGroup


def adapt(module: nn.Module, ranks: ProcessGroup = SINGLE_PROCESS) -> list[BatchNorm]:
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
            if type(child) in (
                nn.BatchNorm2d,
                BatchNorm,
                RanksBatchNorm,
            ):  # subclasses may do more than normalise
                setattr(parent, name, (BatchNorm if ranks.count == 1 else RanksBatchNorm)(child, ranks))
    return [child for child in module.modules() if isinstance(child, BatchNorm)]


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that accepts a single value per channel; `met_single` is the number of such batches so far."""

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


class RanksBatchNorm(BatchNorm):
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
        own = torch.stack([gradient.sum((0, 2, 3)), (gradient * standard).sum((0, 2, 3))])
        total = own.double()
        ctx.ranks.sum([total])
        shift, slope = (total / count).float()
        back = (gradient - shift[wide] - standard * slope[wide]) * (weight * scale)[wide]
        # The trainer sums the parameters' gradients over ranks, like all others.
        return back.to(maps.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), *[None] * 5
