"""glu and glu_backward against torch autograd in float64."""

from __future__ import annotations

import oracles
import pytest
import torch
from devices import cpu_only, on_device, opcheck, ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh", "swiglu_clamped"]
SHAPES = [(1, 1), (3, 7), (5, 128), (4, 129), (2, 300), (0, 8), (3, 0)]


def tolerance(dtype):
    return {"rtol": {torch.float32: 2e-6, torch.bfloat16: 4.1e-3, torch.float16: 5.1e-4}[dtype], "atol": 1e-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient(shape, activation, interleaved, with_bias, dtype):
    num_rows, intermediate_size = shape
    gate_up = (torch.randn(num_rows, 2 * intermediate_size) * 4).to(dtype).requires_grad_()
    bias = torch.randn(2 * intermediate_size) if with_bias else None
    h = ops.glu(gate_up, activation, interleaved, bias)
    assert h.dtype == dtype
    assert h.shape == shape
    exact = gate_up.detach().double().requires_grad_()
    # The op adds the bias in fp32: the oracle starts from that sum, exactly.
    shift = None if bias is None else (gate_up.detach().float() + bias).double() - gate_up.detach().double()
    expected = oracles.glu(exact, activation, interleaved, shift)
    torch.testing.assert_close(h.double(), expected, **tolerance(dtype))
    grad_h = torch.randn(h.shape).to(dtype)
    h.backward(grad_h)
    expected.backward(grad_h.double())
    close = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-4}
    torch.testing.assert_close(gate_up.grad.double(), exact.grad, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_with_row_weight(shape, activation, with_weight, dtype):
    num_rows, intermediate_size = shape
    gate_up = (torch.randn(num_rows, 2 * intermediate_size) * 2).to(dtype)
    grad_h = torch.randn(shape).to(dtype)
    weight = torch.randn(num_rows) if with_weight else None
    grad_gate_up, weighted_h, grad_weight = ops.glu_backward(grad_h, gate_up, activation, weight)
    exact = gate_up.double().requires_grad_()
    exact_weight = (weight if with_weight else torch.ones(num_rows)).double().requires_grad_()
    expected_h = oracles.glu(exact, activation) * exact_weight.unsqueeze(-1)
    # grad_h is the gradient before the router weight, so the loss is <grad_h, w * h>.
    (expected_h * grad_h.double()).sum().backward()
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    torch.testing.assert_close(grad_gate_up.double(), exact.grad, **close)
    torch.testing.assert_close(weighted_h.double(), expected_h.detach(), **close)
    assert grad_weight.dtype == torch.float32
    torch.testing.assert_close(grad_weight.double(), exact_weight.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(activation):
    gate = torch.tensor([-3e38, -1e6, -200.0, -88.0, -20.0, -0.0, 0.0, 1e-30, 7.0, 7.1, 20.0, 88.0, 200.0, 1e6])
    up = torch.tensor([0.5, -7.5]).repeat_interleave(14)
    gate_up = torch.stack((gate.repeat(2), up), 1)
    h = ops.glu(gate_up, activation)
    expected = oracles.glu(gate_up.double(), activation)
    torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=1e-5)
    grads = ops.glu_backward(torch.ones_like(h), gate_up, activation)
    assert all(grad.isfinite().all() for grad in grads)
    assert ops.glu(torch.tensor([[float("nan"), 1.0]]), activation).isnan().all()


def test_sigmoid_is_within_three_ulp():
    gate = torch.linspace(-80, 80, 20001)
    h = ops.glu(torch.stack((gate, torch.ones_like(gate)), 1), "silu").flatten()
    exact = torch.nn.functional.silu(gate.double())
    ulp = torch.nextafter(exact.abs().float(), torch.tensor(float("inf"))).double() - exact.abs().float().double()
    assert ((h.double() - exact).abs() / ulp).max() < 4


def test_strided_inputs():
    gate_up = torch.randn(10, 6).t()
    assert torch.equal(ops.glu(gate_up), ops.glu(gate_up.contiguous()))
    grad_h = torch.randn(5, 6).t()
    expected = ops.glu_backward(grad_h.contiguous(), gate_up.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ops.glu_backward(grad_h, gate_up), expected))


@cpu_only
def test_bad_arguments():
    gate_up, grad_h = torch.randn(3, 8), torch.randn(3, 4)
    bias, weight = torch.randn(8), torch.randn(3)
    for error, argument, call in [
        (TypeError, "gate_up", lambda: ops.glu(None)),
        (TypeError, "gate_up", lambda: ops.glu(gate_up.double())),
        (ValueError, "gate_up", lambda: ops.glu(gate_up[:, :7])),
        (ValueError, "gate_up", lambda: ops.glu(gate_up[0])),
        (ValueError, "activation.*'gelu_tanh'.*'relu'", lambda: ops.glu(gate_up, "relu")),
        (TypeError, "activation", lambda: ops.glu(gate_up, None)),
        (TypeError, "interleaved", lambda: ops.glu(gate_up, "silu", 1)),
        (ValueError, "bias", lambda: ops.glu(gate_up, bias=bias[:4])),
        (TypeError, "bias", lambda: ops.glu(gate_up, bias=bias.bfloat16())),
        (ValueError, "bias.*gradient", lambda: ops.glu(gate_up, bias=bias.clone().requires_grad_())),
        (TypeError, "grad_h", lambda: ops.glu_backward(grad_h.bfloat16(), gate_up)),
        (ValueError, "grad_h", lambda: ops.glu_backward(grad_h[:2], gate_up)),
        (ValueError, "row_weight", lambda: ops.glu_backward(grad_h, gate_up, row_weight=weight[:2])),
        (TypeError, "row_weight", lambda: ops.glu_backward(grad_h, gate_up, row_weight=weight.double())),
        (ValueError, "activation", lambda: ops.glu_backward(grad_h, gate_up, "tanh")),
    ]:
        with pytest.raises(error, match=argument):
            call()


def test_raw_op_refuses_a_bias_gradient():
    bias = torch.randn(8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="bias"):
        on_device(torch.ops.usaf.glu, torch.randn(3, 8), "silu", False, bias).sum().backward()


def test_double_backward_refuses():
    gate_up = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.glu(gate_up).sum(), gate_up, create_graph=True)
    with pytest.raises(RuntimeError, match="glu_backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    gate_up, grad_h = torch.randn(3, 8).to(dtype), torch.randn(3, 4).to(dtype)
    bias, weight = torch.randn(8), torch.randn(3)
    opcheck(torch.ops.usaf.glu.default, (gate_up.clone().requires_grad_(), "silu", False, None))
    opcheck(torch.ops.usaf.glu.default, (gate_up, "gelu_tanh", True, bias))
    opcheck(torch.ops.usaf.glu_backward.default, (grad_h, gate_up, "silu", False, bias, weight))
    opcheck(torch.ops.usaf.glu_backward.default, (grad_h, gate_up, "swiglu_clamped", True, None, None))


@cpu_only
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_for_any_thread_count(activation):
    gate_up, grad_h, weight = torch.randn(200, 600).bfloat16(), torch.randn(200, 300).bfloat16(), torch.randn(200)
    assert oracles.same_for_any_threads(
        lambda: (ops.glu(gate_up, activation), *ops.glu_backward(grad_h, gate_up, activation, weight))
    )
