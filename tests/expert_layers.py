"""Expert layers for the tests: random weights, routings and banks, and a float64 oracle."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from usaf_ext import _C
from usaf_ext.bank import RowBank
from usaf_ext.experts import PagedExperts, PagedLayer
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

HIDDEN, INTERMEDIATE, EXPERTS = 128, 40, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = list(_C.FORMATS)
# Relative error of the whole tensor: rounding of the compute dtype through three products.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


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


def module_with_bank(dtype, format="nf4", budget="auto", activation="silu", hidden=HIDDEN, intermediate=INTERMEDIATE):
    torch.manual_seed(7)
    experts = PagedExperts.from_weights(
        *weights(hidden=hidden, intermediate=intermediate),
        format=format,
        dtype=dtype,
        device_budget=budget,
        activation=activation,
    )
    expert, index = selection(intermediate=intermediate)
    layer = experts.layer
    layer.set_bank(RowBank.from_store(layer.store, 0, (expert, index)))
    return experts


def run(experts, hidden, index, top_k_weights, grad):
    hidden = hidden.clone().requires_grad_()
    top_k_weights = top_k_weights.clone().requires_grad_()
    out = experts(hidden, index, top_k_weights)
    out.backward(grad)
    return out.detach(), hidden.grad, top_k_weights.grad


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
