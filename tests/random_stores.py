"""Expert stores of random weights."""

from __future__ import annotations

import torch
from usaf_ext.store import ExpertStore


def random_expert(hidden_size, intermediate_size, dtype=torch.float32):
    gate, up = (torch.randn(intermediate_size, hidden_size).to(dtype) for _ in range(2))
    return gate, up, torch.randn(hidden_size, intermediate_size).to(dtype)


def random_store(num_layers=2, num_experts=3, hidden_size=72, intermediate_size=24, format="nf4", scale=1.0):
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(num_layers)]
    store = ExpertStore.create(names, num_experts, hidden_size, intermediate_size, format)
    for layer in range(num_layers):
        for expert in range(num_experts):
            store.write_expert(layer, expert, *(scale * w for w in random_expert(hidden_size, intermediate_size)))
    store.seal()
    return store


def pages(store) -> list[bytes]:
    return [bytes(store.native.page(*page)) for page in store._page_list()]
