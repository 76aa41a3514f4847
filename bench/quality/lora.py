"""The peer: a minimal LoRA (Hu et al. 2021, arXiv 2106.09685) on attention's projections. For measurement only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SCALE = 2.0  # alpha / r, the same for every r


class LoraLinear(nn.Module):
    """base(x) + SCALE * x A^T B^T; A fp32 [r, in], uniform as a Linear's, B fp32 [out, r], zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = F.linear(F.linear(x.float(), self.lora_a), self.lora_b)
        return self.base(x) + (SCALE * update).to(x.dtype)


def add_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Wrap every attention projection in place; returns the new parameters. Raises ValueError when there is none."""
    parameters = []
    for module in list(model.modules()):
        for name in PROJECTIONS:
            base = getattr(module, name, None)
            if isinstance(base, nn.Linear):
                wrapped = LoraLinear(base, rank)
                setattr(module, name, wrapped)
                parameters += [wrapped.lora_a, wrapped.lora_b]
    if not parameters:
        raise ValueError(f"model: no {', '.join(PROJECTIONS)} to put LoRA on")
    return parameters
