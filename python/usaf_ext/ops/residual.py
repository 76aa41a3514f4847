"""The residual of Adam's mode "residual": one signed byte a weight beside its code, and what the two stand for.

Formula and sources: cpp/numerics/residual.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import require_strings, require_tensors


def dequantize_residual(codes: Tensor, absmax: Tensor, residual: Tensor, format: str) -> Tensor:
    """The weights that codes and residual stand for together, float32 [rows.., cols]: what the next step starts from.

    Args:
        codes: uint8 [rows.., code_bytes(format, cols)].
        absmax: scale_dtype(format) [rows.., num_blocks(format, cols)].
        residual: int8 [rows.., cols].
        format: one of `_C.FORMATS`.

    Raises:
        ValueError: shapes that do not fit, an unknown format. TypeError: wrong dtypes.
    """
    require_tensors(codes=codes, absmax=absmax, residual=residual)
    require_strings(format=format)
    return torch.ops.usaf.dequantize_residual(codes, absmax, residual, format)


def quantize_residual(weight: Tensor, codes: Tensor, absmax: Tensor, format: str) -> Tensor:
    """The residual, int8 [rows.., cols], that brings `codes` as near to `weight` as it can; errors beyond its range,
    half a code's gap to its farther neighbour, are cut off.

    Args:
        weight: float32 [rows.., cols].
        codes, absmax, format: as for `dequantize_residual`.

    Raises:
        ValueError: shapes that do not fit, an unknown format. TypeError: wrong dtypes.
    """
    require_tensors(weight=weight, codes=codes, absmax=absmax)
    require_strings(format=format)
    return torch.ops.usaf.quantize_residual(weight, codes, absmax, format)


@torch.library.register_fake("usaf::dequantize_residual")
def _(codes: Tensor, absmax: Tensor, residual: Tensor, format: str) -> Tensor:
    return torch.empty(residual.shape, dtype=torch.float32, device=codes.device)


@torch.library.register_fake("usaf::quantize_residual")
def _(weight: Tensor, codes: Tensor, absmax: Tensor, format: str) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.int8, device=codes.device)
