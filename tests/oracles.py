"""Independent references for the op tests: plain torch, float64 where sums are involved, written from the formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import bitsandbytes.functional as bnb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
NF4 = bnb.get_4bit_type("nf4", device="cpu")


def padded_code_bytes(format: str, cols: int) -> int:
    return -(-(2 * cols if format == "bf16" else -(-cols // 2)) // 16) * 16


def to_blocks(weight: Tensor) -> Tensor:
    """[rows, cols] -> [rows, blocks, 64], the short block filled with zeros."""
    return F.pad(weight, (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def encode_nf4(weight: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] (one a weight) and absmax [rows, blocks]: nearest, or stochastic by `uniform`."""
    blocks = to_blocks(weight.float())
    absmax = blocks.abs().amax(-1)
    normalized = blocks * (1.0 / absmax.clamp_min(1e-38)).unsqueeze(-1)
    normalized = normalized.flatten(-2)[..., : weight.shape[-1]].contiguous()
    if uniform is None:
        return torch.searchsorted((NF4[:-1] + NF4[1:]) / 2, normalized), absmax
    low = (torch.searchsorted(NF4, normalized, right=True) - 1).clamp(0, 14)
    return low + (normalized - NF4[low] > uniform * (NF4[low + 1] - NF4[low])), absmax


def pack_nf4(code: Tensor) -> Tensor:
    """[rows, cols] codes -> the bytes of the rows: first of a pair in the high nibble, then zeros up to 16 bytes."""
    cols = code.shape[-1]
    even = F.pad(code.to(torch.uint8), (0, 2 * padded_code_bytes("nf4", cols) - cols))
    return (even[:, 0::2] << 4) | even[:, 1::2]


def decode_nf4(codes: Tensor, absmax: Tensor, cols: int) -> Tensor:
    code = torch.stack((codes >> 4, codes & 15), -1).flatten(-2)[:, :cols].long()
    return NF4[code] * absmax.repeat_interleave(BLOCK, -1)[:, :cols]


def pack_bf16(weight: Tensor) -> Tensor:
    raw = weight.bfloat16().contiguous().view(torch.uint8)
    return F.pad(raw, (0, padded_code_bytes("bf16", weight.shape[-1]) - raw.shape[-1]))


def unpack_bf16(codes: Tensor, cols: int) -> Tensor:
    return codes[:, : 2 * cols].contiguous().view(torch.bfloat16).float()


def philox_words(c0: np.ndarray, c1: np.ndarray | int, c2: int, c3: int, seed: int) -> np.ndarray:
    """Philox 4x32-10 of the counters (c0, c1, c2, c3), 32-bit each, under a 64-bit key: uint64 [n, 4]."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    counter = [c0, *(np.broadcast_to(np.asarray(c, dtype=np.uint64), c0.shape) for c in (c1, c2, c3))]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * counter[0]
        product1 = np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (product1 >> shift) ^ counter[1] ^ key[0],
            product1 & mask,
            (product0 >> shift) ^ counter[3] ^ key[1],
            product0 & mask,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(counter, -1)


def philox(seed: int, step: int, first: int, count: int) -> Tensor:
    """Random 32-bit numbers of elements first .. first + count - 1 (Philox 4x32-10), as int64."""
    groups = np.arange(first // 4, (first + count - 1) // 4 + 1, dtype=np.uint64)
    words = philox_words(groups & np.uint64(0xFFFFFFFF), groups >> np.uint64(32), step, 0, seed)
    values = words.reshape(-1)[first % 4 :][:count]
    return torch.from_numpy(values.astype(np.int64))


def same_for_any_threads(run: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether run() returns the same bits with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([result.clone() for result in run()])
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def act(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def glu(gate_up: Tensor, activation: str, interleaved: bool = False, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        gate_up = gate_up + bias
    gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if interleaved else gate_up.chunk(2, -1)
    if activation == "swiglu_clamped":
        # Not clamp: at the bound itself its gradient is 1 up to torch 2.13 and 0 from 2.14 on; here it is 1.
        gate = torch.where(gate > 7.0, 7.0, gate)
        up = torch.where(up > 7.0, 7.0, torch.where(up < -7.0, -7.0, up))
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return act(gate, activation) * up


def sort_pairs(index: Tensor, num_experts: int) -> tuple[list[int], list[int], Tensor]:
    """Pairs in expert order (stable), offsets, and the inverse map, by plain Python."""
    flat = index.flatten().tolist()
    order = [pair for expert in range(num_experts) for pair in range(len(flat)) if flat[pair] == expert]
    offsets = [sum(e < expert for e in flat) for expert in range(num_experts + 1)]
    inverse = torch.full((len(flat),), -1, dtype=torch.int32)
    for position, pair in enumerate(order):
        inverse[pair] = position
    return order, offsets, inverse.view(index.shape)


def combine(permuted: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    weights = torch.ones(inverse.shape, dtype=permuted.dtype) if weights is None else weights
    rows = torch.cat((permuted, permuted.new_zeros(1, permuted.shape[1])))[inverse.long()]  # -1 picks the zero row
    return (rows * weights.unsqueeze(-1)).sum(1)
