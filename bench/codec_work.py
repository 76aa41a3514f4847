"""Encode and decode, every format, beside torch and bitsandbytes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial

import torch
from cases import OpShape, Random, Work, nbytes
from torch import Tensor
from usaf_ext import ops

try:
    import bitsandbytes.functional as bnb
except ModuleNotFoundError:  # a peer where it is installed
    bnb = None
except Exception:  # and works: our own figures need none
    logging.getLogger(__name__).warning("bitsandbytes is left out", exc_info=True)
    bnb = None

BLOCK = 64
QUANTISED = ("nf4", "nf4_f16", "int8", "fp8")


def _weight(shape: OpShape, dtype: torch.dtype) -> Tensor:
    return Random(shape.device, seed=0).normal(shape.rows, shape.layer.hidden_size).mul_(0.02).to(dtype)


@functools.cache
def _nf4(device: torch.device) -> Tensor:
    """The format's 16 values, as our decoder has them; for the peer in torch."""
    codes = torch.arange(0, 256, 17, dtype=torch.uint8).repeat_interleave(16).view(16, 16)  # both halves of a byte
    return ops.dequantize_blocks(codes, torch.ones(16, 1), 32, "nf4")[:, 0].to(device)


@functools.cache
def _midpoints(device: torch.device) -> Tensor:
    values = _nf4(device)
    return (values[1:] + values[:-1]) / 2


def _torch_encode(format: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in eager torch; hidden_size is a multiple of 64 here."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    absmax = blocks.abs().amax(-1)
    if format == "int8":
        codes = (blocks * (127 / absmax)[..., None]).round().to(torch.int8)
        return codes.flatten(-2).view(torch.uint8), absmax
    if format == "fp8":
        scale = absmax / 448
        return (blocks / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn).view(torch.uint8), scale
    if format == "nf4_f16":
        absmax = absmax.half()
    code = torch.bucketize((blocks * (1 / absmax.float())[..., None]).flatten(-2), _midpoints(weight.device))
    return (code[..., 0::2] << 4 | code[..., 1::2]).to(torch.uint8), absmax


def _torch_decode(format: str, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    if format == "int8":
        values = codes.view(torch.int8).float() / 127
    elif format == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        values = _nf4(codes.device)[torch.stack((codes >> 4, codes & 15), -1).flatten(-2).int()]
    return (values.unflatten(-1, (-1, BLOCK)) * absmax.float()[..., None]).flatten(-2).to(dtype)


def _size(weight: Tensor) -> str:
    return f"{weight.shape[0]} x {weight.shape[1]} weights"


def _encode(format: str, dtype: torch.dtype, shape: OpShape) -> Work:
    weight = _weight(shape, dtype)
    codes, absmax = ops.quantize_blocks(weight, format)

    def check_alone():
        torch.stack(absmax.aminmax()).cpu()
        return absmax

    peers: dict[str, Callable] = {
        "torch": lambda: _torch_encode(format, weight)[1],
        "the check for finite values alone": check_alone,
    }
    if format == "nf4" and bnb:
        peers["bitsandbytes"] = lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")[1].absmax
    moved = nbytes(weight, codes, absmax)
    # Scales alone are compared: torch's division may move a code at a threshold by one. Its fp16 scale is the nearest,
    # ours is never below the largest weight.
    tolerance = 2**-10 if format == "nf4_f16" else 1e-6
    return Work(_size(weight), moved, lambda: ops.quantize_blocks(weight, format)[1], peers, tolerance)


def _decode(format: str, dtype: torch.dtype, shape: OpShape) -> Work:
    weight = _weight(shape, dtype)
    codes, absmax = ops.quantize_blocks(weight, format)
    cols = weight.shape[1]
    peers: dict[str, Callable] = {"torch": lambda: _torch_decode(format, codes, absmax, dtype)}
    if format == "nf4" and bnb:
        # Quantised when it first runs: where it fails, so does this peer alone.
        quantised = functools.cache(lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4"))
        peers["bitsandbytes"] = lambda: bnb.dequantize_4bit(*quantised())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    return Work(
        _size(weight),
        nbytes(weight, codes, absmax),
        lambda: ops.dequantize_blocks(codes, absmax, cols, format, dtype=dtype),
        peers,
        tolerance,
    )


CODEC_CASES: dict[str, Callable[[OpShape], Work]] = {
    f"{name}_{format}_{'fp32' if dtype == torch.float32 else 'bf16'}": partial(build, format, dtype)
    for name, build in (("encode", _encode), ("decode", _decode))
    for format in QUANTISED
    for dtype in (torch.float32, torch.bfloat16)
}
