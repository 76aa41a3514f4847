"""The expert layer's device memory: budgets, sweeps over the pages, checkpointing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from expert_layers import (
    DTYPES,
    EXPERTS,
    FORMATS,
    HIDDEN,
    module_with_bank,
    relative_error,
    routing,
    run,
    several_layers,
    stacked,
)
from usaf_ext.errors import BudgetError
from usaf_ext.memory import ExpertMemory


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
        ExpertMemory(store, "auto", torch.float64)


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
