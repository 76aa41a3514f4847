"""Cases of the neurons' gradients, importance, sums of squares and the routers' noise for the emulated device.

Sums over tokens are bit for bit those of an fp32 sum in ascending order; what is reduced further is against float64.
Also a program: `python row_gradient_cases.py LIBRARY` runs every case and exits non-zero on the first difference. It
needs numpy alone, so it runs quickly under sanitizers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from codec_cases import from_dtype, to_dtype
from expert_calls import DTYPES, SCHEDULES, Device


@dataclass(frozen=True)
class Case:
    dtype: str
    grad_dtype: str
    tokens: tuple[int, ...]  # of each expert
    hidden_size: int
    width: int
    neurons: int  # trained, of each expert but the last, which has none
    first_expert: int = 0
    skew: int = 0  # elements before the first: what breaks 16-byte alignment

    def __str__(self) -> str:
        tokens = "_".join(map(str, self.tokens))
        sizes = f"{self.hidden_size}x{self.width}-{self.neurons}of{self.first_expert}"
        return f"{self.dtype}-{self.grad_dtype}-{tokens}-{sizes}@{self.skew}"


def cases() -> list[Case]:
    return [
        Case("f32", "f32", (3, 0, 1, 2), 1, 3, 2),
        Case("bf16", "f32", (5, 70, 0, 9), 64, 20, 17),  # several groups of neurons, several tiles of tokens
        Case("f16", "bf16", (33, 2), 77, 9, 5, first_expert=3),
        Case("bf16", "bf16", (4, 6, 3), 1096, 5, 3),  # two stretches of columns
        Case("f32", "bf16", (2, 5, 64, 1), 516, 6, 6),
        Case("f16", "f32", (6, 1, 32), 40, 11, 9, skew=1),
        Case("bf16", "f32", (0, 0), 8, 4, 2),
        Case("f32", "f32", (2, 3), 8, 4, 0),
        Case("bf16", "f32", (3, 2), 24, 4, 4, first_expert=70_000),
    ]


def sample(case: Case, seed: int, dtype: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored, and as fp32."""
    values = np.random.default_rng([seed, case.hidden_size, case.width]).standard_normal(shape).astype(np.float32)
    stored = to_dtype(values, dtype)
    return stored, from_dtype(stored, dtype)


class Operands:
    """The activations of a case, as stored and as fp32."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rows, hidden, width = sum(case.tokens), case.hidden_size, case.width
        self.x, self.x32 = sample(case, 1, case.dtype, rows, hidden)
        self.grad_out, self.grad_out32 = sample(case, 2, case.dtype, rows, hidden)
        self.grad_gate_up, self.grad_gate_up32 = sample(case, 3, case.dtype, rows, 2 * width)
        self.weighted_h, self.weighted_h32 = sample(case, 4, case.dtype, rows, width)
        start = 11  # offsets of a later part of a batch: the first is subtracted
        self.offsets = (start + np.cumsum((0, *case.tokens))).astype(np.int32)

    def fields(self) -> dict[str, object]:
        return {
            "x": self.x,
            "grad_out": self.grad_out,
            "grad_gate_up": self.grad_gate_up,
            "weighted_h": self.weighted_h,
            "offsets": self.offsets,
            "num_experts": len(self.case.tokens),
            "hidden_size": self.case.hidden_size,
            "intermediate_size": self.case.width,
            "dtype": DTYPES[self.case.dtype],
        }

    def gradients(self, expert: int, kind: type) -> np.ndarray:
        """[width, 3, hidden] of one expert, summed over its tokens in ascending order in `kind`."""
        case = self.case
        total = np.zeros((case.width, 3, case.hidden_size), kind)
        for token in range(*(self.offsets[expert : expert + 2] - self.offsets[0])):
            x, grad_out = self.x32[token].astype(kind), self.grad_out32[token].astype(kind)
            gate, up = np.split(self.grad_gate_up32[token].astype(kind), 2)
            total[:, 0] += gate[:, None] * x
            total[:, 1] += up[:, None] * x
            total[:, 2] += self.weighted_h32[token].astype(kind)[:, None] * grad_out
        return total


def sample_neurons(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """neuron_expert and neuron_index, with neurons of experts before and after those of the call."""
    rng = np.random.default_rng(case.width)
    experts, indices = [], []
    low, high = case.first_expert, case.first_expert + len(case.tokens)
    for expert in (low - 1, *range(low, high - 1), high, high + 1):
        if expert < 0:
            continue
        chosen = rng.choice(case.width, case.neurons, replace=False)
        experts += [expert] * len(chosen)
        indices += sorted(chosen)
    return np.array(experts, np.int32), np.array(indices, np.int32)


def run_gradient(device: Device, case: Case, operands: Operands, grad: np.ndarray) -> None:
    neuron_expert, neuron_index = sample_neurons(case)
    device.run(
        "row_gradient",
        neuron_expert=neuron_expert,
        neuron_index=neuron_index,
        grad=grad,
        num_neurons=len(neuron_expert),
        first_expert=case.first_expert,
        grad_dtype=DTYPES[case.grad_dtype],
        **operands.fields(),
    )


def check_gradient(device: Device, case: Case, operands: Operands) -> None:
    neuron_expert, neuron_index = sample_neurons(case)
    stored, start = sample(case, 5, case.grad_dtype, len(neuron_expert), 3, case.hidden_size)
    expected = stored.copy()
    for number, (expert, index) in enumerate(zip(neuron_expert - case.first_expert, neuron_index)):
        if 0 <= expert < len(case.tokens) and case.tokens[expert] > 0:
            total = start[number] + operands.gradients(expert, np.float32)[index]
            expected[number] = to_dtype(total, case.grad_dtype)
            exact = start[number] + operands.gradients(expert, np.float64)[index]
            np.testing.assert_allclose(from_dtype(expected[number], case.grad_dtype), exact, rtol=2.0**-8, atol=1e-4)
    grad = stored.copy()
    run_gradient(device, case, operands, grad)
    np.testing.assert_array_equal(grad, expected, err_msg=f"{case}: grad")


def run_importance(device: Device, operands: Operands, weights: np.ndarray | None, importance: np.ndarray) -> None:
    device.run("row_importance", weights=weights, importance=importance, **operands.fields())


def check_importance(device: Device, case: Case, operands: Operands) -> None:
    experts, width = len(case.tokens), case.width
    start = np.random.default_rng(9).random((experts, width), np.float32)
    weights, weights32 = sample(case, 6, case.dtype, experts, 3, width, case.hidden_size)
    for given in (None, weights):
        expected = start.astype(np.float64)
        for expert in range(experts):
            gradient = operands.gradients(expert, np.float64)
            weighted = gradient * weights32[expert].transpose(1, 0, 2)
            expected[expert] += ((gradient**2) if given is None else np.abs(weighted)).sum((1, 2))
        got = start.copy()
        run_importance(device, operands, given, got)
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=f"{case}: importance")


def check_squares(device: Device, case: Case) -> None:
    stored, rows = sample(case, 7, case.dtype, 9, case.hidden_size)
    squares = np.full(9, 7.0)
    device.run(
        "squares_of_rows", rows=stored, squares=squares, num_rows=9, cols=case.hidden_size, dtype=DTYPES[case.dtype]
    )
    np.testing.assert_allclose(squares, (rows.astype(np.float64) ** 2).sum(-1), rtol=1e-13, err_msg=f"{case}: squares")


def check_case(device: Device, case: Case) -> None:
    """All the kernels under three orders of the threads."""
    device.skew = case.skew
    operands = Operands(case)
    try:
        for schedule in SCHEDULES:
            device.native.set_schedule(schedule)
            check_gradient(device, case, operands)
            check_importance(device, case, operands)
            check_squares(device, case)
    finally:
        device.native.set_schedule(0)
        device.skew = 0


def run_uniform(device: Device, num_tokens: int, num_experts: int, seed: int, step: int, micro_batch: int, layer: int):
    out = np.full((num_tokens, num_experts), 7, np.float32)
    counters = {"seed": seed, "step": step, "micro_batch": micro_batch, "layer": layer}
    device.run("router_uniform", out=out, num_tokens=num_tokens, num_experts=num_experts, **counters)
    return out


if __name__ == "__main__":
    emulated = Device(sys.argv[1])
    for one in cases():
        check_case(emulated, one)
    run_uniform(emulated, 5, 7, 1, 2, 3, 4)
    print(f"{len(cases())} cases")
