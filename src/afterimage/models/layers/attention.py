"""Exact attention whose memory grows linearly with the number of tokens.

PyTorch's kernel is used except for narrow heads on a CPU, for which kernels of this package are faster.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.models.layers.blocks import log2_scale

NARROW = 8
"""Channels of a head up to which PyTorch's CPU kernel is slower than the kernels here."""
FEW = 512
"""Number of keys below which the kernels here save no time."""
TILE = 1 << 19
"""Scores that are held at a time, 2 MB: heads x queries x keys."""
HEADS, ROWS = 8, 16
"""Largest number of heads of a tile, and smallest number of its queries."""
LARGEST = 60.0
"""Largest bound of the scores, as a power of two, for which subtracting the bound cannot underflow."""


def attend(
    q: Float[Tensor, "batch heads n d"],
    k: Float[Tensor, "batch heads m d"],
    v: Float[Tensor, "batch heads m d"],
) -> Float[Tensor, "batch heads n d"]:
    """Compute `softmax(q k' / sqrt(d)) v` without holding the matrix of all pairs.

    Args:
        q: queries `(B, heads, n, d)`
        k: keys `(B, heads, m, d)`
        v: values `(B, heads, m, d)`

    Returns:
        `(B, heads, n, d)`
    """
    single = q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and q.numel() and single and q.shape[-1] <= NARROW and k.shape[-2] >= FEW:
        exact = q.float(), k.float(), v.float()
        bound = _bound(*exact[:2])
        if float(bound.max()) <= LARGEST:
            return narrow_attention()[0].apply(*exact, bound).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def narrow_attention() -> tuple[type[torch.autograd.Function], str]:
    """Choose the attention for narrow heads on a CPU: loops compiled by numba if it is usable, otherwise tiles.

    Both are exact to float32's rounding. The first call of an installation compiles for some seconds; numba
    stores the result.

    Returns:
        the autograd function, and a description of the choice
    """
    if importlib.util.find_spec("numba") is None:
        return TiledAttention, "in tiles (numba is not installed)"
    try:
        from afterimage.models.layers.attention_numba import CompiledAttention
    except (ImportError, RuntimeError) as error:  # RuntimeError: numba finds no folder for its cache
        return TiledAttention, f"in tiles (numba cannot be used: {error})"
    return CompiledAttention, f"compiled by numba {metadata.version('numba')}"


@torch.no_grad()
def _bound(q: Tensor, k: Tensor) -> Tensor:
    """Bound the scores of each query, as powers of two, by the inequality of Cauchy and Schwarz: `(B, heads, n)`."""
    return q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True) * log2_scale(q.shape[-1])


class TiledAttention(torch.autograd.Function):
    """Attention on some rows of queries at a time; scores are recomputed for the gradient (Rabe and Staats 2021).

    Channels come first internally, because `(d, n) x (n, rows)` products are several times as fast as `(rows, n) x (n,
    d)` for small d. A row appended to each factor makes the products also subtract the softmax's shift, sum its
    denominator, and subtract the row sums in the gradient. Powers of two are faster than exponentials. Everything is in
    float32 also under autocast, as such thin products gain nothing from fewer bits.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bound: Tensor) -> Tensor:
        b, h, n, d = q.shape
        qt, kt, vt = (_channels_first(x) for x in (q, k, v))
        shift = bound.reshape(b * h, 1, n)
        one = torch.ones_like(kt[:, :1])
        qa = torch.cat([qt * log2_scale(d), -shift], 1).mT.contiguous()
        ka, va = torch.cat([kt, one], 1), torch.cat([vt, one], 1)
        sums = q.new_empty(b * h, d + 1, n)
        for i, tile, p in _tiles(kt, n, 1):
            torch.bmm(qa[i, tile], ka[i], out=p).exp2_()
            sums[i, :, tile] = va[i] @ p.mT
        out = sums[:, :d] / sums[:, d:]
        ctx.save_for_backward(q, k, v, out, sums[:, d:].log2() + shift)
        return out.mT.reshape(b, h, n, d)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, normaliser = ctx.saved_tensors
        n, d = q.shape[2:]
        qt, kt, vt, gt = (_channels_first(x).contiguous() for x in (q, k, v, gradient))
        one = torch.ones_like(kt[:, :1])
        qa = torch.cat([qt * log2_scale(d), -normaliser], 1).mT.contiguous()
        ga = torch.cat([gt, -(gt * out).sum(1, keepdim=True)], 1).mT.contiguous()
        ka, va = torch.cat([kt, one], 1), torch.cat([vt, one], 1)
        dq, dk, dv = torch.empty_like(qt), torch.zeros_like(kt), torch.zeros_like(vt)
        for i, tile, p, s in _tiles(kt, n, 2):
            torch.bmm(qa[i, tile], ka[i], out=p).exp2_()
            torch.bmm(ga[i, tile], va[i], out=s)
            dv[i].baddbmm_(gt[i, :, tile], p)
            s.mul_(p)
            dq[i, :, tile] = kt[i] @ s.mT
            dk[i].baddbmm_(qt[i, :, tile], s)
        gradients = ((dq * d**-0.5, q), (dk * d**-0.5, k), (dv, v))
        return *(g.mT.reshape(like.shape) for g, like in gradients), None


def _tiles(keys: Tensor, n: int, count: int) -> Iterator[tuple[Any, ...]]:
    """Yield a slice of heads, a slice of their queries, and `count` matrices `(heads, rows, m)` to fill.

    The next tile overwrites the matrices. A tile has several heads, because threads divide a product by heads
    and not by rows.
    """
    heads, _, m = keys.shape
    at_once = min(heads, HEADS, max(1, TILE // (ROWS * m)))
    rows = max(ROWS, TILE // (at_once * m))
    space = [keys.new_empty(at_once * rows * m) for _ in range(count)]
    for first in range(0, heads, at_once):
        chosen = slice(first, min(heads, first + at_once))
        for row in range(0, n, rows):
            tile = slice(row, min(n, row + rows))
            shape = (chosen.stop - first, tile.stop - row, m)
            yield chosen, tile, *(part[: math.prod(shape)].view(shape) for part in space)


def _channels_first(tokens: Tensor) -> Tensor:
    """Reshape `(B, heads, n, d)` to `(B heads, d, n)`."""
    b, h, n, d = tokens.shape
    return tokens.reshape(b * h, n, d).mT


class TransformerBlock(nn.Module):
    """A pre-norm transformer block (Vaswani et al. 2017; Xiong et al. 2020) on tokens `(B, N, C)`.

    Args:
        channels: channels of the tokens
        heads: number of attention heads, which divides `channels`
        hidden: channels of the MLP's hidden layer
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, c = tokens.shape
        q, k, v = (
            self.qkv(self.norm1(tokens)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )
        attended = attend(q, k, v)
        tokens = tokens + self.projection(attended.transpose(1, 2).reshape(b, n, c))
        return tokens + self.mlp(self.norm2(tokens))
