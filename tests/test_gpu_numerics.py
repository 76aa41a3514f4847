"""What the GPU kernels compute otherwise than the CPU backend, by lookups and wider instructions: the same bits."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from native_build import build

RESIDENT, MAX_ROWS = 264, 32  # thread blocks of masked Adam on an H100, and the rows that one may own


@pytest.fixture(scope="module")
def native() -> ctypes.CDLL:
    library = build(("tests/native/gpu_numerics_harness.cpp",), ["-O2", "-ffp-contract=off"])
    if library is None:
        pytest.skip("no C++ compiler")
    return library


def call(function, *arguments) -> None:
    function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments))


def codes_of(native: ctypes.CDLL, map: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if map == 2:
        values = values[np.abs(values) < 1.001]  # a finite block's, which rounding takes just past 1
    plain, by_lookup = np.zeros(values.size, np.uint8), np.zeros(values.size, np.uint8)
    call(native.codes_of, map, values, values.size, plain, by_lookup)
    return plain, by_lookup


def neighbours(values: np.ndarray, ulps: int) -> np.ndarray:
    bits = values.astype(np.float32).view(np.int32)[:, None] + np.arange(-ulps, ulps + 1, dtype=np.int32)
    return bits.reshape(-1).view(np.float32)


@pytest.mark.parametrize(("map", "codes"), [(0, 256), (1, 256), (2, 16)], ids=["exp_avg", "exp_avg_sq", "nf4"])
def test_lookups_give_the_code_of_the_bisection(native, map, codes):
    """At every bound, at the edges of every bin, and at one float of 1021."""
    everywhere = np.arange(0, 2**32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
    bins = (np.arange(0, 1 << 16, dtype=np.uint32) << 16).view(np.float32)
    middles = np.arange(-33, 34, dtype=np.float32) / 32  # where NF4's bins meet
    with np.errstate(invalid="ignore"):
        everywhere = everywhere * np.float32(1)  # no signalling NaN: products have none
        edges = neighbours(np.concatenate([bins[np.isfinite(bins)], middles, -middles]), 2) * np.float32(1)
    plain, by_lookup = codes_of(native, map, everywhere)
    np.testing.assert_array_equal(plain, by_lookup)
    assert np.unique(plain).size == codes
    np.testing.assert_array_equal(*codes_of(native, map, edges))
    ordered = np.sort(everywhere[np.abs(everywhere) <= 1.0])
    at = np.flatnonzero(np.diff(codes_of(native, map, ordered)[0].astype(np.int32)))
    for low, high in zip(ordered[at], ordered[at + 1]):  # everything between two floats with different codes
        bits = np.sort(np.array([low, high]).view(np.uint32))
        between = np.arange(bits[0], bits[1] + 1, dtype=np.uint32).view(np.float32)
        np.testing.assert_array_equal(*codes_of(native, map, between[:4096]))


def test_pairs_are_rounded_to_nearest_even(native):
    bits = np.arange(0, 2**32, 509, dtype=np.uint64).astype(np.uint32)
    halves = (np.arange(0, 1 << 16, dtype=np.uint32) << 16)[:, None] + np.array([0x7FFF, 0x8000, 0x8001], np.uint32)
    values = np.concatenate([bits, halves.reshape(-1)]).view(np.float32)
    values = values[: values.size // 8 * 8].reshape(-1, 8)
    pairs = np.zeros((values.shape[0], 4), np.uint32)
    call(native.to_pairs, values, values.shape[0], pairs)
    got = torch.from_numpy(pairs.view(np.int16).reshape(-1)).view(torch.bfloat16)
    expected = torch.from_numpy(values.reshape(-1)).bfloat16()
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_masked_adam_keeps_the_device_full(native):
    """Of what as many full waves could do, the rows are at least 90 %, from 9 rows a resident block on."""
    native.adam_groups.restype = ctypes.c_int64
    for num_rows in [*range(1, 30000, 7), RESIDENT * MAX_ROWS, RESIDENT * MAX_ROWS + 1, 8832, 10**6]:
        groups = native.adam_groups(*(ctypes.c_int64(number) for number in (num_rows, RESIDENT, MAX_ROWS)))
        assert 1 <= groups <= num_rows
        rows = -(-num_rows // groups)  # that the busiest group owns: they lie groups apart
        assert rows <= MAX_ROWS
        waves = -(-groups // RESIDENT)
        if num_rows >= 9 * RESIDENT:
            assert num_rows / (waves * RESIDENT * rows) >= 0.9, num_rows
