"""What is measured, and tested: each op and the layer on fixed inputs, beside peers that do the same work.

`op_cases.OP_CASES` maps a name to a builder; `build(shape)` gives a `Work`: our call, the peers' calls, and the bytes
that the work must move (each input read once, each output written once). Benchmarks run it on BENCH_SHAPE, the tests on
TEST_SHAPE, where they compare every peer's result with ours: what is timed is the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Random:
    """Numbers for inputs on a device, drawn there where torch can."""

    def __init__(self, device: torch.device, seed: int):
        self._device = device
        self._generator = torch.Generator(device if device.type == "cuda" else CPU).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, device=self._generator.device)
        return drawn.to(self._device)

    def uniform(self, *shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=self._generator, device=self._generator.device)
        return drawn.to(self._device)


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

    def with_(self, **changes: int) -> LayerCase:
        return replace(self, **changes)

    def inputs(
        self, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, top_k_index, top_k_weights and the output's gradient, with a random softmax routing."""
        random = Random(device, seed=0)
        hidden = random.normal(self.num_tokens, self.hidden_size).to(dtype)
        logits = random.normal(self.num_tokens, self.num_experts)
        weights, index = torch.softmax(logits, -1).topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
        grad = random.normal(self.num_tokens, self.hidden_size).to(dtype)
        return hidden, index, weights, grad


QWEN3_30B_LAYER = LayerCase(num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8, num_tokens=512)


@dataclass(frozen=True)
class OpShape:
    """Sizes for the single ops.

    Attributes:
        layer: for what follows the routing. rows, trained: rows of layer.hidden_size weights, for the codec and Adam.
        density: share of each expert's neurons that is trained. device: where the inputs lie.
    """

    layer: LayerCase
    rows: int
    trained: int
    density: float = 0.01
    device: torch.device = CPU

    def on(self, device: torch.device) -> OpShape:
        return replace(self, device=device)


# Past every cache: 50 M weights for codec and Adam; 268 MB of permuted bf16 rows.
BENCH_SHAPE = OpShape(QWEN3_30B_LAYER.with_(num_tokens=8192), rows=24576, trained=24576)
TEST_SHAPE = OpShape(LayerCase(8, 192, 64, 3, 37), rows=29, trained=23, density=0.1)


@dataclass
class Work:
    """One op on fixed inputs.

    Attributes:
        ours: runs the op; its result is compared with the peers'. peers: name -> the same work elsewhere.
        size: what a reader needs to know of the inputs. moved: bytes, each input read and output written once.
        tolerance: largest difference to a peer, relative to the largest value (0: the same bits).
    """

    size: str
    moved: int
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    tolerance: float = 0.0


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
