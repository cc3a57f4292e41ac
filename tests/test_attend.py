import pytest
import torch
import torch.nn.functional as F

from afterimage.decoders import attend as module
from afterimage.decoders.attend import TiledAttention, _bound, attend


def tokens(*shape, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        (torch.randn(*shape, generator=generator, dtype=dtype) * scale).requires_grad_() for _ in range(3)
    ]


@pytest.mark.parametrize(
    ("n", "d", "scale", "rows"),
    [(600, 8, 1.0, 100), (700, 3, 1.5, 64), (513, 1, 0.1, 17), (600, 8, 1.0, 6000)],
)
def test_tiles_give_what_the_built_in_kernel_gives(n, d, scale, rows, monkeypatch):
    monkeypatch.setattr(module, "TILE", rows * n)
    q, k, v = tokens(2, 3, n, d, scale=scale)
    assert float(_bound(q, k).max()) < module.LARGEST
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    ours = attend(q, k, v)
    monkeypatch.undo()
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, expected, atol=3e-6, rtol=1e-4)
    slope = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    got = torch.autograd.grad((ours * slope).sum(), (q, k, v))
    for ours, theirs in zip(got, torch.autograd.grad((expected * slope).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_tiles_are_exact_under_autocast():
    q, k, v = tokens(2, 3, 600, 8)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    same = [x.detach().float().requires_grad_() for x in half]
    expected = F.scaled_dot_product_attention(*same)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(*half)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected.bfloat16(), atol=0, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        exact = TiledAttention.apply(*same, _bound(*same[:2]))
    torch.testing.assert_close(exact, expected, atol=3e-6, rtol=1e-4)
    slope = torch.linspace(-1, 1, exact.numel()).view_as(exact)
    got = torch.autograd.grad((exact * slope).sum(), same)
    for ours, theirs in zip(got, torch.autograd.grad((expected * slope).sum(), same), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_gradient_of_tiles_against_finite_differences(monkeypatch):
    monkeypatch.setattr(module, "TILE", 16 * 20)
    q, k, v = tokens(1, 2, 20, 3, dtype=torch.float64)
    with torch.no_grad():
        bound = _bound(q, k)
    assert torch.autograd.gradcheck(lambda q, k, v: TiledAttention.apply(q, k, v, bound + 1), (q, k, v))


def test_scores_that_could_underflow_go_to_the_built_in_kernel():
    q, k, v = tokens(1, 1, 600, 8, scale=12.0)
    assert float(_bound(q, k).max()) > module.LARGEST
    out = attend(q, k, v)
    assert out.isfinite().all() and torch.equal(out, F.scaled_dot_product_attention(q, k, v))
