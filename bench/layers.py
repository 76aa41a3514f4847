"""The expert layer at a given size: ours with trained neurons, and the peers on the same weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import LayerCase
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from usaf_ext.bank import RowBank
from usaf_ext.experts import PagedExperts, PagedLayer

INIT_STD = 0.02


def transformers_experts(case: LayerCase, seed: int = 1) -> Qwen3MoeExperts:
    """transformers' own experts in bf16, on random weights."""
    config = Qwen3MoeConfig(
        hidden_size=case.hidden_size,
        moe_intermediate_size=case.intermediate_size,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(experts.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        for expert in range(case.num_experts):
            weight[expert] = torch.randn(parameter.shape[1:], generator=generator).mul_(INIT_STD)
        setattr(experts, name, nn.Parameter(weight))
    return experts


def paged_experts(
    peer: Qwen3MoeExperts,
    format: str = "nf4",
    device_budget: int | str = "auto",
    device: torch.device | None = None,
) -> PagedExperts:
    """Ours on the peer's weights; on their device by default."""
    gate, up = peer.gate_up_proj.detach().chunk(2, dim=1)
    down = peer.down_proj.detach()
    return PagedExperts.from_weights(gate, up, down, format=format, device_budget=device_budget, device=device)


def paged_at_a_quarter(peer: Qwen3MoeExperts, resident: PagedExperts) -> PagedExperts:
    """Ours on the device of `resident`, with slots for a quarter of the pages."""
    memory = resident.layer.memory
    page_bytes = memory.store.layout.page_bytes
    smallest = memory.smallest_budget(memory.store, memory.dtype)
    budget = smallest + (memory.store.num_experts // 4 - 2) * page_bytes
    return paged_experts(peer, device_budget=max(smallest, budget), device=memory.device)


def train_neurons(layer: PagedLayer, density: float, seed: int = 2) -> None:
    """Give the layer a bank with random neurons, density * intermediate_size of each expert on average."""
    total = layer.num_experts * layer.intermediate_size
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: max(1, round(density * total))]
    chosen = chosen.sort().values
    expert, index = chosen // layer.intermediate_size, chosen % layer.intermediate_size
    neurons = expert.int(), index.int()
    layer.set_bank(RowBank.from_store(layer.store, layer.index, neurons, device=layer.device))


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def ours_step(experts: PagedExperts, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    return _step(experts, inputs, [experts.usaf_anchor])


def transformers_step(
    experts: Qwen3MoeExperts, inputs: Inputs, implementation: str, weight_gradients: bool
) -> Callable[[], tuple[Tensor, ...]]:
    def run():
        experts.config._experts_implementation = implementation
        experts.requires_grad_(weight_gradients)
        return _step(experts, inputs, list(experts.parameters()) if weight_gradients else [])()

    return run


def qlora_step(peer: Qwen3MoeExperts, inputs: Inputs, rank: int = 8) -> Callable[[], tuple[Tensor, ...]] | None:
    """experts4bit-qlora: NF4 experts, adapters of `rank` trained; None where it is not installed."""
    try:
        from experts4bit_qlora import Experts4bit, ExpertsLoRA
    except ImportError:
        return None
    base = Experts4bit.from_float(peer.gate_up_proj.detach(), peer.down_proj.detach(), compute_dtype=torch.bfloat16)
    experts = ExpertsLoRA(base, r=rank, alpha=2 * rank, dtype=torch.bfloat16)
    return _step(experts, inputs, [p for p in experts.parameters() if p.requires_grad])


def _step(experts: Callable[..., Tensor], inputs: Inputs, parameters: list[Any]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward + backward: gradients of hidden states, router weights and `parameters`."""
    hidden, index, weights, grad = inputs

    def run():
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        return torch.autograd.grad(experts(x, index, w), [x, w, *parameters], grad)

    return run
