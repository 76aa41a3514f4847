"""The CPU codec on its own, compiled for the tests (tests/native/codec_harness.cpp), by ctypes.

The extension's ops round to nearest, on the best instruction set. Here single blocks take given random numbers, and
each instruction set can be had by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import codec_oracles as oracles
import pytest
import torch
from native_build import build
from torch import Tensor

_SOURCES = ("tests/native/codec_harness.cpp", "cpp/cpu/codec.cpp", "cpp/cpu/isa.cpp")
ISAS = ("plain", "avx2", "avx512")


@functools.cache
def library() -> ctypes.CDLL:
    # As CMakeLists.txt compiles the extension.
    library = build(_SOURCES, ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"])
    if library is None:
        pytest.skip("no C++ compiler")
    return library


def call(name: str, *arguments: Tensor | int | None) -> None:
    converted = [
        ctypes.c_int64(a) if isinstance(a, int) else None if a is None else ctypes.c_void_p(a.data_ptr())
        for a in arguments
    ]
    getattr(library(), name)(*converted)


@contextlib.contextmanager
def only(isa: str) -> Iterator[None]:
    """Skip where the CPU lacks it."""
    if ISAS.index(isa) > library().detected_isa():
        pytest.skip(f"this CPU has no {isa}")
    library().limit_isa(ISAS.index(isa))
    try:
        yield
    finally:
        library().limit_isa(len(ISAS) - 1)


def encode_block(format: str, weight: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (used bytes only) and the scale of one float32 block; `random`: int64 numbers below 2^32, one a weight."""
    count = weight.numel()
    codes = torch.full((oracles.used_bytes(format, count),), 0xAA, dtype=torch.uint8)
    absmax = torch.zeros(1, dtype=oracles.scale_dtype(format))
    noise = None if random is None else random.to(torch.int32)  # the same 32 bits
    call("encode_block", oracles.FORMATS.index(format), weight, count, noise, codes, absmax)
    return codes, absmax


def decode_block(format: str, codes: Tensor, absmax: Tensor, count: int) -> Tensor:
    out = torch.empty(count)
    call("decode_block", oracles.FORMATS.index(format), codes, absmax, count, out)
    return out


def encode_rows(format: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    codes = torch.full((rows, oracles.code_bytes(format, cols)), 0xAA, dtype=torch.uint8)
    absmax = torch.full((rows, oracles.num_blocks(format, cols)), 77, dtype=oracles.scale_dtype(format))
    call(
        "encode_rows",
        oracles.FORMATS.index(format),
        oracles.DTYPES.index(weight.dtype),
        weight,
        rows,
        cols,
        codes,
        absmax,
    )
    return codes, absmax


def decode_rows(format: str, dtype: torch.dtype, codes: Tensor, absmax: Tensor, cols: int) -> Tensor:
    out = torch.full((len(codes), cols), 7, dtype=dtype)
    call(
        "decode_rows", oracles.FORMATS.index(format), oracles.DTYPES.index(dtype), codes, absmax, len(codes), cols, out
    )
    return out
