"""The layer's time (forward + backward) over tokens, experts and density: each must grow as a straight line.

All points of a line run in the same rounds, so that a drift of the machine bends none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import layers
import pytest
import torch
from cases import QWEN3_30B_LAYER
from pairing import paired

TOKENS = (512, 1024, 2048, 4096, 8192)
EXPERTS = (16, 32, 64, 96, 128)
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
DENSITY = 0.01

Step = Callable[[], Any]


def _measure(benchmark, axis: str, steps: dict[float, Step], rounds: int) -> None:
    *others, last = steps
    names = {f"{axis} {x:g}": x for x in others}
    peers = {name: steps[x] for name, x in names.items()}
    size = f"{axis} {last:g}; otherwise {QWEN3_30B_LAYER}, {DENSITY:.0%} trained"
    paired(benchmark, steps[last], peers, size=size, rounds=rounds, axis=axis, x=last, peer_x=names)


@pytest.fixture(scope="module")
def peer():
    torch.set_num_threads(2)
    return layers.transformers_experts(QWEN3_30B_LAYER)


def test_tokens(benchmark, peer):
    experts = layers.paged_experts(peer)
    layers.train_neurons(experts.layer, DENSITY)
    inputs = {num_tokens: QWEN3_30B_LAYER.with_(num_tokens=num_tokens).inputs() for num_tokens in TOKENS}
    _measure(benchmark, "tokens", {x: layers.ours_step(experts, inputs[x]) for x in TOKENS}, rounds=7)


def test_experts(benchmark):
    """As many tokens for each expert: twice the experts, twice the work."""
    torch.set_num_threads(2)
    steps: dict[float, Step] = {}
    for num_experts in EXPERTS:
        num_tokens = 512 * num_experts // QWEN3_30B_LAYER.num_experts
        case = QWEN3_30B_LAYER.with_(num_experts=num_experts, num_tokens=num_tokens)
        experts = layers.paged_experts(layers.transformers_experts(case))
        layers.train_neurons(experts.layer, DENSITY)
        steps[num_experts] = layers.ours_step(experts, case.inputs())
    _measure(benchmark, "experts", steps, rounds=15)


def test_density(benchmark, peer):
    inputs = QWEN3_30B_LAYER.inputs()
    steps: dict[float, Step] = {}
    for density in DENSITIES:
        experts = layers.paged_experts(peer)
        layers.train_neurons(experts.layer, density)
        steps[density] = layers.ours_step(experts, inputs)
    _measure(benchmark, "density", steps, rounds=15)
