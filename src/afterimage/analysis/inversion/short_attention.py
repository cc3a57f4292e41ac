"""Attention over the few hundred tokens of an image, in bfloat16 on a CPU, which stores the attention matrix.

PyTorch's kernel for CPUs never stores that matrix, which only long sequences need. It takes a third of a
vision transformer's pass. For short sequences plain matrix products need a third of its time; most of the
saving is in the backward pass (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

MATRIX = 2**25
"""Largest number of attention weights of a batch; larger ones are left to PyTorch's kernel."""


class ShortAttention(TorchFunctionMode):
    """Context in which `scaled_dot_product_attention` of short sequences uses matrix products in bfloat16.

    PyTorch still handles calls that are causal or have a mask, dropout or fewer heads of keys than of
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
            if plain and same and query.shape[:-1].numel() * key.shape[-2] <= MATRIX:
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
