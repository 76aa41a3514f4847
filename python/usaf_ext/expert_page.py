"""The bytes of one expert's page: encoding into them, and reading them as matrices, weights or neurons.

A page holds gate, up and down at the offsets of its `_C.PageLayout`: down transposed, so that a neuron is a row of it
too (down_axis "hidden"), or as it is (down_axis "intermediate", imported from bitsandbytes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C, ops

MATRICES = ("gate", "up", "down")

Encoded = tuple[Tensor, Tensor]  # codes, absmax


def is_transposed(layout: _C.PageLayout, matrix: int) -> bool:
    """Whether the page holds the transpose of matrix 0 (gate), 1 (up) or 2 (down)."""
    return MATRICES[matrix] == "down" and layout.down_axis == "hidden"


def _weight_shape(layout: _C.PageLayout, matrix: int) -> tuple[int, int]:
    rows, cols = layout.rows[matrix], layout.cols[matrix]
    return (cols, rows) if is_transposed(layout, matrix) else (rows, cols)


def describe_page(layout: _C.PageLayout) -> list[dict[str, Any]]:
    """What stands in a page, for readers that know a store's safetensors files only."""
    axes = ("hidden", "hidden", layout.down_axis)
    return [
        {
            "name": name,
            "transposed": is_transposed(layout, matrix),
            "format": layout.format,
            "block_axis": f"{axes[matrix]}_size",
            "codes_offset": layout.codes_offset[matrix],
            "absmax_offset": layout.absmax_offset[matrix],
        }
        for matrix, name in enumerate(MATRICES)
    ]


def encode_expert(layout: _C.PageLayout, gate: Tensor, up: Tensor, down: Tensor, where: str) -> list[Encoded]:
    """Encode gate, up [intermediate_size, hidden_size] and down [hidden_size, intermediate_size] for a page.

    Raises TypeError or ValueError, naming the matrix and `where`, for another dtype than floating, another shape, or
    weights that are not finite in fp32 or too large for the format.
    """
    encoded = []
    for matrix, (name, weight) in enumerate(zip(MATRICES, (gate, up, down))):
        shape = _weight_shape(layout, matrix)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{name} of {where}: expected a tensor of a floating dtype, got {found}")
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name} of {where}: expected shape {shape}, got {tuple(weight.shape)}")
        if weight.dtype != torch.bfloat16:
            weight = weight.float()
        weight = weight.detach().cpu()
        rows = (weight.T if is_transposed(layout, matrix) else weight).contiguous()
        try:
            encoded.append(ops.quantize_blocks(rows, layout.format))
        except ValueError as error:
            raise ValueError(f"{name} of {where}: {error}") from None
    return encoded


def check_encoded(layout: _C.PageLayout, encoded: list[Encoded], where: str) -> None:
    """Raise TypeError or ValueError, naming the matrix and `where`, for codes or scales that do not fit the page."""
    for matrix, (name, pair) in enumerate(zip(MATRICES, encoded, strict=True)):
        rows, cols = layout.rows[matrix], layout.cols[matrix]
        for kind, tensor, dtype, width in (
            ("codes", pair[0], torch.uint8, _C.code_bytes(layout.format, cols)),
            ("absmax", pair[1], ops.scale_dtype(layout.format), _C.num_blocks(layout.format, cols)),
        ):
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{kind} of {name} of {where}: expected a tensor of {dtype}, got {found}")
            if tensor.numel() != rows * width:
                raise ValueError(
                    f"{kind} of {name} of {where}: expected {rows} x {width} values, got {tuple(tensor.shape)}"
                )
        if not bool(torch.isfinite(pair[1]).all()):
            raise ValueError(f"absmax of {name} of {where}: not finite")


def fill_page(layout: _C.PageLayout, page: np.ndarray, encoded: list[Encoded]) -> None:
    """Put the three matrices' codes and scales, whose sizes fit, into `page` (uint8 [page_bytes])."""
    for matrix, pair in enumerate(encoded):
        for start, part in zip((layout.codes_offset[matrix], layout.absmax_offset[matrix]), pair):
            raw = part.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
            page[start : start + raw.size] = raw


def matrix_of(layout: _C.PageLayout, page: np.ndarray, matrix: int) -> tuple[np.ndarray, np.ndarray]:
    """codes u8 [rows, code_bytes] and absmax [rows, num_blocks] of a matrix, as it stands in the page: views of it."""
    rows, cols = layout.rows[matrix], layout.cols[matrix]
    views = []
    for start, width, dtype in (
        (layout.codes_offset[matrix], _C.code_bytes(layout.format, cols), np.uint8),
        (layout.absmax_offset[matrix], _C.num_blocks(layout.format, cols), _C.scale_dtype(layout.format)),
    ):
        raw = page[start : start + rows * width * np.dtype(dtype).itemsize]
        views.append(raw.view(dtype).reshape(rows, width))
    return views[0], views[1]


def _decode(layout: _C.PageLayout, page: np.ndarray, matrix: int, dtype: torch.dtype) -> Tensor:
    """One of the matrices as `decode_expert` gives them."""
    codes, absmax = (torch.from_numpy(part.copy()) for part in matrix_of(layout, page, matrix))
    weight = ops.dequantize_blocks(codes, absmax, layout.cols[matrix], layout.format, dtype)
    return weight.T.contiguous() if is_transposed(layout, matrix) else weight


def decode_expert(layout: _C.PageLayout, page: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up [intermediate_size, hidden_size] and down [hidden_size, intermediate_size] of a page."""
    return _decode(layout, page, 0, dtype), _decode(layout, page, 1, dtype), _decode(layout, page, 2, dtype)


def neuron_rows(layout: _C.PageLayout, page: np.ndarray, neurons: np.ndarray) -> Encoded:
    """Codes u8 [n, 3, code_bytes] and absmax [n, 3, num_blocks] of neurons: gate, up, down^T along hidden_size. Copies.

    Rows of down^T that the page holds along intermediate_size are decoded and encoded again.
    """
    parts = []
    for matrix, name in enumerate(MATRICES):
        if name != "down" or is_transposed(layout, matrix):
            parts.append(tuple(part[neurons] for part in matrix_of(layout, page, matrix)))
        else:
            encoded = ops.quantize_blocks(_columns(layout, page, matrix, neurons), layout.format)
            parts.append(tuple(part.numpy() for part in encoded))
    codes, absmax = (np.stack([part[which] for part in parts], axis=1) for which in (0, 1))
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def _columns(layout: _C.PageLayout, page: np.ndarray, matrix: int, picked: np.ndarray) -> Tensor:
    """Some columns of a matrix, decoded, as rows: float32 [n, rows]. Decodes only the blocks that hold one."""
    codes, absmax = matrix_of(layout, page, matrix)
    width = _C.code_bytes(layout.format, _C.BLOCK_SIZE)  # rows are whole blocks, without padding
    result = torch.empty(len(picked), layout.rows[matrix])
    for block in np.unique(picked // _C.BLOCK_SIZE).tolist():
        decoded = ops.dequantize_blocks(
            torch.from_numpy(codes[:, block * width : (block + 1) * width].copy()),
            torch.from_numpy(absmax[:, block : block + 1].copy()),
            _C.BLOCK_SIZE,
            layout.format,
        )
        inside = np.flatnonzero(picked // _C.BLOCK_SIZE == block)
        result[inside] = decoded.T[picked[inside] % _C.BLOCK_SIZE]
    return result
