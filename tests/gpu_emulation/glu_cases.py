"""The gated activation's cases for the emulated device, against float64.

Also a program: `python glu_cases.py LIBRARY` runs every case and exits non-zero on the first difference. It needs numpy
alone, so it runs quickly under sanitizers.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
from codec_cases import from_dtype, to_dtype
from expert_calls import DTYPES, SCHEDULES, Device

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_clamped": 2}
ROUNDING = {"f32": 2e-6, "bf16": 2.0**-8, "f16": 2.0**-10}


@dataclass(frozen=True)
class Case:
    activation: str
    dtype: str
    interleaved: bool
    num_rows: int
    width: int
    bias: bool = False
    row_weight: bool = True
    in_place: bool = False
    skew: int = 0  # elements before the first: what breaks 16-byte alignment

    def __str__(self) -> str:
        flags = "".join(name for name in ("bias", "row_weight", "in_place") if getattr(self, name))
        layout = "interleaved" if self.interleaved else "split"
        return f"{self.activation}-{self.dtype}-{layout}-{self.num_rows}x{self.width}-{flags}@{self.skew}"


def cases() -> list[Case]:
    shapes = [(3, 8), (1, 1), (9, 37), (5, 64), (2, 1100), (40, 16)]
    found = []
    kinds = itertools.product(ACTIVATIONS, DTYPES, (False, True))
    for number, ((activation, dtype, interleaved), shape) in enumerate(zip(kinds, itertools.cycle(shapes))):
        variants = [
            Case(activation, dtype, interleaved, *shape, bias=True),
            Case(activation, dtype, interleaved, *shape, in_place=True),
            Case(activation, dtype, interleaved, *shape, row_weight=False, skew=1),
        ]
        found += [variants[number % 3], variants[(number + 1) % 3]]
    return [*found, Case("silu", "f32", False, 0, 8), Case("silu", "bf16", True, 3, 0)]


def sample(case: Case, seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored, and as fp32."""
    rng = np.random.default_rng([seed, case.num_rows, case.width])
    values = (rng.standard_normal(shape) * 4).astype(np.float32)
    stored = to_dtype(values, case.dtype)
    return stored, from_dtype(stored, case.dtype)


def gated(gate: np.ndarray, up: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h and its derivatives by gate and up, in float64, from the published formulas."""
    if activation == "silu":
        s = 1 / (1 + np.exp(-gate))
        return gate * s * up, (s + gate * s * (1 - s)) * up, gate * s
    if activation == "gelu_tanh":
        z = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        value = gate / 2 * (1 + np.tanh(z))
        slope = (1 + np.tanh(z)) / 2 + gate / 2 / np.cosh(z) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * gate**2)
        return value * up, slope * up, value
    c, d = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    s = 1 / (1 + np.exp(-1.702 * c))
    d_gate = np.where(gate > 7, 0.0, (s + 1.702 * c * s * (1 - s)) * (d + 1))
    return c * s * (d + 1), d_gate, np.where(np.abs(up) > 7, 0.0, c * s)


def split(values: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    pairs = (values[..., 0::2], values[..., 1::2]) if case.interleaved else np.split(values, 2, axis=-1)
    return pairs[0], pairs[1]


def join(gate: np.ndarray, up: np.ndarray, case: Case) -> np.ndarray:
    return np.stack((gate, up), -1).reshape(len(gate), -1) if case.interleaved else np.concatenate((gate, up), -1)


def sample_bias(case: Case) -> np.ndarray | None:
    return np.random.default_rng(5).standard_normal(2 * case.width).astype(np.float32) if case.bias else None


def sample_row_weight(case: Case) -> np.ndarray | None:
    return np.random.default_rng(6).random(case.num_rows, np.float32) if case.row_weight else None


def kind_of(case: Case) -> dict[str, object]:
    return {
        "bias": sample_bias(case),
        "num_rows": case.num_rows,
        "intermediate_size": case.width,
        "interleaved": case.interleaved,
        "activation": ACTIVATIONS[case.activation],
        "dtype": DTYPES[case.dtype],
    }


def run_forward(device: Device, case: Case) -> np.ndarray:
    stored, _ = sample(case, 1, case.num_rows, 2 * case.width)
    h = np.full((case.num_rows, case.width), 7, stored.dtype)
    device.run("glu", gate_up=stored, h=h, **kind_of(case))
    return h


def run_backward(device: Device, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """grad_gate_up, weighted_h, grad_row_weight."""
    gate_up, _ = sample(case, 1, case.num_rows, 2 * case.width)
    grad_h, _ = sample(case, 2, case.num_rows, case.width)
    grad_gate_up = gate_up if case.in_place else np.full_like(gate_up, 7)
    weighted_h = grad_h if case.in_place else np.full_like(grad_h, 7)
    grad_row_weight = np.full(case.num_rows, 7, np.float32)
    device.run(
        "glu_backward",
        grad_h=grad_h,
        gate_up=gate_up,
        row_weight=sample_row_weight(case),
        grad_gate_up=grad_gate_up,
        weighted_h=weighted_h,
        grad_row_weight=grad_row_weight,
        **kind_of(case),
    )
    return grad_gate_up, weighted_h, grad_row_weight


def check_case(device: Device, case: Case) -> None:
    """Forward and backward under three orders of the threads, which must agree bit for bit."""
    device.skew = case.skew
    _, gate_up = sample(case, 1, case.num_rows, 2 * case.width)
    _, grad_h = sample(case, 2, case.num_rows, case.width)
    bias, row_weight = sample_bias(case), sample_row_weight(case)
    weight = np.ones(case.num_rows) if row_weight is None else row_weight.astype(np.float64)
    value, d_gate, d_up = gated(
        *split(gate_up.astype(np.float64) + (0 if bias is None else bias), case), case.activation
    )
    scaled = grad_h * weight[:, None]
    expected = [value, join(scaled * d_gate, scaled * d_up, case), weight[:, None] * value, (value * grad_h).sum(-1)]
    bound = 3e-6 * np.abs(value * grad_h).sum(-1).max(initial=1.0)
    try:
        results = []
        for schedule in SCHEDULES:
            device.native.set_schedule(schedule)
            results.append((run_forward(device, case), *run_backward(device, case)))
        for again in results[1:]:
            for got, first in zip(again, results[0]):
                np.testing.assert_array_equal(got, first, err_msg=f"{case}: the order of the threads shows")
        for got, want in zip(results[0][:3], expected):
            rounding = ROUNDING[case.dtype]
            np.testing.assert_allclose(from_dtype(got, case.dtype), want, rtol=rounding, atol=3e-5, err_msg=str(case))
        np.testing.assert_allclose(results[0][3], expected[3], rtol=1e-5, atol=bound, err_msg=str(case))
    finally:
        device.native.set_schedule(0)
        device.skew = 0


if __name__ == "__main__":
    emulated = Device(sys.argv[1])
    for one in cases():
        check_case(emulated, one)
    print(f"{len(cases())} cases")
