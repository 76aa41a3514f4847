"""The expert layer against a float64 oracle and transformers' own experts, over formats and dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_layers import (
    DTYPES,
    EXPERTS,
    FORMATS,
    HIDDEN,
    INTERMEDIATE,
    TOLERANCE,
    decoded,
    module_with_bank,
    oracle,
    relative_error,
    routing,
    run,
    weights,
)
from torch import nn
from usaf_ext.experts import PagedExperts, paged_layers


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (33, 2), (20, 6)])
def test_against_float64(num_tokens, top_k, dtype, format, activation):
    experts = module_with_bank(dtype, format, activation=activation)
    layer = experts.layer
    hidden, grad = torch.randn(num_tokens, HIDDEN).to(dtype), torch.randn(num_tokens, HIDDEN).to(dtype)
    index, top_k_weights = routing(num_tokens, top_k, dtype=dtype)
    if num_tokens * top_k > 1:
        index[0, 0] = EXPERTS  # "not here"
    out, grad_hidden, grad_weights = run(experts, hidden, index, top_k_weights, grad)

    parameters = [p.requires_grad_() for p in decoded(layer.store)]
    x, w = hidden.double().requires_grad_(), top_k_weights.double().requires_grad_()
    expected = oracle(*parameters, x, index, w, activation)
    assert relative_error(out, expected.detach()) < TOLERANCE[dtype]
    if not num_tokens:
        assert out.shape == (0, HIDDEN)
        return
    expected.backward(grad.double())
    assert relative_error(grad_hidden, x.grad) < TOLERANCE[dtype]
    assert relative_error(grad_weights, w.grad) < TOLERANCE[dtype]
    gate, up, down = (p.grad for p in parameters)
    e, j = layer.bank.neuron_expert.long(), layer.bank.neuron_index.long()
    rows = torch.stack([gate[e, j], up[e, j], down[e, :, j]], dim=1)
    assert relative_error(layer.bank.grad, rows) < TOLERANCE[dtype]
    assert relative_error(experts.usaf_anchor.grad, rows.norm()[None]) < TOLERANCE[dtype]
    counts = torch.bincount(index.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
    assert layer.token_counts.tolist() == counts.tolist()
    assert layer.bank.expert_hit.tolist() == (counts > 0).int().tolist()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_equals_transformers_experts(implementation):
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts = module_with_bank(torch.float32)
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    config._experts_implementation = implementation
    theirs = Qwen3MoeExperts(config)
    gate, up, down = (part.float() for part in decoded(experts.layer.store))
    theirs.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1))
    theirs.down_proj = nn.Parameter(down)
    hidden, grad = torch.randn(37, HIDDEN), torch.randn(37, HIDDEN)
    index, top_k_weights = routing(37, 3)
    ours = run(experts, hidden, index, top_k_weights, grad)
    for actual, expected in zip(ours, run(theirs, hidden, index, top_k_weights, grad)):
        assert relative_error(actual, expected) < 2e-6
    bank = experts.layer.bank
    e, j = bank.neuron_expert.long(), bank.neuron_index.long()
    rows = torch.stack(
        [theirs.gate_up_proj.grad[e, j], theirs.gate_up_proj.grad[e, INTERMEDIATE + j], theirs.down_proj.grad[e, :, j]],
        dim=1,
    )
    assert relative_error(bank.grad, rows) < 2e-6


def test_accumulates_orthogonal_micro_batches():
    """Norms 3 and 4 at a right angle give 5 (a sum of norms would give 7)."""
    experts = module_with_bank(torch.float32)
    bank = experts.layer.bank
    hidden, grad = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    index, top_k_weights = routing(9, 1)
    run(experts, hidden, index, top_k_weights, grad)
    first = bank.grad.clone()
    run(experts, hidden, index, top_k_weights, 2 * grad)
    assert torch.allclose(bank.grad, 3 * first, rtol=1e-5, atol=1e-7)
    assert relative_error(experts.usaf_anchor.grad, bank.grad.norm()[None]) < 1e-6


def test_bank_overlays_its_rows():
    experts = module_with_bank(torch.float32)
    layer = experts.layer
    hidden, (index, top_k_weights) = torch.randn(17, HIDDEN), routing(17, 2)
    with torch.no_grad():
        before = experts(hidden, index, top_k_weights)
        layer.bank.absmax.mul_(2)
        gate, up, down = decoded(layer.store)
        e, j = layer.bank.neuron_expert.long(), layer.bank.neuron_index.long()
        for matrix, rows in zip((gate, up), (0, 1)):
            matrix[e, j] = layer.bank.decode(torch.float32).double()[:, rows]
        down[e, :, j] = layer.bank.decode(torch.float32).double()[:, 2]
        after = experts(hidden, index, top_k_weights)
        expected = oracle(gate, up, down, hidden.double(), index, top_k_weights.double())
    assert relative_error(after, expected) < 2e-6
    assert not torch.equal(before, after)
    layer.set_bank(None)
    with torch.no_grad():
        assert torch.equal(experts(hidden, index, top_k_weights), before)


def test_opcheck():
    experts = module_with_bank(torch.float32)
    hidden = torch.randn(5, HIDDEN, requires_grad=True)
    index, top_k_weights = routing(5, 2)
    handle = experts.layer.native.handle
    # Not test_aot_dispatch_dynamic: the op adds to the bank, so running it twice is not the same as once.
    for tests in ("test_schema", "test_faketensor", "test_autograd_registration"):
        torch.library.opcheck(
            torch.ops.usaf.experts_forward,
            (hidden, index, top_k_weights.requires_grad_(), experts.usaf_anchor, handle, True),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.usaf.experts_backward,
            (torch.randn(5, HIDDEN), hidden.detach(), index, top_k_weights.detach(), handle),
            test_utils=tests,
        )


def test_a_second_derivative_is_refused():
    experts = module_with_bank(torch.float32)
    hidden, (index, top_k_weights) = torch.randn(5, HIDDEN, requires_grad=True), routing(5, 2)
    (grad,) = torch.autograd.grad(experts(hidden, index, top_k_weights).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="experts_backward is not implemented"):
        grad.square().sum().backward()


def test_no_graph_is_captured_over_the_ops():
    for name in ("experts_forward", "experts_backward", "experts_forward_many", "experts_backward_many"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.usaf, name).default.tags


def test_casting_keeps_the_anchor_and_the_result():
    experts = module_with_bank(torch.float32)
    model = nn.Sequential(nn.Linear(4, 4), experts).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert experts.usaf_anchor.dtype == torch.float32
    assert [layer.name for layer in paged_layers(model)] == ["experts"]
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


BAD_CALLS = {
    "x: expected shape": lambda x, i, w: (x[:, :-1], i, w),
    "x: expected": lambda x, i, w: (x.double(), i, w),
    "index: expected shape": lambda x, i, w: (x, i[:-1], w),
    "index: expected int64": lambda x, i, w: (x, i.int(), w),
    "index: expected 0 to": lambda x, i, w: (x, i - 5, w),
    f"index: expected 0 to {EXPERTS}": lambda x, i, w: (x, i + EXPERTS + 1, w),
    "weights: expected the shape": lambda x, i, w: (x, i, w[:, :1]),
    "weights: expected float32, bfloat16 or float16": lambda x, i, w: (x, i, w.double()),
}


@pytest.mark.parametrize("message", BAD_CALLS, ids=list(BAD_CALLS))
def test_bad_arguments(message):
    experts = module_with_bank(torch.float32)
    hidden, (index, top_k_weights) = torch.randn(6, HIDDEN), routing(6, 2)
    with pytest.raises((ValueError, TypeError), match=message):
        experts(*BAD_CALLS[message](hidden, index, top_k_weights))
    experts(hidden, index, top_k_weights)  # still usable


def test_bad_modules():
    gate, up, down = weights()
    with pytest.raises(ValueError, match="up: expected the shape"):
        PagedExperts.from_weights(gate, up[:, 1:], down)
    with pytest.raises(ValueError, match="down: expected"):
        PagedExperts.from_weights(gate, up, up)
    with pytest.raises(ValueError, match="gate: expected"):
        PagedExperts.from_weights(gate[0], up, down)
    with pytest.raises(ValueError, match="format"):
        PagedExperts.from_weights(gate, up, down, format="nf5")
    with pytest.raises(ValueError, match="activation"):
        PagedExperts.from_weights(gate, up, down, activation="relu")
    up[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="up"):
        PagedExperts.from_weights(gate, up, down)
    with pytest.raises(ValueError, match="no expert layer has handle"):
        torch.ops.usaf.experts_forward(*(torch.zeros(1, 1),) * 4, 10**9, False)
    with pytest.raises(ValueError, match="paged experts"):
        paged_layers(nn.Linear(2, 2))


def test_an_index_written_to_behind_torchs_back_is_routed_anew():
    """A router's kernel, or numpy, writes to the same buffer before each forward, and no version tells of it."""
    experts = module_with_bank(torch.float32)
    (hidden, (index, router)), (_, (other, _)) = ((torch.randn(9, HIDDEN), routing(9, 2)) for _ in range(2))
    expected = experts(hidden, other, router)
    experts(hidden, index, router)
    index.data.copy_(other)
    assert torch.equal(experts(hidden, index, router), expected)
