"""The layer's time (forward + backward) over tokens, experts and density: each must grow as a straight line."""

from __future__ import annotations

import layers
import pytest
import torch
from cases import QWEN3_30B_LAYER
from pairing import paired

TOKENS = (512, 1024, 2048, 4096, 8192)
EXPERTS = (16, 32, 64, 96, 128)
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
DENSITY = 0.01


@pytest.fixture(scope="module")
def peer():
    torch.set_num_threads(2)
    return layers.transformers_experts(QWEN3_30B_LAYER)


@pytest.fixture(scope="module")
def experts(peer):
    return layers.paged_experts(peer)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_tokens(benchmark, experts, num_tokens):
    case = QWEN3_30B_LAYER.with_(num_tokens=num_tokens)
    layers.train_neurons(experts.layer, DENSITY)
    paired(benchmark, layers.ours_step(experts, case.inputs()), size=str(case), rounds=5, axis="tokens", x=num_tokens)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_experts(benchmark, num_experts):
    """As many tokens for each expert: twice the experts, twice the work."""
    num_tokens = 512 * num_experts // QWEN3_30B_LAYER.num_experts
    case = QWEN3_30B_LAYER.with_(num_experts=num_experts, num_tokens=num_tokens)
    experts = layers.paged_experts(layers.transformers_experts(case))
    layers.train_neurons(experts.layer, DENSITY)
    step = layers.ours_step(experts, case.inputs())
    paired(benchmark, step, size=str(case), axis="experts", x=num_experts)


@pytest.mark.parametrize("density", DENSITIES)
def test_density(benchmark, experts, density):
    layers.train_neurons(experts.layer, density)
    step = layers.ours_step(experts, QWEN3_30B_LAYER.inputs())
    paired(benchmark, step, size=f"{QWEN3_30B_LAYER}, {density:.1%} trained", axis="density", x=density)
