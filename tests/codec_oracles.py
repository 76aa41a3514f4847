"""The codec of every format in plain torch, by the documented rules, for rows of float32 weights.

fp8 goes through torch's own float8_e4m3fn. Every operation is an IEEE one on float32, so bytes can be compared.
"""

from __future__ import annotations

import oracles
import torch
import torch.nn.functional as F
from oracles import BLOCK, NF4
from torch import Tensor

FORMATS = ("bf16", "nf4", "nf4_f16", "int8", "fp8")  # as Format of cpp/numerics/formats.h
BLOCK_FORMATS = FORMATS[1:]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # as DType of cpp/kernel_api.h
# The 127 magnitudes of e4m3fn, ascending: 0 to 448.
FP8 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_CODE_BITS = {"bf16": 16, "nf4": 4, "nf4_f16": 4, "int8": 8, "fp8": 8}


def scale_dtype(format: str) -> torch.dtype:
    return torch.float16 if format == "nf4_f16" else torch.float32


def num_blocks(format: str, cols: int) -> int:
    return 0 if format == "bf16" else -(-cols // BLOCK)


def used_bytes(format: str, cols: int) -> int:
    return -(-cols * _CODE_BITS[format] // 8)


def code_bytes(format: str, cols: int) -> int:
    return -(-used_bytes(format, cols) // 16) * 16


def half_at_least(values: Tensor) -> Tensor:
    """The smallest float16 that is not below each value (values >= 0)."""
    half = values.half()
    return torch.where(half.float() < values, half.view(torch.int16) + 1, half.view(torch.int16)).view(torch.float16)


def scales(weight: Tensor, format: str) -> Tensor:
    """What is stored for each block, [rows, blocks]."""
    absmax = oracles.to_blocks(weight).abs().amax(-1)
    if format == "nf4_f16":
        return half_at_least(absmax)
    return absmax / 448 if format == "fp8" else absmax


def steps(absmax: Tensor, format: str) -> Tensor:
    """What a code's value is multiplied by."""
    return absmax / 127 if format == "int8" else absmax.float()


def encode(weight: Tensor, format: str, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [rows, code_bytes] and scales [rows, blocks]. `random`, int64 below 2^32, like weight: stochastic."""
    if format == "bf16":
        return oracles.pack_bf16(weight), torch.empty(len(weight), 0)
    cols = weight.shape[-1]
    absmax = scales(weight.float(), format)
    step = steps(absmax, format).repeat_interleave(BLOCK, -1)[:, :cols]
    x = weight.float() * (1 / step.clamp_min(1e-38))
    uniform = None if random is None else (random >> 8).float() / 2**24
    if format.startswith("nf4"):
        if uniform is None:
            code = torch.searchsorted((NF4[:-1] + NF4[1:]) / 2, x.contiguous())
        else:
            x = x.clamp(max=1)
            low = (torch.searchsorted(NF4, x.contiguous(), right=True) - 1).clamp(0, 14)
            code = low + (x - NF4[low] > uniform * (NF4[low + 1] - NF4[low]))
        return oracles.pack_nf4(code), absmax
    if format == "int8":
        x = x.clamp(-127, 127)
        code = x.round() if uniform is None else x.floor() + (x - x.floor() > uniform)
        raw = code.to(torch.int8).view(torch.uint8)
    else:
        x = x.clamp(-448, 448)
        raw = x.to(torch.float8_e4m3fn).view(torch.uint8)
        if random is not None:
            low = (torch.searchsorted(FP8, x.abs().contiguous(), right=True) - 1).clamp(max=125)
            fraction = (x.abs().double() - FP8[low]) / (FP8[low + 1] - FP8[low]).double()
            code = low + ((fraction * 2**20).round() + (random >> 12) >= 2**20)
            raw = (code + 128 * torch.signbit(x)).to(torch.uint8)
    return F.pad(raw, (0, code_bytes(format, cols) - cols)), absmax


def decode(codes: Tensor, absmax: Tensor, cols: int, format: str) -> Tensor:
    """float32 [rows, cols]."""
    if format == "bf16":
        return oracles.unpack_bf16(codes, cols)
    step = steps(absmax, format)
    if format.startswith("nf4"):
        return oracles.decode_nf4(codes, step, cols)
    raw = codes[:, :cols].contiguous()
    value = raw.view(torch.int8 if format == "int8" else torch.float8_e4m3fn).float()
    return value * step.repeat_interleave(BLOCK, -1)[:, :cols]
