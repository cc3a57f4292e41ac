import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from afterimage.models.layers import attention as module
from afterimage.models.layers.attention import _bound, attend, compiled_attention


@pytest.fixture
def compiled():
    """The compiled kernel, where numba is installed."""
    pytest.importorskip("numba")
    return compiled_attention()[0]


def tokens(*shape, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        (torch.randn(*shape, generator=generator, dtype=dtype) * scale).requires_grad_() for _ in range(3)
    ]


def agree(ours, expected, inputs, gradient):
    torch.testing.assert_close(ours, expected, atol=3e-6, rtol=1e-4)
    got, theirs = (torch.autograd.grad(x, inputs, gradient) for x in (ours, expected))
    for mine, other in zip(got, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("n", "d", "scale"), [(600, 8, 1.0), (700, 3, 1.5), (513, 1, 0.1)])
def test_narrow_heads_give_what_the_built_in_kernel_gives(n, d, scale, compiled, monkeypatch):
    q, k, v = tokens(2, 3, n, d, scale=scale)
    assert float(_bound(q, k).max()) < module.MAX_SCORE_BOUND
    with monkeypatch.context() as only:
        only.setattr(F, "scaled_dot_product_attention", None)
        ours = attend(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v)
    agree(ours, expected, (q, k, v), torch.linspace(-1, 1, ours.numel()).view_as(ours))


def test_narrow_heads_are_exact_under_autocast(compiled):
    q, k, v = tokens(2, 3, 600, 8)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    same = [x.detach().float().requires_grad_() for x in half]
    expected = F.scaled_dot_product_attention(*same)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(*half)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected.bfloat16(), atol=1e-7, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        exact = compiled.apply(*same, _bound(*same[:2]))
    agree(exact, expected, same, torch.linspace(-1, 1, exact.numel()).view_as(exact))


def test_no_images_give_no_tokens(compiled):
    """As one of several ranks may have."""
    q = torch.zeros(0, 2, 600, 8, requires_grad=True)
    out = attend(q, q, q)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_scores_that_could_underflow_go_to_the_built_in_kernel():
    q, k, v = tokens(1, 1, 600, 8, scale=12.0)
    assert float(_bound(q, k).max()) > module.MAX_SCORE_BOUND
    out = attend(q, k, v)
    assert out.isfinite().all() and torch.equal(out, F.scaled_dot_product_attention(q, k, v))


def test_queries_may_be_other_tokens_than_keys(compiled):
    """Neither count is a multiple of a tile's rows or keys."""
    q, _, gradient = tokens(2, 3, 37, 5)
    k, v, _ = tokens(2, 3, 611, 5)
    agree(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)


@pytest.mark.parametrize("threads", [1, 3, 5, 64])
def test_threads_divide_heads_and_rows_without_a_difference(threads, compiled):
    q, k, v = tokens(1, 2, 603, 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        agree(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), (q, k, v), torch.ones_like(q))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", [0, 2], ids=["queries", "values"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(wrong, where, compiled):
    """Training looks at its loss for this; a kernel that assumes finite numbers would hide it."""
    inputs = [x.detach() for x in tokens(1, 2, 600, 8)]
    inputs[where][0, 1, 5, 2] = wrong
    out = attend(*inputs)
    assert not out[0, 1].isfinite().all() and out[0, 0].isfinite().all()


def test_a_gradient_that_is_not_finite_stays_so(compiled):
    q, k, v = tokens(1, 2, 600, 8)
    gradient = torch.zeros(1, 2, 600, 8)
    gradient[0, 1, 5, 2] = float("nan")
    for part in torch.autograd.grad(attend(q, k, v), (q, k, v), gradient):
        assert part[0, 1].isnan().any() and part[0, 0].isfinite().all()


def test_compiled_attention_has_no_second_derivative_rather_than_a_wrong_one():
    pytest.importorskip("numba")
    q, k, v = tokens(1, 1, 600, 8)
    (slope,) = torch.autograd.grad(attend(q, k, v).square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def no_folder(*args, **kwargs):
    raise RuntimeError("cannot cache function: no locator available")


@pytest.mark.parametrize("broken", [None, SimpleNamespace(njit=no_folder)], ids=["import", "cache"])
def test_without_numba_or_with_one_that_cannot_be_used_pytorch_attends(broken, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert compiled_attention.__wrapped__() == (None, "by PyTorch (numba is not installed)")
    monkeypatch.undo()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "numba", broken)
    monkeypatch.delitem(sys.modules, "afterimage.models.layers.attention_numba", raising=False)
    kernel, said = compiled_attention.__wrapped__()
    assert kernel is None and said.startswith("by PyTorch (numba cannot be used: ")
    monkeypatch.setattr(module, "compiled_attention", lambda: (kernel, said))
    q, k, v = tokens(1, 1, 600, 8)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_with_numba_heads_are_compiled(compiled):
    said = compiled_attention()[1]
    assert compiled.__name__ == "CompiledAttention" and said.startswith("compiled by numba ")
