"""Exact attention whose memory grows linearly with the number of tokens.

PyTorch's kernel is used, except for narrow heads on a CPU: there a kernel compiled by numba is faster.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from afterimage.models.layers.blocks import log2_scale

MAX_HEAD_CHANNELS = 8
"""Largest number of channels of a head for which the compiled kernel is faster than PyTorch's on a CPU."""
MIN_KEYS = 512
"""Number of keys below which the compiled kernel saves no time."""
MAX_SCORE_BOUND = 60.0
"""Largest bound of the scores, as a power of two, for which subtracting the bound cannot underflow."""


def attend(
    q: Float[Tensor, "batch heads n d"],
    k: Float[Tensor, "batch heads m d"],
    v: Float[Tensor, "batch heads m d"],
) -> Float[Tensor, "batch heads n d"]:
    """Compute `softmax(q k' / sqrt(d)) v` without storing the matrix of all pairs.

    Args:
        q: queries `(B, heads, n, d)`
        k: keys `(B, heads, m, d)`
        v: values `(B, heads, m, d)`

    Returns:
        `(B, heads, n, d)`
    """
    single = q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (
        q.device.type == "cpu"
        and q.numel()
        and single
        and q.shape[-1] <= MAX_HEAD_CHANNELS
        and k.shape[-2] >= MIN_KEYS
    ):
        kernel = compiled_attention()[0]
        exact = q.float(), k.float(), v.float()
        if kernel is not None and float((bound := _bound(*exact[:2])).max()) <= MAX_SCORE_BOUND:
            return kernel.apply(*exact, bound).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def compiled_attention() -> tuple[type[torch.autograd.Function] | None, str]:
    """Return the compiled attention for narrow heads on a CPU, if numba is usable; exact to float32 rounding.

    The first call after an installation compiles for some seconds; numba caches the result.

    Returns:
        the autograd function or None, and a description of the kernel in use
    """
    if importlib.util.find_spec("numba") is None:
        return None, "by PyTorch (numba is not installed)"
    try:
        from afterimage.models.layers.attention_numba import CompiledAttention
    except (ImportError, RuntimeError) as error:  # RuntimeError: numba finds no folder for its cache
        return None, f"by PyTorch (numba cannot be used: {error})"
    return CompiledAttention, f"compiled by numba {metadata.version('numba')}"


@torch.no_grad()
def _bound(q: Tensor, k: Tensor) -> Tensor:
    """Bound each query's scores, in powers of two, by the Cauchy-Schwarz inequality: `(B, heads, n)`."""
    return q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True) * log2_scale(q.shape[-1])


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
