"""expert_gather and expert_scatter against plain Python sorting and float64 sums."""

from __future__ import annotations

import oracles
import pytest
import torch
from devices import cpu_only, on_device, opcheck, ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# num_tokens, top_k, num_experts, hidden_size
SHAPES = [(1, 1, 1, 1), (5, 2, 3, 7), (33, 4, 6, 64), (64, 8, 16, 300), (0, 2, 3, 5), (4, 0, 3, 5), (3, 2, 3, 0)]


def routed(num_tokens, top_k, num_experts, missing=True):
    """Random pairs; with `missing`, some are "not here"."""
    return torch.randint(num_experts + int(missing), (num_tokens, top_k))


def tolerance(dtype):
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    return {"rtol": bound, "atol": bound}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gather(shape, missing, dtype):
    num_tokens, top_k, num_experts, hidden_size = shape
    x, index = torch.randn(num_tokens, hidden_size, dtype=dtype), routed(num_tokens, top_k, num_experts, missing)
    permuted, offsets, inverse = ops.expert_gather(x, index, num_experts)
    order, expected_offsets, expected_inverse = oracles.sort_pairs(index, num_experts)
    assert offsets.dtype == inverse.dtype == torch.int32
    assert offsets.tolist() == expected_offsets
    assert torch.equal(inverse, expected_inverse)
    assert permuted.shape == (num_tokens * top_k, hidden_size)
    tokens = torch.tensor([pair // max(top_k, 1) for pair in order], dtype=torch.int64)
    assert torch.equal(permuted[: len(order)], x[tokens])
    assert not permuted[len(order) :].any()


@pytest.mark.parametrize("weights_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter(shape, dtype, weights_dtype):
    num_tokens, top_k, num_experts, hidden_size = shape
    _, _, inverse = ops.expert_gather(
        torch.zeros(num_tokens, hidden_size), routed(num_tokens, top_k, num_experts), num_experts
    )
    permuted = torch.randn(num_tokens * top_k, hidden_size).to(dtype).requires_grad_()
    weights = None
    if weights_dtype is not None:
        weights = torch.randn(num_tokens, top_k).to(weights_dtype).requires_grad_()
    out = ops.expert_scatter(permuted, inverse, weights)
    assert out.dtype == dtype

    exact_permuted = permuted.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_() if weights is not None else None
    expected = oracles.combine(exact_permuted, inverse, exact_weights)
    torch.testing.assert_close(out.double(), expected, **tolerance(dtype))

    grad_out = torch.randn(num_tokens, hidden_size).to(dtype)
    out.backward(grad_out)
    expected.backward(grad_out.double())
    torch.testing.assert_close(permuted.grad.double(), exact_permuted.grad, **tolerance(dtype))
    if weights is not None:
        close = {"rtol": 1e-4, "atol": 1e-4} if weights_dtype == torch.float32 else {"rtol": 8e-3, "atol": 8e-2}
        torch.testing.assert_close(weights.grad.double(), exact_weights.grad, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_gradient(shape, dtype):
    num_tokens, top_k, num_experts, hidden_size = shape
    x, index = torch.randn(num_tokens, hidden_size).to(dtype).requires_grad_(), routed(num_tokens, top_k, num_experts)
    permuted, _, inverse = ops.expert_gather(x, index, num_experts)
    grad = torch.randn(permuted.shape).to(dtype)
    permuted.backward(grad)
    torch.testing.assert_close(x.grad.double(), oracles.combine(grad.double(), inverse, None), **tolerance(dtype))


@cpu_only
@pytest.mark.parametrize("hidden_size", [2048, 2041])
def test_results_too_large_for_the_caches(hidden_size):
    """They are stored past the caches where rows are aligned, and as usual where not."""
    x, index = torch.randn(4200, hidden_size).bfloat16(), routed(4200, 2, 4)
    permuted, _, inverse = ops.expert_gather(x, index, 4)
    rows = torch.cat((x, x.new_zeros(1, hidden_size)))
    token = torch.full((8400,), 4200)
    token[inverse[inverse >= 0].long()] = torch.arange(4200)[:, None].expand(-1, 2)[inverse >= 0]
    assert torch.equal(permuted, rows[token])
    expected = x.float() * (inverse >= 0).sum(1, keepdim=True)
    assert torch.equal(ops.expert_scatter(permuted, inverse, None), expected.bfloat16())

    grad_out, weights = torch.randn(4200, hidden_size).bfloat16(), torch.rand(4200, 2)
    grad_permuted, grad_weights = on_device(
        torch.ops.usaf.expert_scatter_backward, grad_out, permuted, inverse, weights
    )
    owned = inverse >= 0
    scaled = torch.zeros_like(permuted)
    scaled[inverse[owned].long()] = (weights[..., None] * grad_out[:, None].float()).bfloat16()[owned]
    assert torch.equal(grad_permuted, scaled)
    dots = (x.double() * grad_out.double()).sum(1, keepdim=True) * owned
    torch.testing.assert_close(grad_weights.double(), dots, rtol=1e-4, atol=1e-3)


def test_scatter_rows_no_pair_owns_get_zero_gradient():
    permuted = torch.randn(5, 4, requires_grad=True)
    inverse = torch.tensor([[3, -1], [0, 2]], dtype=torch.int32)
    weights = torch.ones(2, 2, requires_grad=True)
    ops.expert_scatter(permuted, inverse, weights).sum().backward()
    assert permuted.grad.sum(1).tolist() == [4.0, 0.0, 4.0, 4.0, 0.0]
    assert weights.grad[0, 1] == 0.0


def test_gather_then_scatter_is_the_weighted_token():
    x, index, weights = torch.randn(40, 100), routed(40, 4, 8, missing=False), torch.rand(40, 4)
    permuted, _, inverse = ops.expert_gather(x, index, 8)
    torch.testing.assert_close(ops.expert_scatter(permuted, inverse, weights), x * weights.sum(1, keepdim=True))


def test_strided_inputs():
    x, index, weights = torch.randn(30, 20).t(), routed(2, 20, 5).t(), torch.randn(2, 20).t()
    got = ops.expert_gather(x, index, 5)
    for a, b in zip(got, ops.expert_gather(x.contiguous(), index.contiguous(), 5)):
        assert torch.equal(a, b)
    permuted, _, inverse = got
    strided = ops.expert_scatter(permuted.t().contiguous().t(), inverse.t().contiguous().t(), weights)
    assert torch.equal(strided, ops.expert_scatter(permuted, inverse, weights.contiguous()))


@cpu_only
def test_bad_arguments():
    x, index, weights = torch.randn(4, 6), torch.randint(3, (4, 2)), torch.rand(4, 2)
    permuted, _, inverse = ops.expert_gather(x, index, 3)
    twice = inverse.clone()
    twice[0, 0] = twice[1, 0]
    for error, argument, call in [
        (TypeError, "x", lambda: ops.expert_gather(x.tolist(), index, 3)),
        (TypeError, "x", lambda: ops.expert_gather(x.double(), index, 3)),
        (ValueError, "x", lambda: ops.expert_gather(x[0], index, 3)),
        (TypeError, "index", lambda: ops.expert_gather(x, index.int(), 3)),
        (ValueError, "index", lambda: ops.expert_gather(x, index[:3], 3)),
        (ValueError, "index", lambda: ops.expert_gather(x, index[:, 0], 3)),
        (ValueError, "index.*position 3", lambda: ops.expert_gather(x, index.put(torch.tensor(3), torch.tensor(4)), 3)),
        (ValueError, "index", lambda: ops.expert_gather(x, index.put(torch.tensor(0), torch.tensor(-1)), 3)),
        (ValueError, "num_experts", lambda: ops.expert_gather(x, index, 0)),
        (TypeError, "num_experts", lambda: ops.expert_gather(x, index, 3.0)),
        (TypeError, "permuted", lambda: ops.expert_scatter(permuted.double(), inverse, weights)),
        (ValueError, "permuted", lambda: ops.expert_scatter(permuted[0], inverse, weights)),
        (TypeError, "inverse", lambda: ops.expert_scatter(permuted, inverse.long(), weights)),
        (ValueError, "inverse", lambda: ops.expert_scatter(permuted[:7], inverse, weights)),
        (ValueError, "inverse", lambda: ops.expert_scatter(permuted, inverse - 2, weights)),
        (ValueError, "inverse.*twice", lambda: ops.expert_scatter(permuted, twice, weights)),
        (ValueError, "weights", lambda: ops.expert_scatter(permuted, inverse, weights[:, :1])),
        (TypeError, "weights", lambda: ops.expert_scatter(permuted, inverse, weights.double())),
        (TypeError, "weights", lambda: ops.expert_scatter(permuted, inverse, 1.0)),
    ]:
        with pytest.raises(error, match=argument):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, index = torch.randn(5, 6).to(dtype), routed(5, 2, 3)
    permuted, _, inverse = ops.expert_gather(x, index, 3)
    weights, grad_out = torch.rand(5, 2), torch.randn(5, 6).to(dtype)
    opcheck(torch.ops.usaf.expert_gather.default, (x.clone().requires_grad_(), index, 3))
    scatter = torch.ops.usaf.expert_scatter.default
    opcheck(scatter, (permuted.clone().requires_grad_(), inverse, weights.clone().requires_grad_()))
    opcheck(scatter, (permuted, inverse, None))
    opcheck(torch.ops.usaf.expert_scatter_backward.default, (grad_out, permuted, inverse, weights))
    opcheck(torch.ops.usaf.expert_scatter_backward.default, (grad_out, permuted, inverse, None))


def test_double_backward_refuses():
    permuted, inverse = torch.randn(4, 3, requires_grad=True), torch.arange(4, dtype=torch.int32).view(2, 2)
    weights = torch.rand(2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.expert_scatter(permuted, inverse, weights).sum(), permuted, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_scatter_backward is not implemented"):
        grad.sum().backward()


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype):
    x, index, weights = torch.randn(200, 512).to(dtype), routed(200, 4, 8), torch.rand(200, 4, requires_grad=True)

    def run():
        permuted, offsets, inverse = ops.expert_gather(x, index, 8)
        permuted.requires_grad_()
        out = ops.expert_scatter(permuted, inverse, weights)
        return permuted, offsets, inverse, out, *torch.autograd.grad(out, (permuted, weights), out)

    assert oracles.same_for_any_threads(run)
