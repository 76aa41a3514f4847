"""Cases of the kernels that read optimizer state, residuals and 8-bit moments, for the emulated device, against
float64.

Also a program: `python state_cases.py LIBRARY` runs every case and exits non-zero on the first difference. It needs
numpy alone, so it runs quickly under sanitizers.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
from codec_cases import FORMATS, FP8, NF4, decode_oracle, encode_oracle, steps
from expert_calls import SCHEDULES, Device

# Single weights, short blocks of 64 and of 256, several thread blocks along a row, more rows than one grid takes.
SHAPES = [(1, 1), (3, 2), (5, 63), (2, 64), (9, 129), (3, 516), (2, 1028), (1, 2055), (200, 30), (0, 64), (3, 0)]


@dataclass(frozen=True)
class Case:
    kind: str  # a format, or the moments "signed" and "unsigned"
    rows: int
    cols: int
    skew: int  # elements before the first: what breaks alignment

    def __str__(self) -> str:
        return f"{self.kind}-{self.rows}x{self.cols}@{self.skew}"


def cases(kind: str) -> list[Case]:
    return [Case(kind, *shape, skew) for shape, skew in itertools.product(SHAPES, (0, 1))]


RESIDUAL_CASES = [case for format in FORMATS for case in cases(format)]
MOMENT_CASES = [case for kind in ("signed", "unsigned") for case in cases(kind)]


def unit_oracle(codes: np.ndarray, absmax: np.ndarray, cols: int, format: str) -> np.ndarray:
    """float64 [rows, cols]: half the way to the farther neighbour among the format's values, over 127."""
    if format == "bf16":
        bits = np.ascontiguousarray(codes[:, : 2 * cols]).view(np.uint16)
        return 2.0 ** (np.maximum(bits >> 7 & 0xFF, 32).astype(np.float64) - 127 - 8) / 127
    step = np.repeat(steps(absmax, format).astype(np.float64), 64, axis=1)[:, :cols]
    if format == "int8":
        gap = np.full(step.shape, 0.5)
    else:
        table = NF4.astype(np.float64) if format.startswith("nf4") else FP8
        between = np.diff(table)
        half = np.maximum(np.append(between, 0), np.append(0, between)) / 2
        if format == "fp8":  # the upper neighbour's distance, also of the largest code
            half[8:] = np.exp2(np.arange(8, 127) // 8 - 7 - 4.0)
            gap = half[codes[:, :cols] & 127]
        else:
            nibbles = np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), 2 * codes.shape[1])
            gap = half[nibbles[:, :cols]]
    return np.maximum(gap * step / 127, np.float64(np.float32(1e-38)))


def sample_codes(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of weights with a row of zeros and one of subnormals."""
    rng = np.random.default_rng([case.rows, case.cols])
    weight = (rng.standard_normal((case.rows, case.cols)) * 10.0 ** rng.integers(-3, 3, (case.rows, 1))).astype("f4")
    if case.rows > 2:
        weight[0] = 0
        weight[2] *= np.float32(1e-38)
    return encode_oracle(weight, case.kind)


def residual_fields(case: Case, codes: np.ndarray, absmax: np.ndarray) -> dict[str, object]:
    fields: dict[str, object] = {"codes": codes, "absmax": absmax, "format": FORMATS[case.kind]}
    return {**fields, "num_rows": case.rows, "cols": case.cols}


def run_decode(device: Device, case: Case, codes: np.ndarray, absmax: np.ndarray, residual: np.ndarray) -> np.ndarray:
    weight = np.full(residual.shape, 7, np.float32)
    device.run("decode_residual", residual=residual, weight=weight, **residual_fields(case, codes, absmax))
    return weight


def run_encode(device: Device, case: Case, codes: np.ndarray, absmax: np.ndarray, weight: np.ndarray) -> np.ndarray:
    residual = np.full(weight.shape, 7, np.int8)
    device.run("encode_residual", residual=residual, weight=weight, **residual_fields(case, codes, absmax))
    return residual


def sample_residual(case: Case) -> np.ndarray:
    return np.random.default_rng(3).integers(-127, 128, (case.rows, case.cols), np.int8)


def weights_around(case: Case, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """fp32 weights at -150 to 150 units from what the codes stand for; in large tensors a NaN and infinities too."""
    value = decode_oracle(codes, absmax, case.cols, case.kind)
    unit = unit_oracle(codes, absmax, case.cols, case.kind)
    weight = (value + np.random.default_rng(4).uniform(-150, 150, value.shape) * unit).astype(np.float32)
    if weight.size > 8:
        weight.flat[[1, 3, 5]] = np.nan, np.inf, -np.inf
    return weight


def in_every_order(device: Device, run):
    """The result of run(), the same for three orders of the threads."""
    try:
        first = run()
        for schedule in SCHEDULES[1:]:
            device.native.set_schedule(schedule)
            np.testing.assert_array_equal(run(), first, err_msg="the order of the threads shows")
        return first
    finally:
        device.native.set_schedule(0)


def check_residual(device: Device, case: Case) -> None:
    """Decode within two roundings of float64; encode to the nearest unit, at most 127 of them."""
    device.skew, device.aligned = case.skew, frozenset({"codes"})
    try:
        codes, absmax = sample_codes(case)
        value = decode_oracle(codes, absmax, case.cols, case.kind)
        unit = unit_oracle(codes, absmax, case.cols, case.kind)
        residual = sample_residual(case)
        got = in_every_order(device, lambda: run_decode(device, case, codes, absmax, residual))
        bound = (np.abs(value) + np.abs(residual * unit)) * 2.0**-22 + 2.0**-148
        assert (np.abs(got - (value + residual * unit)) <= bound).all(), f"{case} decode"

        weight = weights_around(case, codes, absmax)
        got = in_every_order(device, lambda: run_encode(device, case, codes, absmax, weight))
        exact = np.clip((weight - value) / unit, -127, 127)
        exact[np.isnan(exact)] = -127
        assert (np.abs(got - exact) <= 0.51).all(), f"{case} encode"
    finally:
        device.skew, device.aligned = 0, frozenset()


def moment_map(is_signed: bool) -> np.ndarray:
    """float64 [256], from the paper's description of the map (arXiv 2110.02861)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, (2**decade if is_signed else 2 ** (decade + 1)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *(-middles if is_signed else ())]
    return np.sort(values)


def sample_moments(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([case.rows, case.cols])
    codes = rng.integers(0, 256, (case.rows, case.cols), np.uint8)
    return codes, rng.random((case.rows, -(-case.cols // 256)), np.float32)


def run_moments(device: Device, case: Case) -> np.ndarray:
    codes, absmax = sample_moments(case)
    out = np.full(codes.shape, 7, np.float32)
    sizes = {"num_rows": case.rows, "cols": case.cols, "is_signed": case.kind == "signed"}
    device.run("decode_moments8", codes=codes, absmax=absmax, out=out, **sizes)
    return out


def check_moments(device: Device, case: Case) -> None:
    device.skew = case.skew
    try:
        got = in_every_order(device, lambda: run_moments(device, case))
        codes, absmax = sample_moments(case)
        exact = moment_map(case.kind == "signed")[codes] * np.repeat(absmax.astype(np.float64), 256, 1)[:, : case.cols]
        np.testing.assert_allclose(got, exact, rtol=1e-6, atol=0, err_msg=str(case))
    finally:
        device.skew = 0


if __name__ == "__main__":
    emulated = Device(sys.argv[1])
    for one in RESIDUAL_CASES:
        check_residual(emulated, one)
    for one in MOMENT_CASES:
        check_moments(emulated, one)
    print(f"{len(RESIDUAL_CASES) + len(MOMENT_CASES)} cases")
