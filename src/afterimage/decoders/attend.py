"""Exact attention whose memory grows linearly with tokens: the built-in kernel, or tiles where that is slow."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NARROW = 8
"""On a CPU the built-in kernel is slow for heads of so few channels, and the quicker one for wider heads."""
FEW = 512
"""With fewer tokens there is nothing to gain."""
TILE = 1 << 18
"""Scores at once: a tile and its gradient fit a second-level cache."""
LARGEST = 60.0
"""Where scores may reach beyond this power of two, subtracting their bound could underflow."""


def attend(
    q: Float[Tensor, "batch heads n d"],
    k: Float[Tensor, "batch heads m d"],
    v: Float[Tensor, "batch heads m d"],
) -> Float[Tensor, "batch heads n d"]:
    """`softmax(q k' / sqrt(d)) v`, without ever holding the matrix of all pairs."""
    if q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[-1] <= NARROW and k.shape[-2] >= FEW:
        bound = _bound(q, k)
        if float(bound.max()) <= LARGEST:
            return TiledAttention.apply(q, k, v, bound)
    return F.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def _bound(q: Tensor, k: Tensor) -> Tensor:
    """No score of a query, in powers of two, is larger than this `(B, heads, n)` (Cauchy and Schwarz)."""
    return q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True) * (q.shape[-1] ** -0.5 / math.log(2))


class TiledAttention(torch.autograd.Function):
    """Attention, some rows of queries at a time, recomputed for the gradient (Rabe & Staats 2021).

    Channels come first inside, since `(d, n) x (n, rows)` products are several times as fast as `(rows, n) x (n, d)`
    where d is small. A row added to each factor subtracts the softmax's shift, sums its denominator, and subtracts the
    row sums in the gradient, within the products. Powers of two are the quicker exponential.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bound: Tensor) -> Tensor:
        b, h, n, d = q.shape
        m = k.shape[2]
        qt, kt, vt = (_channels_first(x) for x in (q, k, v))
        shift = bound.reshape(b * h, 1, n)
        one = torch.ones_like(kt[:, :1])
        qa = torch.cat([qt * (d**-0.5 / math.log(2)), -shift], 1)
        ka, va = torch.cat([kt, one], 1), torch.cat([vt, one], 1)
        rows = max(16, TILE // m)
        scores, sums = q.new_empty(rows, m), q.new_empty(b * h, d + 1, n)
        for i in range(b * h):
            for first in range(0, n, rows):
                last = min(n, first + rows)
                p = scores[: last - first]
                torch.mm(qa[i, :, first:last].t(), ka[i], out=p).exp2_()
                sums[i, :, first:last] = va[i] @ p.t()
        out = sums[:, :d] / sums[:, d:]
        ctx.save_for_backward(q, k, v, out, sums[:, d:].log2() + shift)
        ctx.rows = rows
        return out.transpose(1, 2).reshape(b, h, n, d)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, normaliser = ctx.saved_tensors
        b, h, n, d = q.shape
        m = k.shape[2]
        qt, kt, vt, gt = (_channels_first(x).contiguous() for x in (q, k, v, gradient))
        one = torch.ones_like(kt[:, :1])
        qa = torch.cat([qt * (d**-0.5 / math.log(2)), -normaliser], 1)
        ga = torch.cat([gt, -(gt * out).sum(1, keepdim=True)], 1)
        ka, va = torch.cat([kt, one], 1), torch.cat([vt, one], 1)
        dq, dk, dv = torch.empty_like(qt), torch.zeros_like(kt), torch.zeros_like(vt)
        weights, slopes = q.new_empty(ctx.rows, m), q.new_empty(ctx.rows, m)
        for i in range(b * h):
            for first in range(0, n, ctx.rows):
                last = min(n, first + ctx.rows)
                p, s = weights[: last - first], slopes[: last - first]
                torch.mm(qa[i, :, first:last].t(), ka[i], out=p).exp2_()
                torch.mm(ga[i, :, first:last].t(), va[i], out=s)
                dv[i].addmm_(gt[i, :, first:last], p)
                s.mul_(p)
                dq[i, :, first:last] = kt[i] @ s.t()
                dk[i].addmm_(qt[i, :, first:last], s)
        gradients = ((dq * d**-0.5, q), (dk * d**-0.5, k), (dv, v))
        return *(g.transpose(1, 2).reshape(like.shape) for g, like in gradients), None


def _channels_first(tokens: Tensor) -> Tensor:
    """`(B, heads, n, d)` as `(B heads, d, n)`."""
    b, h, n, d = tokens.shape
    return tokens.reshape(b * h, n, d).transpose(1, 2)
