"""row_gradient_ and row_importance_ against float64 weight gradients."""

from __future__ import annotations

import oracles
import pytest
import torch
from devices import cpu_only, opcheck, ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens per expert, hidden_size, intermediate_size
CASES = [
    ([3], 1, 1),
    ([4, 0, 7], 31, 5),
    ([1, 16, 2, 9], 32, 6),
    ([10, 5], 200, 9),
    ([0, 0], 40, 4),
    ([3, 2], 0, 4),
]


def operands(tokens, hidden_size, intermediate_size, dtype, spare=2):
    """x, grad_out, grad_gate_up, weighted_h and offsets; `spare` rows at the end belong to no expert."""
    n = sum(tokens) + spare
    sizes = (hidden_size, hidden_size, 2 * intermediate_size, intermediate_size)
    tensors = [torch.randn(n, size).to(dtype) for size in sizes]
    return *tensors, torch.tensor([0, *tokens]).cumsum(0).int()


def all_gradients(x, grad_out, grad_gate_up, weighted_h, offsets):
    """[num_experts, intermediate_size, 3, hidden_size] in float64: what a dense backward would give."""
    x, grad_out, grad_gate_up, weighted_h = (t.double() for t in (x, grad_out, grad_gate_up, weighted_h))
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    gradients = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        rows = slice(begin, end)
        three = (grad_gate[rows].T @ x[rows], grad_up[rows].T @ x[rows], weighted_h[rows].T @ grad_out[rows])
        gradients.append(torch.stack(three, 1))
    return torch.stack(gradients)


def selection(num_experts, intermediate_size, keep=0.6):
    """Sorted (expert, index) of randomly chosen neurons."""
    expert, index = (torch.rand(num_experts, intermediate_size) < keep).nonzero(as_tuple=True)
    return expert.int(), index.int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_row_gradient(case, dtype):
    tokens, hidden_size, intermediate_size = case
    inputs = operands(*case, dtype)
    expert, index = selection(len(tokens), intermediate_size)
    grad = torch.randn(len(expert), 3, hidden_size)
    before = grad.clone()
    ops.row_gradient_(grad, *inputs, expert, index)
    expected = before.double() + all_gradients(*inputs)[expert.long(), index.long()]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=2e-5)
    ops.row_gradient_(grad, *inputs, expert, index)  # it adds
    torch.testing.assert_close(grad.double(), 2 * expected - before.double(), rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_of_experts_equals_the_whole(dtype):
    tokens = [4, 0, 7, 2, 5]
    x, grad_out, grad_gate_up, weighted_h, offsets = operands(tokens, 70, 6, dtype, spare=0)
    expert, index = selection(5, 6)
    whole, parts = torch.zeros(len(expert), 3, 70), torch.zeros(len(expert), 3, 70)
    ops.row_gradient_(whole, x, grad_out, grad_gate_up, weighted_h, offsets, expert, index)
    for first, last in [(0, 2), (2, 3), (3, 5)]:
        rows = slice(int(offsets[first]), int(offsets[last]))
        slices = [t[rows] for t in (x, grad_out, grad_gate_up, weighted_h)]
        before = parts.clone()
        ops.row_gradient_(parts, *slices, offsets[first : last + 1], expert, index, first_expert=first)
        outside = (expert < first) | (expert >= last)
        assert torch.equal(parts[outside], before[outside])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_gradient_in_bfloat16_is_rounded_once(dtype):
    inputs = operands([4, 0, 7], 70, 5, dtype)
    expert, index = selection(3, 5)
    grad = torch.randn(len(expert), 3, 70).bfloat16()
    sums = torch.zeros(len(expert), 3, 70)
    ops.row_gradient_(sums, *inputs, expert, index)
    expected = (grad.float() + sums).bfloat16()
    ops.row_gradient_(grad, *inputs, expert, index)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["gradient", "gradient_weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_row_importance(case, dtype, weighted):
    tokens, hidden_size, intermediate_size = case
    inputs = operands(*case, dtype)
    importance = torch.rand(len(tokens), intermediate_size)
    weights = torch.randn(len(tokens), 3, intermediate_size, hidden_size).to(dtype) if weighted else None
    gradients = all_gradients(*inputs)
    terms = gradients.square() if weights is None else (gradients * weights.double().transpose(1, 2)).abs()
    expected = importance.double() + terms.sum((2, 3))
    ops.row_importance_(importance, *inputs, weights)
    torch.testing.assert_close(importance.double(), expected, rtol=2e-5, atol=1e-5)


def test_matches_autograd_of_a_whole_expert():
    """The three rows are the gradients of the original weights, through glu_backward and the router weight."""
    n, hidden_size, intermediate_size = 11, 20, 7
    x, router, grad_out = torch.randn(n, hidden_size), torch.rand(n), torch.randn(n, hidden_size)
    shape = (intermediate_size, hidden_size)
    gate, up, down_t = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3))
    h = oracles.glu(torch.cat((x.double() @ gate.T, x.double() @ up.T), 1), "silu")
    (router.double().unsqueeze(-1) * (h @ down_t)).backward(grad_out.double())

    gate_up = torch.cat((x @ gate.detach().float().T, x @ up.detach().float().T), 1)
    grad_gate_up, weighted_h, _ = ops.glu_backward(grad_out @ down_t.detach().float().T, gate_up, "silu", router)
    grad = torch.zeros(intermediate_size, 3, hidden_size)
    expert, index = torch.zeros(intermediate_size).int(), torch.arange(intermediate_size).int()
    ops.row_gradient_(grad, x, grad_out, grad_gate_up, weighted_h, torch.tensor([0, n]).int(), expert, index)
    for matrix, weight in enumerate((gate, up, down_t)):
        torch.testing.assert_close(grad[:, matrix].double(), weight.grad, rtol=1e-4, atol=1e-4)


@cpu_only
def test_bad_arguments():
    x, grad_out, grad_gate_up, weighted_h, offsets = operands([4, 3], 10, 5, torch.float32)
    expert, index = torch.tensor([0, 1]).int(), torch.tensor([4, 0]).int()
    good = {
        "grad": torch.zeros(2, 3, 10),
        "x": x,
        "grad_out": grad_out,
        "grad_gate_up": grad_gate_up,
        "weighted_h": weighted_h,
        "offsets": offsets,
        "neuron_expert": expert,
        "neuron_index": index,
    }
    ops.row_gradient_(**good)
    assert good["grad"].any()
    bad = [
        (TypeError, "grad", good["grad"].double()),
        (ValueError, "grad", torch.zeros(3, 3, 10)),
        (ValueError, "grad", torch.zeros(2, 10, 3).transpose(1, 2)),
        (TypeError, "x", x.double()),
        (TypeError, "x", None),
        (ValueError, "x", x[0]),
        (TypeError, "grad_out", grad_out.bfloat16()),
        (ValueError, "grad_out", grad_out[:, :9]),
        (ValueError, "grad_gate_up", grad_gate_up[:, :9]),
        (TypeError, "grad_gate_up", grad_gate_up.bfloat16()),
        (ValueError, "weighted_h", weighted_h[:5]),
        (TypeError, "weighted_h", weighted_h.bfloat16()),
        (TypeError, "offsets", offsets.long()),
        (ValueError, "offsets", offsets[:0]),
        (ValueError, "offsets", offsets.flip(0)),
        (ValueError, "offsets", offsets + torch.tensor([0, 0, 9]).int()),
        (TypeError, "neuron_expert", expert.long()),
        (ValueError, "neuron_expert", expert.flip(0)),
        (ValueError, "neuron_expert", expert - 1),
        (TypeError, "neuron_index", index.long()),
        (ValueError, "neuron_index", index[:1]),
        (ValueError, "neuron_index", index + 1),
        (ValueError, "neuron_index", index - 1),
        (ValueError, "first_expert", -1),
        (TypeError, "first_expert", 0.0),
    ]
    for error, argument, value in bad:
        arguments = {**good, "grad": torch.zeros(2, 3, 10), argument: value}
        with pytest.raises(error, match=argument):
            ops.row_gradient_(**arguments)
        assert argument == "grad" or not arguments["grad"].any()
    inputs = (x, grad_out, grad_gate_up, weighted_h, offsets)
    for error, value in [
        (TypeError, torch.zeros(2, 5).double()),
        (ValueError, torch.zeros(3, 5)),
        (ValueError, torch.zeros(2, 4)),
        (ValueError, torch.zeros(5, 2).t()),
    ]:
        with pytest.raises(error, match="importance"):
            ops.row_importance_(value, *inputs)
    for error, value in [
        (TypeError, torch.zeros(2, 3, 5, 10).double()),
        (TypeError, 1.0),
        (ValueError, torch.zeros(2, 5, 3, 10)),
    ]:
        importance = torch.zeros(2, 5)
        with pytest.raises(error, match="weights"):
            ops.row_importance_(importance, *inputs, value)
        assert not importance.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    inputs = operands([4, 3], 10, 5, dtype)
    expert, index = torch.tensor([0, 1]).int(), torch.tensor([4, 0]).int()
    opcheck(torch.ops.usaf.row_gradient_.default, (torch.zeros(2, 3, 10), *inputs, expert, index, 0))
    opcheck(torch.ops.usaf.row_importance_.default, (torch.zeros(2, 5), *inputs))
    opcheck(torch.ops.usaf.row_importance_.default, (torch.zeros(2, 5), *inputs, torch.zeros(2, 3, 5, 10).to(dtype)))


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype):
    inputs = operands([20, 0, 35, 9], 300, 40, dtype)
    expert, index = selection(4, 40)

    def run():
        grad, importance = torch.zeros(len(expert), 3, 300), torch.zeros(4, 40)
        ops.row_gradient_(grad, *inputs, expert, index)
        ops.row_importance_(importance, *inputs)
        return grad, importance

    assert oracles.same_for_any_threads(run)
