"""Masked Adam on trained rows, codes written in the same pass, beside torch's fused AdamW on as many fp32 weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cases import OpShape, Random, Work, nbytes
from usaf_ext import ops

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def _adam(mode: str, format: str, moments: str, grad_dtype: torch.dtype, shape: OpShape) -> Work:
    rows, cols = shape.trained, shape.layer.hidden_size
    random = Random(shape.device, seed=5)
    weight = random.normal(rows, cols).mul_(0.02).bfloat16()
    grad = random.normal(rows, cols).mul_(1e-3).to(grad_dtype)
    codes, absmax = ops.quantize_blocks(weight, format)
    state: dict = {}
    if mode == "master":
        state["master"] = weight.clone()
    elif mode == "residual":
        state["residual"] = torch.zeros(rows, cols, dtype=torch.int8, device=shape.device)
    if moments == "8bit":
        exp_avg, state["exp_avg_absmax"] = ops.empty_moments8((rows, cols), shape.device)
        exp_avg_sq, state["exp_avg_sq_absmax"] = ops.empty_moments8((rows, cols), shape.device)
    else:
        exp_avg, exp_avg_sq = torch.zeros(2, rows, cols, device=shape.device)
    step = torch.zeros(rows, dtype=torch.int32, device=shape.device)

    def ours():
        ops.masked_adam_(codes, absmax, exp_avg, exp_avg_sq, step, grad, format=format, mode=mode, **HYPER, **state)
        return state.get("master")

    parameter = torch.nn.Parameter(weight.float())
    parameter.grad = grad.float()
    optimizer = torch.optim.AdamW([parameter], lr=HYPER["lr"], weight_decay=HYPER["weight_decay"], fused=True)

    def torch_adamw():
        optimizer.step()
        return parameter.detach() if mode == "master" else None

    moved = 2 * nbytes(codes, absmax, exp_avg, exp_avg_sq, *state.values()) + nbytes(grad)
    size = f"{rows} x {cols} weights, {moments} moments, {str(grad_dtype)[6:]} gradients"
    return Work(size, moved, ours, {"torch fused AdamW (dense fp32, no codes)": torch_adamw}, 2**-8)


def _moments8(shape: OpShape) -> Work:
    rows, cols = shape.trained, shape.layer.hidden_size
    codes = Random(shape.device, seed=6).uniform(rows, cols).mul_(256).to(torch.uint8)
    absmax = Random(shape.device, seed=7).uniform(rows, -(-cols // 256))
    moved = nbytes(codes, absmax) + 4 * codes.numel()
    return Work(f"{rows} x {cols} moments", moved, lambda: ops.dequantize_moments8(codes, absmax, True))


def _residual(encode: bool, shape: OpShape) -> Work:
    rows, cols = shape.trained, shape.layer.hidden_size
    weight = Random(shape.device, seed=5).normal(rows, cols).mul_(0.02)
    codes, absmax = ops.quantize_blocks(weight, "nf4")
    residual = ops.quantize_residual(weight, codes, absmax, "nf4")
    moved = nbytes(weight, codes, absmax, residual)
    if encode:
        return Work(f"{rows} x {cols} weights", moved, lambda: ops.quantize_residual(weight, codes, absmax, "nf4"))
    return Work(f"{rows} x {cols} weights", moved, lambda: ops.dequantize_residual(codes, absmax, residual, "nf4"))


ADAM_CASES: dict[str, Callable[[OpShape], Work]] = {
    "adam_master_nf4": partial(_adam, "master", "nf4", "fp32", torch.float32),
    "adam_master_nf4_bf16_gradients": partial(_adam, "master", "nf4", "fp32", torch.bfloat16),
    "adam_master_nf4_8bit_moments": partial(_adam, "master", "nf4", "8bit", torch.float32),
    "adam_master_int8": partial(_adam, "master", "int8", "fp32", torch.float32),
    "adam_residual_nf4": partial(_adam, "residual", "nf4", "fp32", torch.float32),
    "adam_eco_nf4": partial(_adam, "eco", "nf4", "fp32", torch.float32),
    "adam_eco_nf4_8bit_moments_bf16_gradients": partial(_adam, "eco", "nf4", "8bit", torch.bfloat16),
    "adam_in_place_nf4": partial(_adam, "in_place", "nf4", "fp32", torch.float32),
    "decode_moments8": _moments8,
    "encode_residual": partial(_residual, True),
    "decode_residual": partial(_residual, False),
}
