"""What the simulation of a step (bench/timeline.py) assumes of a model, a card and its host: sizes, rates, durations.

Durations are roofs: a GEMM takes the longer of its FLOPs at an assumed share of the peak and its weights at the memory
bandwidth; everything else takes its bytes at the memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF = 2  # bytes of an element in compute
FLOAT = 4


@dataclass(frozen=True)
class Model:
    """Sizes of a Mixture-of-Experts model; page_bytes: of one expert in the store."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    page_bytes: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def projection_weights(self) -> int:
        """Of one attention block: query, key, value and output."""
        return self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def num_pages(self) -> int:
        return self.num_layers * self.num_experts


def qwen3_30b_a3b() -> Model:
    """Sizes as in the model's public config.json, pages in NF4 with fp32 scales."""
    from usaf_ext import _C

    page_bytes = _C.PageLayout("nf4", 2048, 768).page_bytes
    return Model("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 32, 4, 128, 151936, page_bytes)


@dataclass(frozen=True)
class Card:
    """Peaks in operations and bytes a second; `sources` says where they stand. The shares are assumptions."""

    name: str
    compute: str  # what the GEMMs run in
    peak_flops: float
    gemm_share: float  # of it that GEMMs reach
    memory_bandwidth: float
    memory_share: float  # of it that kernels bound by memory reach
    link: str
    link_bandwidth: float  # host to device, pinned memory
    sources: str

    def gemm_seconds(self, flops: float, weights: float) -> float:
        return max(flops / (self.peak_flops * self.gemm_share), self.memory_seconds(weights * HALF))

    def memory_seconds(self, num_bytes: float) -> float:
        return num_bytes / (self.memory_bandwidth * self.memory_share)


# 16 GT/s x 16 lanes x 128/130 = 31.5 GB/s a direction; pinned copies of megabytes reach about 24 of it.
_LINK = {"link": "PCIe 4.0 x16", "link_bandwidth": 24e9}

CARDS = {
    "rx6750xt": Card(
        name="Radeon RX 6750 XT 12 GB",
        compute="fp16",
        peak_flops=26.62e12,
        gemm_share=0.6,
        memory_bandwidth=432e9,
        memory_share=0.85,
        sources="AMD's product page and launch slides: 2560 stream processors at 2.6 GHz, 13.31 TFLOP/s fp32 and "
        "26.62 packed fp16, no matrix units, no bf16; 192-bit GDDR6 at 18 Gbit/s, 432 GB/s; PCIe 4.0 x16",
        **_LINK,
    ),
    "rtx3060": Card(
        name="GeForce RTX 3060 12 GB",
        compute="bf16, fp32 accumulation",
        peak_flops=25.5e12,
        gemm_share=0.7,
        memory_bandwidth=360e9,
        memory_share=0.85,
        sources="NVIDIA's product page: 3584 cores at 1.78 GHz (12.7 TFLOP/s fp32), 192-bit GDDR6 at 15 Gbit/s, "
        "360 GB/s, PCIe 4.0 x16; tensor rate from the GA102 whitepaper's rate per multiprocessor and clock (512 dense "
        "bf16 operations with fp32 accumulation) x 28 x 1.777 GHz",
        **_LINK,
    ),
}


@dataclass(frozen=True)
class Host:
    """Assumed costs of driving the card, in seconds, and the kernels launched (see docstring of `Durations`)."""

    call_seconds: float = 4e-6  # a launch or a copy
    event_seconds: float = 1e-6  # an event's record, or a stream's wait for it
    wake_seconds: float = 20e-6  # from an event to the host going on behind it
    queue_depth: int = 1024


class Durations:
    """How long a step's kernels take on `card`.

    Forward of an expert with n tokens: decode its page; gather; 6 n H I operations; activation; scatter.
    Backward: decode; gather x and dY; recompute of gate and up, dh and dx, 10 n H I; gradients of `density` of the
    rows, density * 6 n H I, added in fp32.
    Dense part: projections, causal attention over sequences of `sequence_length`, router, and what is bound by memory
    (norms, rotation, residuals: about 12 passes over [tokens, hidden]). Backward recomputes it (gradient
    checkpointing), then computes input gradients only: its weights are frozen.
    """

    # Launches: an expert's decode takes 5 (two of pages, three of bank rows).
    forward_calls, backward_calls = 10, 14
    before_calls, after_calls, head_calls = 24, 4, 6

    def __init__(self, model: Model, card: Card, num_tokens: int, density: float, sequence_length: int = 2048):
        self.model, self.card, self.num_tokens, self.density = model, card, num_tokens, density
        self.sequence_length = min(sequence_length, num_tokens)

    def _decode(self) -> float:
        return self.card.memory_seconds(self.model.page_bytes + self.model.expert_weights * HALF)

    def expert_forward(self, n: int) -> float:
        if n == 0:
            return 0.0
        m, card = self.model, self.card
        passes = n * (m.hidden_size * (2 * HALF + HALF + 2 * FLOAT) + 3 * m.intermediate_size * HALF)
        gemms = card.gemm_seconds(2 * n * m.expert_weights, m.expert_weights)
        return self._decode() + gemms + card.memory_seconds(passes)

    def expert_backward(self, n: int) -> float:
        if n == 0:
            return 0.0
        m, card = self.model, self.card
        passes = n * (m.hidden_size * (4 * HALF + HALF + 2 * FLOAT) + 6 * m.intermediate_size * HALF)
        gemms = card.gemm_seconds(2 * n * m.expert_weights * 5 / 3, m.expert_weights * 5 / 3)
        trained = self.density * m.expert_weights
        rows = card.gemm_seconds(2 * n * trained, 0) + card.memory_seconds(trained * 2 * FLOAT)
        return self._decode() + gemms + rows + card.memory_seconds(passes)

    def _attention(self, products: int) -> float:
        """Of products of [tokens, head] by [head, sequence], half of it masked."""
        m = self.model
        return self.card.gemm_seconds(products * self.num_tokens * self.sequence_length * m.num_heads * m.head_size, 0)

    def _projections(self) -> float:
        m = self.model
        weights = m.projection_weights + m.hidden_size * m.num_experts
        return self.card.gemm_seconds(2 * self.num_tokens * weights, weights)

    def _passes(self) -> float:
        return self.card.memory_seconds(12 * self.num_tokens * self.model.hidden_size * HALF)

    def dense_forward(self) -> float:
        return self._projections() + self._attention(2) + self._passes()

    def dense_backward(self) -> float:
        """Beside its recompute."""
        return self._projections() + self._attention(5) + self._passes()

    def head(self) -> float:
        """Logits, or the gradient of their input."""
        weights = self.model.hidden_size * self.model.vocab_size
        logits = 3 * self.num_tokens * self.model.vocab_size * HALF
        return self.card.gemm_seconds(2 * self.num_tokens * weights, weights) + self.card.memory_seconds(logits)
