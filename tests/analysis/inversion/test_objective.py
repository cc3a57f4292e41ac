import pytest
import torch
import torch.nn.functional as F

from afterimage.analysis.inversion import objective
from afterimage.analysis.inversion.objective import MatmulAttention


def attend(dtype, *, seed=0, shape=(2, 3, 37, 16), keys=37, **options):
    """An attention's output and the gradients of its inputs, from inputs that are the same for each `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape, (*shape[:-2], keys, shape[-1]), (*shape[:-2], keys, shape[-1])]
    inputs = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    output = F.scaled_dot_product_attention(*inputs, **options)
    output.backward(torch.randn(shape, generator=generator).to(dtype))
    return [output.detach(), *(one.grad for one in inputs)]


@pytest.fixture
def calls(monkeypatch):
    """How often attention was computed by matrix products."""
    found, apply = [], objective._Attention.apply
    monkeypatch.setattr(
        objective._Attention, "apply", lambda *arguments: found.append(1) or apply(*arguments)
    )
    return found


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"keys": 5}, {"attn_mask": None, "dropout_p": 0.0}])
def test_it_comes_as_near_to_float32_as_pytorchs_kernel(options, calls):
    exact, theirs = attend(torch.float32, **options), attend(torch.bfloat16, **options)
    with MatmulAttention():
        ours = attend(torch.bfloat16, **options)
    assert calls
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == reference.shape
        error, usual = ((got.float() - reference).norm() / reference.norm() for got in (one, other))
        assert error < 2 * usual + 1e-3


@pytest.mark.parametrize(
    "options", [{"attn_mask": torch.ones(37, 37).tril().bool()}, {"is_causal": True}, {"dropout_p": 1.0}]
)
def test_what_it_cannot_do_is_left_to_pytorch(options, calls):
    theirs = attend(torch.float32, **options)
    with MatmulAttention():
        ours = attend(torch.float32, **options)
    assert not calls and all(map(torch.equal, ours, theirs))


def test_long_sequences_are_left_to_pytorch(monkeypatch, calls):
    monkeypatch.setattr(objective, "MAX_ATTENTION_WEIGHTS", 2 * 3 * 37 * 37 - 1)
    with MatmulAttention():
        attend(torch.bfloat16)
    assert not calls
