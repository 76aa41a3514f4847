"""The routing kernels' cases for the emulated device, with a numpy oracle: every move and every sum in a documented
order bit for bit, dot products against float64.

Also a program: `python gather_cases.py LIBRARY` runs every case and exits non-zero on the first difference. It needs
numpy alone, so it runs quickly under sanitizers.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
from codec_cases import from_dtype, to_dtype
from expert_calls import DTYPES, SCHEDULES, Device

ROUNDING = {"f32": 2.0**-23, "bf16": 2.0**-8, "f16": 2.0**-11}


@dataclass(frozen=True)
class Case:
    dtype: str
    weights_dtype: str | None
    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    skew: int = 0  # elements before the first: what breaks 16-byte alignment

    def __str__(self) -> str:
        sizes = f"{self.num_tokens}x{self.top_k}of{self.num_experts}x{self.hidden_size}"
        return f"{self.dtype}-{self.weights_dtype}-{sizes}@{self.skew}"


def cases() -> list[Case]:
    return [
        Case("f32", "f32", 1, 1, 1, 1),
        Case("bf16", "f32", 33, 2, 3, 64),
        Case("f16", "f16", 70, 3, 40, 24),  # more experts than lanes, and several chunks of pairs
        Case("bf16", "bf16", 150, 8, 6, 16),
        Case("f32", "bf16", 9, 8, 70, 130),  # tails
        Case("f16", None, 5, 6, 4, 67),
        Case("bf16", "f32", 4, 5, 2, 2120),  # several thread blocks along a row
        Case("f32", "f32", 6, 4, 3, 68, skew=1),
        Case("bf16", "f16", 6, 7, 3, 64, skew=3),
        Case("f32", "f32", 0, 2, 3, 8),
        Case("bf16", "f32", 3, 0, 3, 8),
        Case("f16", "f32", 3, 2, 3, 0),
    ]


def sort_oracle(index: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, source, inverse."""
    flat = index.reshape(-1)
    order = np.argsort(flat, kind="stable")
    placed = order[flat[order] < num_experts]
    source, inverse = (np.full(flat.size, -1, np.int32) for _ in range(2))
    source[: placed.size] = placed
    inverse[placed] = np.arange(placed.size)
    counts = np.bincount(flat, minlength=num_experts + 1)[:num_experts]
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32), source, inverse


def sort_chunks(num_pairs: int) -> int:
    return -(-num_pairs // max(128, -(-num_pairs // 65536) * 64))


def run_sort(device: Device, index: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_tokens, top_k = index.shape
    offsets = np.full(num_experts + 1, 77, np.int32)
    source, inverse = (np.full(index.size, 77, np.int32) for _ in range(2))
    counts = np.full(sort_chunks(index.size) * num_experts, 77, np.int32)
    sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
    outputs = {"offsets": offsets, "source": source, "inverse": inverse, "counts": counts}
    device.run("sort_by_expert", index=index.astype(np.int64), **outputs, **sizes)
    return offsets, source, inverse


def check_sort(device: Device, index: np.ndarray, num_experts: int) -> None:
    for name, got, expected in zip(
        ("offsets", "source", "inverse"), run_sort(device, index, num_experts), sort_oracle(index, num_experts)
    ):
        np.testing.assert_array_equal(got, expected, err_msg=name)


def sample_index(case: Case) -> np.ndarray:
    """int64 [num_tokens, top_k]: expert 0 gets no token where there are several, some pairs are "not here"."""
    rng = np.random.default_rng([case.num_tokens, case.top_k, case.num_experts])
    return rng.integers(min(1, case.num_experts - 1), case.num_experts + 1, (case.num_tokens, case.top_k))


def sample(case: Case, seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored, and as fp32."""
    values = np.random.default_rng([seed, case.hidden_size]).standard_normal(shape).astype(np.float32)
    values[values < -1.9] = -0.0
    stored = to_dtype(values, case.dtype)
    return stored, from_dtype(stored, case.dtype)


def sample_weights(case: Case) -> tuple[np.ndarray | None, np.ndarray]:
    shape = (case.num_tokens, case.top_k)
    if case.weights_dtype is None:
        return None, np.ones(shape, np.float32)
    stored = to_dtype(np.random.default_rng(case.top_k).random(shape, np.float32), case.weights_dtype)
    return stored, from_dtype(stored, case.weights_dtype)


def assert_same_bits(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    unit = np.uint16 if got.itemsize == 2 else np.uint32
    np.testing.assert_array_equal(got.view(unit), expected.view(unit), err_msg=what)


def weights_number(case: Case) -> int:
    return DTYPES[case.weights_dtype or "f32"]


def check_moves(device: Device, case: Case, source: np.ndarray, inverse: np.ndarray) -> None:
    num_rows, hidden = source.size, case.hidden_size
    stored, _ = sample(case, 1, case.num_tokens, hidden)
    expected = np.zeros((num_rows, hidden), stored.dtype)
    expected[source >= 0] = stored[source[source >= 0] // max(case.top_k, 1)]
    sizes = {"num_rows": num_rows, "hidden_size": hidden, "top_k": case.top_k, "dtype": DTYPES[case.dtype]}
    out = np.full_like(expected, 7)
    device.run("gather_rows", x=stored, source=source, out=out, **sizes)
    assert_same_bits(out, expected, "gathered")
    out[:] = 7
    device.run("permute_rows", x=stored, source=source, inverse=inverse, out=out, num_tokens=case.num_tokens, **sizes)
    assert_same_bits(out, expected, "permuted")


def check_combine(device: Device, case: Case, inverse: np.ndarray) -> None:
    """The sum over a token's slots, ascending, in fp32, rounded once."""
    hidden = case.hidden_size
    stored, rows = sample(case, 2, inverse.size, hidden)
    stored_weights, weights = sample_weights(case)
    total = np.zeros((case.num_tokens, hidden), np.float32)
    exact = np.zeros((case.num_tokens, hidden))
    for token, slot in np.argwhere(inverse >= 0):
        total[token] += weights[token, slot] * rows[inverse[token, slot]]
        exact[token] += weights[token, slot].astype(np.float64) * rows[inverse[token, slot]]
    out = np.full((case.num_tokens, hidden), 7, stored.dtype)
    device.run(
        "combine_rows",
        permuted=stored,
        inverse=inverse,
        weights=stored_weights,
        out=out,
        num_tokens=case.num_tokens,
        top_k=case.top_k,
        hidden_size=hidden,
        dtype=DTYPES[case.dtype],
        weights_dtype=weights_number(case),
    )
    assert_same_bits(out, to_dtype(total, case.dtype), "combined")
    np.testing.assert_allclose(from_dtype(out, case.dtype), exact, rtol=ROUNDING[case.dtype], atol=1e-5)


def check_combine_backward(device: Device, case: Case, inverse: np.ndarray) -> None:
    hidden = case.hidden_size
    stored_grad, grad = sample(case, 3, case.num_tokens, hidden)
    stored, rows = sample(case, 2, inverse.size, hidden)
    stored_weights, weights = sample_weights(case)
    if stored_weights is None:
        stored_weights = weights
    expected = np.zeros_like(stored)
    exact = np.zeros(weights.shape)
    for token, slot in np.argwhere(inverse >= 0):
        row = inverse[token, slot]
        expected[row] = to_dtype(weights[token, slot] * grad[token], case.dtype)
        exact[token, slot] = grad[token].astype(np.float64) @ rows[row].astype(np.float64)
    grad_rows, grad_weights = np.full_like(stored, 7), np.full_like(stored_weights, 7)
    device.run(
        "combine_rows_backward",
        grad_out=stored_grad,
        permuted=stored,
        inverse=inverse,
        weights=stored_weights,
        grad_permuted=grad_rows,
        grad_weights=grad_weights,
        source=np.full(inverse.size, 77, np.int32),
        num_rows=inverse.size,
        num_tokens=case.num_tokens,
        top_k=case.top_k,
        hidden_size=hidden,
        dtype=DTYPES[case.dtype],
        weights_dtype=weights_number(case),
    )
    assert_same_bits(grad_rows, expected, "grad_permuted")
    kind = case.weights_dtype or "f32"
    tolerance = 2.0**-22 * max(hidden, 1)
    np.testing.assert_allclose(from_dtype(grad_weights, kind), exact, rtol=2 * ROUNDING[kind], atol=tolerance)


def check_scatter_add(device: Device, case: Case, offsets: np.ndarray, source: np.ndarray, inverse: np.ndarray) -> None:
    """Rows added in ascending order, in fp32: in one call, in two groups, and expert by expert without `inverse`."""
    hidden, num_rows = case.hidden_size, int(offsets[-1])
    stored, rows = sample(case, 2, num_rows, hidden)
    stored_weights, weights = sample_weights(case)
    start = np.random.default_rng(8).standard_normal((case.num_tokens, hidden)).astype(np.float32)
    expected = start.copy()
    for row in range(num_rows):
        expected[source[row] // case.top_k] += weights.reshape(-1)[source[row]] * rows[row]
    distinct = all(
        np.unique(source[first:last] // max(case.top_k, 1)).size == last - first
        for first, last in itertools.pairwise(offsets)
    )
    half = num_rows // 3
    groupings = [[(0, num_rows, True)], [(0, half, True), (half, num_rows, True)]]
    if distinct:
        groupings.append([(int(first), int(last), False) for first, last in itertools.pairwise(offsets)])
    for grouping in groupings:
        out = start.copy()
        for first, last, mapped in grouping:
            device.run(
                "scatter_add_rows",
                rows=stored[first:last].copy(),
                source=source[first:last].copy(),
                inverse=inverse if mapped else None,
                weights=stored_weights,
                out=out,
                num_rows=last - first,
                first_row=first,
                hidden_size=hidden,
                top_k=case.top_k,
                dtype=DTYPES[case.dtype],
                weights_dtype=weights_number(case),
            )
        assert_same_bits(out, expected, f"added, {len(grouping)} groups")


def check_case(device: Device, case: Case) -> None:
    """All the kernels under three orders of the threads."""
    device.skew = case.skew
    index = sample_index(case)
    offsets, source, inverse = sort_oracle(index, case.num_experts)
    inverse = inverse.reshape(index.shape)
    try:
        for schedule in SCHEDULES:
            device.native.set_schedule(schedule)
            check_sort(device, index, case.num_experts)
            check_moves(device, case, source, inverse)
            check_combine(device, case, inverse)
            check_combine_backward(device, case, inverse)
            check_scatter_add(device, case, offsets, source, inverse)
    finally:
        device.native.set_schedule(0)
        device.skew = 0


if __name__ == "__main__":
    emulated = Device(sys.argv[1])
    for one in cases():
        check_case(emulated, one)
    print(f"{len(cases())} cases")
