"""Batch norm whose statistics are those of the whole batch, wherever its pictures are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afterimage.ranks import Ranks


def synchronise(module: nn.Module, ranks: Ranks) -> bool:
    """Let every batch norm inside `module` see all ranks' pictures; returns whether there is one.

    Names, parameters and buffers stay, so that state dicts are those of one process. PyTorch's `SyncBatchNorm` does
    the same on CUDA alone.
    """
    found = False
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, RanksBatchNorm(child, ranks))
                found = True
    return found


class RanksBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all ranks' pictures `(B, C, h, w)`; a rank may have none (B = 0)."""

    def __init__(self, single: nn.BatchNorm2d, ranks: Ranks) -> None:
        super().__init__(single.num_features, single.eps, single.momentum, device="meta")
        self.__dict__.update(single.__dict__)
        self.ranks = ranks

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return super().forward(maps)
        result, mean, variance, count = _Normalise.apply(maps, self.weight, self.bias, self.eps, self.ranks)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return result


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps, weight, bias, eps, ranks):
        count, mean, variance = ranks.moments(maps.detach().permute(0, 2, 3, 1).flatten(0, 2))
        ctx.save_for_backward(maps, weight, mean.float(), (variance + eps).rsqrt().float(), count)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, variance, count)
        result = F.batch_norm(maps, mean.float(), variance.float(), weight, bias, False, 0.0, eps)
        return result, mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        maps, weight, mean, scale, count = ctx.saved_tensors
        wide = (slice(None), None, None)
        gradient = gradient.float()
        standard = (maps.float() - mean[wide]) * scale[wide]
        own = torch.stack([gradient.sum((0, 2, 3)), (gradient * standard).sum((0, 2, 3))])
        total = own.double()
        ctx.ranks.sum([total])
        shift, slope = (total / count).float()
        back = (gradient - shift[wide] - standard * slope[wide]) * (weight * scale)[wide]
        # Those of the parameters are summed over ranks with all others.
        return back.to(maps.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None, None
