"""Exact attention of narrow heads on a CPU, compiled by numba for the processor at hand.

The scores stay in registers and the L1 cache, and are computed again for the gradient (Dao et al. 2022,
FlashAttention, algorithms 1 and 4; a bound of the scores is subtracted instead of a running maximum). Only
`attention` imports this module, and only if numba is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from afterimage.models.layers.blocks import log2_scale

WIDTH = 8
"""Channels of a head; narrower heads are padded with zeros."""
ROWS, KEYS = 8, 256
"""Queries and keys of a tile of the backward pass, chosen so that all its arrays fit into the L1 cache."""

# Reordering sums allows vector instructions in loops over keys. NaN and infinity keep their meaning.
SUMS = {"contract", "nsz", "arcp", "reassoc"}
ROUNDING = {"contract", "nsz", "arcp"}
ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = (ZERO,) * WIDTH
ROUND = np.float32(3 << 22)
"""Number 1.5 * 2^23: adding it rounds a float32 between -2^22 and 2^22; the integer is then in the lowest
bits."""


# `no_type_check` stops runtime type checkers from wrapping functions that numba compiles.
@njit(fastmath=ROUNDING, cache=True)
@no_type_check
def _power(x):
    """Compute `2^x` for x up to 127 with a relative error of 2e-7; for x below -126 the result is `2^-126`."""
    x = max(x, np.float32(-126))
    whole = np.float32(x + ROUND)
    y = x - (whole - ROUND)
    # Chebyshev interpolation of 2^y between -1/2 and 1/2.
    p = np.float32(1.339086336e-3)
    p = p * y + np.float32(9.676031918e-3)
    p = p * y + np.float32(5.550357114e-2)
    p = p * y + np.float32(2.402210749e-1)
    p = p * y + np.float32(6.931471880e-1)
    p = np.float32(p * y + np.float32(1.000000075))
    return np.int32(p.view(np.int32) + (whole.view(np.int32) << np.int32(23))).view(np.float32)


@njit(fastmath=SUMS, cache=True)
@no_type_check
def _row(m, r):
    return m[r, 0], m[r, 1], m[r, 2], m[r, 3], m[r, 4], m[r, 5], m[r, 6], m[r, 7]


@njit(fastmath=SUMS, cache=True)
@no_type_check
def _column(m, r, c):
    """Return column `c` of the `ROWS` rows from `r` on."""
    return m[r, c], m[r + 1, c], m[r + 2, c], m[r + 3, c], m[r + 4, c], m[r + 5, c], m[r + 6, c], m[r + 7, c]


@njit(fastmath=SUMS, cache=True)
@no_type_check
def _store(m, r, t, factor):
    m[r, 0], m[r, 1], m[r, 2], m[r, 3] = t[0] * factor, t[1] * factor, t[2] * factor, t[3] * factor
    m[r, 4], m[r, 5], m[r, 6], m[r, 7] = t[4] * factor, t[5] * factor, t[6] * factor, t[7] * factor


@njit(fastmath=SUMS, cache=True)
@no_type_check
def _dot(a, m, j):
    return (
        a[0] * m[0, j] + a[1] * m[1, j] + a[2] * m[2, j] + a[3] * m[3, j]
        + a[4] * m[4, j] + a[5] * m[5, j] + a[6] * m[6, j] + a[7] * m[7, j]
    )  # fmt: skip


@njit(fastmath=SUMS, cache=True)
@no_type_check
def _add(t, x, m, j):
    return (
        t[0] + x * m[0, j], t[1] + x * m[1, j], t[2] + x * m[2, j], t[3] + x * m[3, j],
        t[4] + x * m[4, j], t[5] + x * m[5, j], t[6] + x * m[6, j], t[7] + x * m[7, j],
    )  # fmt: skip


@njit(
    "void(f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[:,::1], f4[::1])",
    nogil=True, fastmath=SUMS, error_model="numpy", cache=True,
)  # fmt: skip
@no_type_check
def _forward(q, k, v, shift, out, normaliser):
    """Attend from some queries `(n, 8)` of a head to its keys and values `(8, m)`; scores are in base 2."""
    for r in range(q.shape[0]):
        a, s = _row(q, r), shift[r]
        weighted, total = NOTHING, ZERO
        for j in range(k.shape[1]):
            p = _power(_dot(a, k, j) - s)
            total += p
            weighted = _add(weighted, p, v, j)
        _store(out, r, weighted, ONE / total)
        normaliser[r] = np.log2(total) + s


@njit(
    "void(f4[:,::1], f4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1], f4[:,:,::1], "
    "f4[:,:,::1], i8)",
    nogil=True, fastmath=SUMS, error_model="numpy", cache=True,
)  # fmt: skip
@no_type_check
def _backward(q, powers, k, v, g, delta, normaliser, dq, dk, dv, m):
    """Compute the gradient for some queries of a head; add to `dk` and `dv` in place.

    Queries, queries scaled to powers of two, the gradient `g` and `dq` are `(n, 8)`, with n a multiple of
    `ROWS`. The m keys and values are stored in blocks `(blocks, 8, KEYS)`.
    """
    p, s = np.empty((ROWS, KEYS), np.float32), np.empty((ROWS, KEYS), np.float32)
    for first in range(0, q.shape[0], ROWS):
        for r in range(ROWS):
            _store(dq, first + r, NOTHING, ONE)
        for b in range(k.shape[0]):
            kb, vb, dkb, dvb = k[b], v[b], dk[b], dv[b]
            width = min(KEYS, m - b * KEYS)
            for r in range(ROWS):
                x = first + r
                a, n = _row(powers, x), normaliser[x]
                for j in range(width):
                    p[r, j] = _power(_dot(a, kb, j) - n)
                a, d, t = _row(g, x), delta[x], _row(dq, x)
                for j in range(width):
                    slope = p[r, j] * (_dot(a, vb, j) - d)
                    s[r, j] = slope
                    t = _add(t, slope, kb, j)
                _store(dq, x, t, ONE)
            for c in range(WIDTH):
                a = _column(q, first, c)
                for j in range(width):
                    dkb[c, j] += _dot(a, s, j)
                a = _column(g, first, c)
                for j in range(width):
                    dvb[c, j] += _dot(a, p, j)


class CompiledAttention(torch.autograd.Function):
    """Attention in compiled loops, in float32; a second derivative raises an error.

    The inputs are q, k and v `(B, heads, n, d)` with d up to 8, and the bound of the scores `(B, heads, n)`.
    The heads are divided among PyTorch's number of threads; if there are fewer heads than threads, so are
    their rows.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bound: Tensor) -> Tensor:
        (b, h, n, d), m = q.shape, k.shape[2]
        powers = _heads(q * log2_scale(d))
        keys, values = _heads(k).mT.contiguous(), _heads(v).mT.contiguous()
        shift = bound.reshape(b * h, n).contiguous()
        out, normaliser = torch.empty_like(powers), torch.empty_like(shift)
        parts = _parts(b * h, n)

        def work(i: int, rows: slice) -> None:
            queries, results = (
                _arrays(powers[i, rows], shift[i, rows]),
                _arrays(out[i, rows], normaliser[i, rows]),
            )
            _forward(queries[0], *_arrays(keys[i], values[i]), queries[1], *results)

        _in_threads(work, [(i, rows) for i in range(b * h) for rows in parts])
        ctx.save_for_backward(q, k, v, out, normaliser)
        ctx.keys = m
        return out[..., :d].reshape(b, h, n, d)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, normaliser = ctx.saved_tensors
        (b, h, n, d), m = q.shape, k.shape[2]
        g = _heads(gradient)
        # Padding rows of zeros add nothing to any gradient.
        fill = -n % ROWS
        delta, normaliser = (F.pad(x, (0, fill)) for x in ((g * out).sum(-1), normaliser))
        queries, g = (F.pad(x, (0, 0, 0, fill)) for x in (_heads(q), g))
        powers = queries * log2_scale(d)
        keys, values = _blocks(_heads(k)), _blocks(_heads(v))
        parts = _parts(b * h, n + fill)
        dq = torch.empty_like(queries)
        dk, dv = (keys.new_zeros(len(parts), *keys.shape) for _ in range(2))

        def work(i: int, part: int) -> None:
            rows = parts[part]
            _backward(
                *_arrays(queries[i, rows], powers[i, rows], keys[i], values[i], g[i, rows], delta[i, rows]),
                *_arrays(normaliser[i, rows], dq[i, rows], dk[part, i], dv[part, i]),
                m,
            )

        _in_threads(work, [(i, part) for i in range(b * h) for part in range(len(parts))])
        dk, dv = (x.sum(0).transpose(1, 2).flatten(2)[..., :m].mT for x in (dk, dv))
        gradients = ((dq[:, :n] * d**-0.5, q), (dk * d**-0.5, k), (dv, v))
        return *(x[..., :d].reshape(like.shape) for x, like in gradients), None


def _heads(tokens: Tensor) -> Tensor:
    """Pad and reshape `(B, heads, n, d)` to `(B heads, n, 8)`."""
    return F.pad(tokens, (0, WIDTH - tokens.shape[-1])).flatten(0, 1).contiguous()


def _blocks(tokens: Tensor) -> Tensor:
    """Pad and reshape `(heads, m, 8)` to `(heads, blocks, 8, KEYS)`."""
    heads, m, _ = tokens.shape
    return F.pad(tokens, (0, 0, 0, -m % KEYS)).view(heads, -1, KEYS, WIDTH).mT.contiguous()


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def _parts(heads: int, n: int) -> list[slice]:
    """Divide the rows of each head among threads, in multiples of `ROWS`."""
    count = math.ceil(torch.get_num_threads() / heads)
    step = ROWS * math.ceil(n / (ROWS * count))
    return [slice(first, min(n, first + step)) for first in range(0, n, step)]


def _in_threads(work: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in [pool.submit(work, *each) for each in arguments]:
            done.result()
