"""The expert layer against a float64 oracle and transformers' own experts, over budgets, formats and dtypes."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from usaf_ext.bank import RowBank
from usaf_ext.errors import BudgetError
from usaf_ext.experts import PagedExperts, PagedLayer, paged_layers
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

HIDDEN, INTERMEDIATE, EXPERTS = 128, 40, 6
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = ["nf4", "bf16"]
# Relative error of the whole tensor: rounding of the compute dtype through three products.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def weights(num_experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE):
    return (
        torch.randn(num_experts, intermediate, hidden) * 0.1,
        torch.randn(num_experts, intermediate, hidden) * 0.1,
        torch.randn(num_experts, hidden, intermediate) * 0.1,
    )


def routing(num_tokens, top_k, num_experts=EXPERTS, dtype=torch.float32):
    values, index = torch.softmax(torch.randn(num_tokens, num_experts), -1).topk(top_k, -1)
    return index, values.to(dtype)


def selection(num_experts=EXPERTS, intermediate=INTERMEDIATE):
    """Uneven on purpose: an expert with none, one with a single neuron, one with all."""
    counts = [0, 1, intermediate, 3, 5, 2]
    expert = [e for e in range(num_experts) for _ in range(counts[e % len(counts)])]
    index = [
        j
        for e in range(num_experts)
        for j in torch.randperm(intermediate)[: counts[e % len(counts)]].sort()[0].tolist()
    ]
    return torch.tensor(expert, dtype=torch.int32), torch.tensor(index, dtype=torch.int32)


def decoded(store: ExpertStore, layer: int = 0):
    """gate, up, down in float64, stacked over experts."""
    per_expert = [store.read_expert(layer, e) for e in range(store.num_experts)]
    return tuple(torch.stack(parts).double() for parts in zip(*per_expert))


def oracle(gate, up, down, hidden, index, top_k_weights, activation="silu"):
    """Every (token, slot) pair for itself, in float64."""
    act = {"silu": nn.functional.silu, "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh")}[activation]
    rows = []
    for t in range(hidden.shape[0]):
        total = torch.zeros(gate.shape[2], dtype=torch.float64)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            if e < gate.shape[0]:
                h = act(gate[e] @ hidden[t]) * (up[e] @ hidden[t])
                total = total + top_k_weights[t, k] * (down[e] @ h)
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros(0, gate.shape[2], dtype=torch.float64)


def module_with_bank(dtype, format="nf4", budget="auto", activation="silu"):
    torch.manual_seed(7)
    experts = PagedExperts.from_weights(
        *weights(), format=format, dtype=dtype, device_budget=budget, activation=activation
    )
    expert, index = selection()
    layer = experts.layer
    layer.set_bank(RowBank.from_store(layer.store, 0, (expert, index)))
    return experts


def run(experts, hidden, index, top_k_weights, grad):
    hidden = hidden.clone().requires_grad_()
    top_k_weights = top_k_weights.clone().requires_grad_()
    out = experts(hidden, index, top_k_weights)
    out.backward(grad)
    return out.detach(), hidden.grad, top_k_weights.grad


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_for_any_budget(format, dtype):
    hidden, grad = torch.randn(29, HIDDEN).to(dtype), torch.randn(29, HIDDEN).to(dtype)
    index, top_k_weights = routing(29, 2, dtype=dtype)
    results = []
    reference = module_with_bank(dtype, format)
    store = reference.layer.store
    smallest = ExpertMemory.smallest_budget(store, dtype)
    for budget in ("auto", smallest, smallest + store.layout.page_bytes, smallest + 3 * store.layout.page_bytes):
        experts = module_with_bank(dtype, format, budget)
        for _ in range(2):
            result = run(experts, hidden, index, top_k_weights, grad)
        memory = experts.layer.memory
        assert memory.device_bytes <= memory.device_budget
        results.append((*result, experts.layer.bank.grad, experts.usaf_anchor.grad))
    for other in results[1:]:
        for actual, expected in zip(other, results[0]):
            assert torch.equal(actual, expected)


def test_budget_counts_every_byte_and_names_the_smallest():
    experts = module_with_bank(torch.float32)
    store = experts.layer.store
    smallest = ExpertMemory.smallest_budget(store, torch.float32)
    memory = ExpertMemory(store, smallest, torch.float32)
    assert memory.device_bytes == memory._slab.nbytes + memory._scratch.nbytes == smallest
    with pytest.raises(BudgetError, match=str(smallest)):
        ExpertMemory(store, smallest - 1, torch.float32)
    with pytest.raises(ValueError, match="device_budget"):
        ExpertMemory(store, "much", torch.float32)
    with pytest.raises(TypeError, match="dtype"):
        ExpertMemory(store, "auto", torch.float16)


def several_layers(budget="auto", num_layers=2):
    torch.manual_seed(3)
    names = [f"layers.{layer}" for layer in range(num_layers)]
    store = ExpertStore.create(names, EXPERTS, HIDDEN, INTERMEDIATE, "nf4")
    for layer in range(num_layers):
        for expert, parts in enumerate(zip(*weights())):
            store.write_expert(layer, expert, *parts)
    store.seal()
    memory = ExpertMemory(store, budget, torch.float32)
    modules = nn.ModuleList([PagedExperts(PagedLayer(memory, i)) for i in range(num_layers)])
    for module in modules:
        expert, index = selection()
        module.layer.set_bank(RowBank.from_store(store, module.layer.index, (expert, index)))
    return modules


def stacked(modules, hidden, index, top_k_weights, use_checkpoint):
    for module in modules:
        if use_checkpoint:
            hidden = hidden + checkpoint(module, hidden, index, top_k_weights, use_reentrant=False)
        else:
            hidden = hidden + module(hidden, index, top_k_weights)
    return hidden


@pytest.mark.parametrize("budget", ["auto", "smallest"])
def test_checkpointing_and_accumulation(budget):
    if budget == "smallest":
        budget = ExpertMemory.smallest_budget(several_layers()[0].layer.store, torch.float32)
    batches = [(torch.randn(15, HIDDEN), *routing(15, 2), torch.randn(15, HIDDEN)) for _ in range(2)]
    plain, checkpointed = several_layers("auto"), several_layers(budget)
    for hidden, index, top_k_weights, grad in batches:
        stacked(plain, hidden, index, top_k_weights, False).backward(grad)
        stacked(checkpointed, hidden, index, top_k_weights, True).backward(grad)
    for a, b in zip(plain, checkpointed):
        assert torch.equal(a.layer.bank.grad, b.layer.bank.grad)
        assert torch.equal(a.usaf_anchor.grad, b.usaf_anchor.grad)
        # the anchor's increments sum to the norm of what has accumulated
        assert relative_error(a.usaf_anchor.grad, a.layer.bank.grad.double().norm()[None]) < 1e-6


@pytest.mark.parametrize("num_tokens", [5, 15], ids=["routed pages only", "all pages, a layer ahead"])
@pytest.mark.parametrize("num_slots", [2, 5, 8])
def test_a_training_step_moves_no_page_twice_in_a_sweep(num_slots, num_tokens):
    """At most 2 (S - R) pages a step from the second on: what does not fit, once up and once down."""
    num_layers = 3
    store = several_layers(num_layers=num_layers)[0].layer.store
    budget = ExpertMemory.smallest_budget(store, torch.float32) + (num_slots - 2) * store.layout.page_bytes
    modules = several_layers(budget, num_layers)
    memory = modules[0].layer.memory
    assert memory.num_slots == num_slots
    for step in range(4):
        memory.reset_stats()
        hidden = torch.randn(num_tokens, HIDDEN)
        stacked(modules, hidden, *routing(num_tokens, EXPERTS), False).backward(torch.ones_like(hidden))
        if step:
            assert 0 < memory.stats()["page_misses"] <= 2 * (num_layers * EXPERTS - num_slots)


@pytest.mark.parametrize(("num_tokens", "ahead"), [(15, EXPERTS), (5, 0)])
def test_many_tokens_fetch_the_next_layer_ahead(num_tokens, ahead):
    modules = several_layers()
    with torch.no_grad():
        modules[0](torch.randn(num_tokens, HIDDEN), *routing(num_tokens, EXPERTS))
    assert modules[0].layer.memory.stats()["page_misses"] == EXPERTS + ahead


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_adds_squares_over_backwards(dtype):
    experts = module_with_bank(dtype)
    importance = experts.layer.begin_importance()
    parameters = decoded(experts.layer.store)
    expected = torch.zeros(EXPERTS, INTERMEDIATE, dtype=torch.float64)
    for _ in range(2):
        hidden, grad = torch.randn(21, HIDDEN).to(dtype), torch.randn(21, HIDDEN).to(dtype)
        index, top_k_weights = routing(21, 2, dtype=dtype)
        run(experts, hidden, index, top_k_weights, grad)
        leaves = [p.clone().requires_grad_() for p in parameters]
        oracle(*leaves, hidden.double(), index, top_k_weights.double()).backward(grad.double())
        gate, up, down = (p.grad for p in leaves)
        expected += gate.square().sum(-1) + up.square().sum(-1) + down.square().sum(1)
    experts.layer.end_importance()
    assert relative_error(importance, expected) < 2 * TOLERANCE[dtype]
    before = importance.clone()
    run(experts, hidden, index, top_k_weights, grad)
    assert torch.equal(importance, before)


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


def test_the_slab_outlives_the_pager():
    """Whoever is collected first: copies in flight must not land in freed memory."""
    experts = module_with_bank(torch.float32)
    memory = experts.layer.memory
    slab = weakref.ref(memory._slab)
    sweep = memory.sweep  # holds the pager alone
    del experts, memory
    gc.collect()
    assert slab() is not None
    del sweep
    gc.collect()
    assert slab() is None


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
    "weights: expected float32": lambda x, i, w: (x, i, w.double()),
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
    experts = module_with_bank(torch.float32)
    with pytest.raises(ValueError, match="bank: expected one of layer 0"):
        experts.layer.set_bank(SimpleNamespace(layer=1, format="nf4"))
