"""Encode and decode rows of weights.

Formats: "nf4" and "nf4_f16" (4-bit NormalFloat), "int8", "fp8" (e4m3fn), each with one scale per block of 64 along the
last dimension (formulas in cpp/numerics/, one header a family), and "bf16" (plain). Scales are of
`scale_dtype(format)`: float16 for nf4_f16, else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from .arguments import require_integers, require_optional_tensors, require_strings, require_tensors


def scale_dtype(format: str) -> torch.dtype:
    """The dtype of a format's scales, torch.float32 or torch.float16. Raises ValueError for an unknown format."""
    require_strings(format=format)
    return getattr(torch, _C.scale_dtype(format))


def quantize_blocks(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Encode every row (last dimension) of `weight`.

    Args:
        weight: [.., cols], float32, bfloat16 or float16, all finite; up to 65504 in magnitude for nf4_f16.
        format: "nf4", "nf4_f16", "int8", "fp8" or "bf16".

    Returns:
        codes: uint8 [.., code_bytes(format, cols)], rows padded to 16 bytes with zeros.
        absmax: scale_dtype(format) [.., num_blocks(format, cols)], the blocks' scales: their largest magnitude (rounded
            up to float16 for nf4_f16), or for fp8 that / 448. A last dimension of 0 for bf16.

    Raises:
        ValueError: a weight is NaN, infinite or too large (names the flat index of the first); unknown format.
        TypeError: another dtype.
    """
    require_tensors(weight=weight)
    require_strings(format=format)
    return torch.ops.usaf.quantize_blocks(weight, format)


def dequantize_blocks(
    codes: Tensor,
    absmax: Tensor,
    cols: int,
    format: str,
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    """Decode rows: `code value * step of the block` in fp32, rounded once to `dtype`.

    Args:
        codes: uint8 [.., code_bytes(format, cols)].
        absmax: scale_dtype(format) [.., num_blocks(format, cols)].
        cols: weights in a row.
        format: as for `quantize_blocks`.
        dtype: torch.float32, torch.bfloat16 or torch.float16 (where large weights become infinite).
        rows: int64 [n]; decode only these rows of a two-dimensional `codes`, in this order. Repeats are allowed.

    Returns:
        [.., cols] of `dtype`; with `rows`, [n, cols].

    Raises:
        ValueError: shapes that do not belong together, a row out of range, unknown format.
        TypeError: wrong dtypes.
    """
    require_tensors(codes=codes, absmax=absmax)
    require_optional_tensors(rows=rows)
    require_integers(cols=cols)
    require_strings(format=format)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    return torch.ops.usaf.dequantize_blocks(codes, absmax, cols, format, dtype, rows)


def quantize_rows_(codes: Tensor, absmax: Tensor, rows: Tensor, weight: Tensor, format: str) -> None:
    """Encode `weight[i]` into row `rows[i]` of `codes` and `absmax`, in place; the other rows keep their bytes.

    Args:
        codes: uint8 [num_rows, code_bytes(format, cols)], contiguous.
        absmax: scale_dtype(format) [num_rows, num_blocks(format, cols)], contiguous.
        rows: int64 [n], distinct, each in [0, num_rows).
        weight: [n, cols], as for `quantize_blocks`.
        format: as for `quantize_blocks`.

    Raises:
        ValueError, TypeError: as for `quantize_blocks`; also for rows that repeat or are out of range. Nothing is
            written then.
    """
    require_tensors(codes=codes, absmax=absmax, rows=rows, weight=weight)
    require_strings(format=format)
    torch.ops.usaf.quantize_rows_(codes, absmax, rows, weight, format)


@torch.library.register_fake("usaf::quantize_blocks")
def _(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    *leading, cols = weight.shape
    codes = weight.new_empty((*leading, _C.code_bytes(format, cols)), dtype=torch.uint8)
    return codes, weight.new_empty((*leading, _C.num_blocks(format, cols)), dtype=scale_dtype(format))


@torch.library.register_fake("usaf::dequantize_blocks")
def _(codes: Tensor, absmax: Tensor, cols: int, format: str, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    leading = codes.shape[:-1] if rows is None else rows.shape
    return codes.new_empty((*leading, cols), dtype=dtype)


@torch.library.register_fake("usaf::quantize_rows_")
def _(codes: Tensor, absmax: Tensor, rows: Tensor, weight: Tensor, format: str) -> None:
    return None
