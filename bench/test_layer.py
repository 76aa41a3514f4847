"""The expert layer at a Qwen3-30B layer's size: forward + backward in bf16, 1% of the neurons trained, NF4.

Peers on the same weights, inputs and rounds: transformers' implementations computing the input gradients only, and all
expert weight gradients (what training the experts costs without selection), and QLoRA adapters on 4-bit experts.
"""

from __future__ import annotations

import layers
import pytest
from cases import QWEN3_30B_LAYER
from pairing import paired

DENSITY = 0.01
TOKENS = (1, 32, 512, 2048)
# batched_mm gathers a weight matrix for each (token, slot) pair: 4.7 MB each here.
BATCHED_MM_TOKENS = 32


@pytest.fixture(scope="module")
def peer():
    return layers.transformers_experts(QWEN3_30B_LAYER)


@pytest.fixture(scope="module")
def ours(peer):
    experts = layers.paged_experts(peer)
    layers.train_neurons(experts.layer, DENSITY)
    return experts


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_layer(benchmark, threads, peer, ours, num_tokens):
    case = QWEN3_30B_LAYER.with_(num_tokens=num_tokens)
    inputs = case.inputs()
    implementations = ["eager", "grouped_mm"] + ["batched_mm"] * (num_tokens <= BATCHED_MM_TOKENS)
    peers = {
        f"transformers {name}, input gradients": layers.transformers_step(peer, inputs, name, weight_gradients=False)
        for name in implementations
    }
    # Not eager: its backward fills a gradient of all experts for each expert.
    step = layers.transformers_step(peer, inputs, "grouped_mm", weight_gradients=True)
    peers["transformers grouped_mm, all weight gradients"] = step
    qlora = layers.qlora_step(peer, inputs)
    if qlora is not None:
        peers["experts4bit-qlora, rank 8"] = qlora
    rounds = 5 if num_tokens > 512 else 9
    paired(benchmark, layers.ours_step(ours, inputs), peers, size=f"{case}, {DENSITY:.0%} trained", rounds=rounds)


@pytest.mark.parametrize("num_tokens", [512, 2048])
def test_layer_paged_at_a_quarter(benchmark, threads, peer, ours, num_tokens):
    paged = layers.paged_at_a_quarter(peer, ours)
    layers.train_neurons(paged.layer, DENSITY)
    inputs = QWEN3_30B_LAYER.with_(num_tokens=num_tokens).inputs()
    resident = {"all pages resident": layers.ours_step(ours, inputs)}
    size = f"{num_tokens} tokens, {paged.layer.memory.num_slots} of {QWEN3_30B_LAYER.num_experts} pages"
    paired(benchmark, layers.ours_step(paged, inputs), resident, size=size)


@pytest.mark.parametrize("format", ["bf16", "nf4_f16", "int8", "fp8"])
def test_layer_format(benchmark, threads, peer, ours, format):
    experts = layers.paged_experts(peer, format=format)
    layers.train_neurons(experts.layer, DENSITY)
    inputs = QWEN3_30B_LAYER.inputs()
    peers = {"nf4": layers.ours_step(ours, inputs)}
    paired(benchmark, layers.ours_step(experts, inputs), peers, size=f"{QWEN3_30B_LAYER}, {format}")
