"""Codec, gather and masked Adam, next to torch and bitsandbytes on the same work."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from cases import QWEN3_30B_LAYER as CASE
from usaf_ext import ops

ROUNDS = 9
ROWS = 16 * 2 * CASE.intermediate_size  # gate and up of 16 experts: past every cache


def _run(benchmark, function, moved: int, size: str, peer: bool = False):
    benchmark.extra_info.update(bytes=moved, size=size, peer=peer)
    benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=1)


def _nf4_bytes(weights: int) -> int:
    return weights // 2 + weights // 64 * 4


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def weight(request):
    return torch.randn(ROWS, CASE.hidden_size).mul_(0.02).to(request.param)


SIZE = f"{ROWS} x {CASE.hidden_size} weights"


def test_encode_nf4(benchmark, weight, copy_bandwidth):
    _run(benchmark, lambda: ops.quantize_blocks(weight, "nf4"), weight.nbytes + _nf4_bytes(weight.numel()), SIZE)


def test_encode_nf4_bitsandbytes(benchmark, weight, copy_bandwidth):
    moved = weight.nbytes + _nf4_bytes(weight.numel())
    _run(benchmark, lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"), moved, SIZE, peer=True)


def test_decode_nf4(benchmark, weight, copy_bandwidth):
    codes, absmax = ops.quantize_blocks(weight, "nf4")
    moved = weight.nbytes + _nf4_bytes(weight.numel())
    _run(
        benchmark,
        lambda: ops.dequantize_blocks(codes, absmax, CASE.hidden_size, "nf4", dtype=weight.dtype),
        moved,
        SIZE,
    )


def test_decode_nf4_bitsandbytes(benchmark, weight, copy_bandwidth):
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    moved = weight.nbytes + _nf4_bytes(weight.numel())
    _run(benchmark, lambda: bnb.dequantize_4bit(codes, state), moved, SIZE, peer=True)


@pytest.fixture(scope="module")
def routed():
    hidden, index, weights, _ = CASE.inputs()
    pairs = index.numel()
    moved = hidden.nbytes + pairs * CASE.hidden_size * hidden.element_size()
    return hidden, index, weights, moved


def test_gather(benchmark, routed, copy_bandwidth):
    hidden, index, _, moved = routed
    _run(benchmark, lambda: ops.expert_gather(hidden, index, CASE.num_experts), moved, str(CASE))


def test_gather_torch(benchmark, routed, copy_bandwidth):
    hidden, index, _, moved = routed

    def gather():
        order = index.flatten().argsort(stable=True)
        return hidden.index_select(0, order // CASE.top_k)

    _run(benchmark, gather, moved, str(CASE), peer=True)


def test_scatter(benchmark, routed, copy_bandwidth):
    hidden, index, weights, moved = routed
    permuted, _, inverse = ops.expert_gather(hidden, index, CASE.num_experts)
    _run(benchmark, lambda: ops.expert_scatter(permuted, inverse, weights), moved, str(CASE))


def test_scatter_torch(benchmark, routed, copy_bandwidth):
    hidden, index, weights, moved = routed
    order = index.flatten().argsort(stable=True)
    permuted = hidden.index_select(0, order // CASE.top_k)

    def scatter():
        scaled = permuted * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add_(0, order // CASE.top_k, scaled)

    _run(benchmark, scatter, moved, str(CASE), peer=True)


TRAINED_ROWS = 8 * 3 * CASE.num_experts * 8  # 1% of 8 layers


def test_masked_adam_master_nf4(benchmark, copy_bandwidth):
    cols = CASE.hidden_size
    master = torch.randn(TRAINED_ROWS, cols).mul_(0.02).bfloat16()
    codes, absmax = ops.quantize_blocks(master, "nf4")
    exp_avg, exp_avg_sq = torch.zeros(TRAINED_ROWS, cols), torch.zeros(TRAINED_ROWS, cols)
    step = torch.zeros(TRAINED_ROWS, dtype=torch.int32)
    grad = torch.randn(TRAINED_ROWS, cols).mul_(1e-3)
    moved = 2 * (exp_avg.nbytes + exp_avg_sq.nbytes + master.nbytes) + grad.nbytes + codes.nbytes + absmax.nbytes

    def adam():
        ops.masked_adam_(
            codes,
            absmax,
            exp_avg,
            exp_avg_sq,
            step,
            grad,
            master=master,
            lr=1e-4,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            format="nf4",
            mode="master",
        )

    _run(benchmark, adam, moved, f"{TRAINED_ROWS} rows x {cols}, bf16 master")


def test_adamw_torch_fused(benchmark, copy_bandwidth):
    parameter = torch.nn.Parameter(torch.randn(TRAINED_ROWS, CASE.hidden_size).mul_(0.02))
    parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.01, fused=True)
    size = f"{TRAINED_ROWS} rows x {CASE.hidden_size}, fp32, no codes"
    _run(benchmark, optimizer.step, 7 * parameter.nbytes, size, peer=True)
