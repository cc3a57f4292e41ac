"""Attention over the few hundred tokens of an image, in bfloat16 on a CPU, with the whole matrix of weights at hand.

PyTorch's kernel for CPUs never holds that matrix, which long sequences need. For short ones plain matrix products take
a third of its time, most of it saved in the backward pass: a third of a vision transformer's pass (docs/LOG.md).
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
"""Weights of a batch that are held at most; more are left to PyTorch's kernel."""


class ShortAttention(TorchFunctionMode):
    """Inside the block, `scaled_dot_product_attention` of short sequences computes in bfloat16 by matrix products.

    Calls with a mask, with dropout or with fewer heads of keys than of queries go where they went before.
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
