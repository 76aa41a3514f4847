"""The sizes that benchmarks (and tests of the same ops) run on: a Qwen3-30B-A3B layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCase:
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.num_experts} x {self.hidden_size} x {self.intermediate_size}, "
            f"top-{self.top_k}, {self.num_tokens} tokens"
        )

    def inputs(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, top_k_index, top_k_weights and the output's gradient, with a random softmax routing."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(self.num_tokens, self.hidden_size, generator=generator).to(dtype)
        logits = torch.randn(self.num_tokens, self.num_experts, generator=generator)
        weights, index = torch.softmax(logits, -1).topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
        grad = torch.randn(self.num_tokens, self.hidden_size, generator=generator).to(dtype)
        return hidden, index, weights, grad


QWEN3_30B_LAYER = LayerCase(num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8, num_tokens=512)
