"""The expert layer at a Qwen3-30B layer's size beside transformers' own experts, on the same inputs in the same run.

Ours trains 1% of the neurons; the peers compute either the input gradients only or all expert weight gradients (what
training the experts costs without selection). Forward + backward, bf16.
"""

from __future__ import annotations

import pytest
import torch
from cases import QWEN3_30B_LAYER as CASE
from torch import nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from usaf_ext.bank import RowBank
from usaf_ext.experts import PagedExperts

DENSITY = 0.01
ROUNDS = 15


@pytest.fixture(scope="module")
def peer():
    config = Qwen3MoeConfig(
        hidden_size=CASE.hidden_size,
        moe_intermediate_size=CASE.intermediate_size,
        num_experts=CASE.num_experts,
        num_experts_per_tok=CASE.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in list(experts.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        for expert in range(CASE.num_experts):
            weight[expert] = torch.randn(parameter.shape[1:], generator=generator).mul_(0.02)
        setattr(experts, name, nn.Parameter(weight))
    return experts


@pytest.fixture(scope="module")
def ours(peer):
    gate, up = peer.gate_up_proj.detach().chunk(2, dim=1)
    experts = PagedExperts.from_weights(gate, up, peer.down_proj.detach(), device_budget="auto")
    per_expert = round(DENSITY * CASE.intermediate_size)
    generator = torch.Generator().manual_seed(2)
    index = torch.cat(
        [
            torch.randperm(CASE.intermediate_size, generator=generator)[:per_expert].sort().values
            for _ in range(CASE.num_experts)
        ]
    ).int()
    expert = torch.arange(CASE.num_experts, dtype=torch.int32).repeat_interleave(per_expert)
    layer = experts.layer
    layer.set_bank(RowBank.from_store(layer.store, 0, (expert, index)))
    return experts


def _step(experts, inputs, parameters):
    hidden, index, weights, grad = inputs
    hidden = hidden.clone().requires_grad_()
    weights = weights.clone().requires_grad_()
    torch.autograd.grad(experts(hidden, index, weights), [hidden, weights, *parameters], grad)


def test_layer_usaf_1_percent(benchmark, ours):
    benchmark.extra_info.update(size=str(CASE))
    benchmark.pedantic(_step, args=(ours, CASE.inputs(), [ours.usaf_anchor]), rounds=ROUNDS, warmup_rounds=1)


def test_layer_grouped_mm_input_gradients(benchmark, peer):
    benchmark.extra_info.update(size=str(CASE), peer=True)
    peer.requires_grad_(False)
    benchmark.pedantic(_step, args=(peer, CASE.inputs(), []), rounds=ROUNDS, warmup_rounds=1)


def test_layer_grouped_mm_all_weight_gradients(benchmark, peer):
    benchmark.extra_info.update(size=str(CASE), peer=True)
    peer.requires_grad_(True)
    parameters = list(peer.parameters())
    benchmark.pedantic(_step, args=(peer, CASE.inputs(), parameters), rounds=ROUNDS, warmup_rounds=1)
