"""The codec's cases for the emulated kernels, an independent numpy oracle, and a runner.

Also a program: `python codec_cases.py LIBRARY` runs every case and exits non-zero on the first difference. It needs
numpy alone, so it runs quickly under sanitizers.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from dataclasses import dataclass

import numpy as np

FORMATS = {"bf16": 0, "nf4": 1, "nf4_f16": 2, "int8": 3, "fp8": 4}
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
CODE_BITS = {"bf16": 16, "nf4": 4, "nf4_f16": 4, "int8": 8, "fp8": 8}
STREAM = 0x5EED
WHOLE_WARPS = -1  # a schedule of the emulator

# The published table (arXiv 2305.14314, appendix E), written out here too: an oracle shares nothing with the code.
# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)
# fmt: on
# e4m3fn's 127 magnitudes by code: 3 mantissa bits, exponent bias 7, subnormals below code 8.
FP8 = np.array([m / 512 if m < 8 else (1 + m % 8 / 8) * 2.0 ** (m // 8 - 7) for m in range(127)])


@dataclass(frozen=True)
class Case:
    format: str
    dtype: str
    rows: int
    cols: int
    padding: int = 0  # elements between rows of weights
    offset: int = 0  # elements before the first weight: what breaks 16-byte alignment
    listed: bool = False  # rows through row_index / out_index

    def __str__(self) -> str:
        extra = f"+{self.padding}@{self.offset}{'-listed' if self.listed else ''}"
        return f"{self.format}-{self.dtype}-{self.rows}x{self.cols}{extra}"


def cases() -> list[Case]:
    # Odd columns, short blocks, several thread blocks along a row, and more rows than one grid takes.
    shapes = [
        (1, 1),
        (3, 2),
        (5, 7),
        (1, 63),
        (2, 64),
        (4, 65),
        (7, 100),
        (9, 129),
        (3, 1028),
        (1, 2056),
        (200, 31),
        (3, 0),
    ]
    found = []
    kinds = itertools.product(FORMATS, DTYPES)
    for number, ((format, dtype), (rows, cols)) in enumerate(itertools.product(kinds, shapes)):
        variants = [
            Case(format, dtype, rows, cols),
            Case(format, dtype, rows, cols, padding=3, listed=True),
            Case(format, dtype, rows, cols, padding=8 + (-cols) % 8, offset=1),
            Case(format, dtype, 0, cols),
        ]
        # How rows are found is the same code for every format: one of the variants each is enough for the others.
        found += variants if format == "nf4" and dtype != "f16" else [variants[number % 3]]
    return found


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the 16 bits of bfloat16, to nearest even, through float64 comparison with both neighbours."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    low = (bits >> 16).astype(np.uint32)
    down, up = ((low + step << 16).astype(np.uint32).view(np.float32).astype(np.float64) for step in (0, 1))
    exact = values.astype(np.float64)
    # Above the largest bfloat16 the upper neighbour is where the next one would be: the rule for overflow.
    up = np.where(np.isinf(up), np.sign(up) * 2.0**128, up)
    to_up, to_down = np.abs(up - exact), np.abs(exact - down)
    return np.where((to_up < to_down) | ((to_up == to_down) & (low % 2 == 1)), low + 1, low).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 as it is stored: itself, or 16 bits."""
    if dtype == "f32":
        return values
    with np.errstate(over="ignore"):
        return to_bf16(values) if dtype == "bf16" else values.astype(np.float16).view(np.uint16)


def from_dtype(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "f32":
        return stored
    return from_bf16(stored) if dtype == "bf16" else stored.view(np.float16).astype(np.float32)


def used_bytes(format: str, cols: int) -> int:
    return -(-cols * CODE_BITS[format] // 8)


def code_bytes(format: str, cols: int) -> int:
    return -(-used_bytes(format, cols) // 16) * 16


def num_blocks(format: str, cols: int) -> int:
    return 0 if format == "bf16" else -(-cols // 64)


def scale_dtype(format: str) -> type:
    return np.float16 if format == "nf4_f16" else np.float32


def steps(scales: np.ndarray, format: str) -> np.ndarray:
    """What a code's value is multiplied by, fp32 [rows, blocks]."""
    return scales / np.float32(127) if format == "int8" else scales.astype(np.float32)


def half_at_least(values: np.ndarray) -> np.ndarray:
    half = values.astype(np.float16)
    return np.where(half.astype(np.float32) < values, np.nextafter(half, np.float16(np.inf)), half)


def nearest_codes(scaled: np.ndarray, format: str) -> np.ndarray:
    """One code a weight, uint8."""
    if format == "int8":
        return np.clip(np.rint(scaled), -127, 127).astype(np.int8).view(np.uint8)
    if format == "fp8":
        magnitude = np.minimum(np.abs(scaled).astype(np.float64), 448.0)
        middle = (FP8[:-1] + FP8[1:]) / 2
        code = np.searchsorted(middle, magnitude, side="left")  # a tie goes down, unless that is odd
        tie = magnitude == np.append(middle, np.inf)[code]
        return (code + (tie & (code % 2 == 1)) + 128 * np.signbit(scaled)).astype(np.uint8)
    bounds = (NF4[:-1] + NF4[1:]) * np.float32(0.5)
    return np.searchsorted(bounds, scaled, side="left").astype(np.uint8)  # a tie is not above its bound


def encode_oracle(weight: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [rows, cols] -> codes [rows, code_bytes], scales [rows, num_blocks], by the documented rule."""
    rows, cols = weight.shape
    codes = np.zeros((rows, code_bytes(format, cols)), np.uint8)
    if format == "bf16":
        codes[:, : 2 * cols] = to_bf16(weight).view(np.uint8)
        return codes, np.zeros((rows, 0), np.float32)
    padded = np.zeros((rows, num_blocks(format, cols) * 64), np.float32)
    padded[:, :cols] = weight
    absmax = np.abs(padded).reshape(rows, num_blocks(format, cols), 64).max(-1, initial=0.0)
    scales = absmax / np.float32(448) if format == "fp8" else absmax
    scales = half_at_least(scales) if format == "nf4_f16" else scales.astype(np.float32)
    inverse = np.float32(1) / np.maximum(steps(scales, format), np.float32(1e-38))
    index = nearest_codes(padded * np.repeat(inverse, 64, axis=1), format)
    index[:, cols:] = 0
    used = used_bytes(format, cols)
    codes[:, :used] = (index[:, 0::2] << 4 | index[:, 1::2] if format.startswith("nf4") else index)[:, :used]
    return codes, scales


def decode_oracle(codes: np.ndarray, absmax: np.ndarray, cols: int, format: str) -> np.ndarray:
    """The exact values in float64."""
    if format == "bf16":
        return from_bf16(np.ascontiguousarray(codes[:, : 2 * cols]).view(np.uint16)).astype(np.float64)
    step = np.repeat(steps(absmax, format).astype(np.float64), 64, axis=1)[:, :cols]
    if format.startswith("nf4"):
        index = np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), 2 * codes.shape[1])[:, :cols]
        return NF4[index].astype(np.float64) * step
    raw = np.ascontiguousarray(codes[:, :cols])
    if format == "int8":
        return raw.view(np.int8).astype(np.float64) * step
    return np.where(raw < 128, 1.0, -1.0) * FP8[raw & 127] * step


def sample_weights(case: Case) -> np.ndarray:
    """fp32 values that are exact in the case's dtype; with zero blocks, subnormals, ties of the codec, extremes."""
    rng = np.random.default_rng([case.rows, case.cols, case.offset])
    weight = rng.standard_normal((case.rows, case.cols)).astype(np.float32)
    weight *= np.float32(10.0) ** rng.integers(-3, 3, (case.rows, 1)).astype(np.float32)
    if case.rows > 1 and case.cols:
        weight[0] = 0.0
        weight[1, : case.cols // 2] *= np.float32(1e-38)
    if case.rows > 3 and case.cols > 16:
        weight[2, 1:16] = (NF4[:-1] + NF4[1:]) * np.float32(0.5)
        weight[2, 0] = 1.0
        weight[3, ::7] = np.float32(6e4 if "f16" in (case.dtype, case.format[4:]) else 3e38)
        weight[3, 1] = -0.0
    if case.rows > 4 and case.cols > 16:  # ties of int8, then of fp8
        weight[4, :16] = np.append(np.arange(15) + np.float32(0.5), np.float32(127))
    if case.rows > 6 and case.cols > 30:
        weight[6, :30] = np.append((FP8[20:49] + FP8[21:50]) / 2, 448).astype(np.float32)
    return from_dtype(to_dtype(weight, case.dtype), case.dtype)


class Library:
    """The driver, and its device memory."""

    def __init__(self, path: str) -> None:
        self.native = ctypes.CDLL(path)
        self.native.device_malloc.restype = ctypes.c_void_p
        self.native.last_message.restype = ctypes.c_char_p
        self._buffers: list[ctypes.c_void_p] = []

    def upload(self, array: np.ndarray, offset: int = 0) -> ctypes.c_void_p:
        """A copy in memory that ends with the array's last byte; `offset` bytes past a multiple of 16."""
        base = self.native.device_malloc(ctypes.c_size_t(array.nbytes + offset))
        self._buffers.append(ctypes.c_void_p(base))
        source = np.ascontiguousarray(array)
        ctypes.memmove(base + offset, source.ctypes.data, source.nbytes)
        return ctypes.c_void_p(base + offset)

    def download(self, pointer: ctypes.c_void_p, like: np.ndarray) -> np.ndarray:
        out = np.empty_like(like)
        ctypes.memmove(out.ctypes.data, pointer.value, out.nbytes)
        return out

    def free(self) -> None:
        for buffer in self._buffers:
            self.native.device_free(buffer)
        self._buffers.clear()

    def call(self, name: str, *arguments: object) -> None:
        converted = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        if getattr(self.native, name)(*converted) != 0:
            raise RuntimeError(self.native.last_message().decode())


def strided(values: np.ndarray, case: Case, fill: int) -> np.ndarray:
    """[rows, cols] in rows of cols + padding elements, without what would follow the last row's end."""
    stride = case.cols + case.padding
    flat = np.full(max(case.rows * stride - case.padding, 0), fill, values.dtype)
    for row in range(case.rows):
        flat[row * stride : row * stride + case.cols] = values[row]
    return flat


def run_encode(library: Library, case: Case, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmax as the kernel leaves them in rows of 0xaa / 77 bytes; listed rows land at 2 r + 1."""
    stored = to_dtype(weight, case.dtype)
    total = 2 * case.rows + 1 if case.listed else case.rows
    codes = np.full((total, code_bytes(case.format, case.cols)), 0xAA, np.uint8)
    absmax = np.full((total, num_blocks(case.format, case.cols)), 77, scale_dtype(case.format))
    index = 2 * np.arange(case.rows)[::-1] + 1
    codes_at, absmax_at = library.upload(codes), library.upload(absmax)
    weight_at = library.upload(strided(stored, case, 7), case.offset * stored.itemsize)
    index_at = library.upload(index.astype(np.int64)) if case.listed else None
    sizes = (case.rows, case.cols, case.cols + case.padding)
    kind = (ctypes.c_int(FORMATS[case.format]), ctypes.c_int(DTYPES[case.dtype]), ctypes.c_void_p(STREAM))
    library.call("encode_rows", weight_at, codes_at, absmax_at, index_at, *sizes, *kind)
    return library.download(codes_at, codes), library.download(absmax_at, absmax)


def run_decode(library: Library, case: Case, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """What the kernel writes into rows filled with 7s; listed: row 2 r + 1 of codes goes to row rows - 1 - r."""
    out_dtype = np.float32 if case.dtype == "f32" else np.uint16
    out = strided(np.full((case.rows, case.cols), 7, out_dtype), case, 7)
    order = np.arange(case.rows, dtype=np.int64)
    codes_at, absmax_at = library.upload(codes), library.upload(absmax)
    out_at = library.upload(out, case.offset * out.itemsize)
    row_at, target_at = (library.upload(2 * order + 1), library.upload(order[::-1])) if case.listed else (None, None)
    sizes = (case.rows, case.cols, case.cols + case.padding)
    kind = (ctypes.c_int(FORMATS[case.format]), ctypes.c_int(DTYPES[case.dtype]), ctypes.c_void_p(STREAM))
    library.call("decode_rows", codes_at, absmax_at, out_at, row_at, target_at, *sizes, *kind)
    return library.download(out_at, out)


def expected_encode(case: Case, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, absmax = encode_oracle(weight, case.format)
    if not case.listed:
        return codes, absmax
    all_codes = np.full((2 * case.rows + 1, codes.shape[1]), 0xAA, np.uint8)
    all_absmax = np.full((2 * case.rows + 1, absmax.shape[1]), 77, absmax.dtype)
    all_codes[1::2][::-1], all_absmax[1::2][::-1] = codes, absmax
    return all_codes, all_absmax


def expected_decode(case: Case, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    picked = slice(1, None, 2) if case.listed else slice(None)
    with np.errstate(over="ignore"):
        value = decode_oracle(codes[picked], absmax[picked], case.cols, case.format).astype(np.float32)
    stored = to_dtype(value, case.dtype)
    return strided(stored[::-1] if case.listed else stored, case, 7)


def check_case(library: Library, case: Case) -> None:
    """Encode and decode under three orders of the threads; every byte equals the oracle's, untouched ones included."""
    weight = sample_weights(case)
    codes, absmax = expected_encode(case, weight)
    out = expected_decode(case, codes, absmax)
    try:
        for schedule in (0, 1, 9):
            library.native.set_schedule(schedule)
            got_codes, got_absmax = run_encode(library, case, weight)
            np.testing.assert_array_equal(got_codes, codes, err_msg=f"{case} codes")
            np.testing.assert_array_equal(got_absmax.view(np.uint8), absmax.view(np.uint8), err_msg=f"{case} absmax")
            got = run_decode(library, case, codes, absmax)
            np.testing.assert_array_equal(got.view(np.uint8), out.view(np.uint8), err_msg=f"{case} decoded")
    finally:
        library.native.set_schedule(0)
        library.free()


if __name__ == "__main__":
    emulated = Library(sys.argv[1])
    every = cases()
    for one in every:
        check_case(emulated, one)
    print(f"{len(every)} cases")
