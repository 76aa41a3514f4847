"""Masked Adam's cases for the emulated kernels, and a runner.

Also a program: `python adam_cases.py LIBRARY` runs every case and prints one digest of what all of them left. It needs
numpy alone, so it runs quickly under sanitizers.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import codec_cases as codec
from kernel_calls import STRUCTS

MODES = {"master": 0, "in_place": 1, "residual": 2, "eco": 3}
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 2
# Single weights, short blocks and short chunks of 256, several chunks, more rows than one thread block owns.
SHAPES = [(1, 1), (3, 2), (5, 63), (2, 64), (4, 65), (3, 100), (2, 255), (3, 257), (9, 129), (3, 516), (2, 1028)]
SHAPES += [(1, 2055), (70, 30)]

State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    format: str
    mode: str
    dtype: str  # of the master
    stochastic: bool
    grad: str
    exp_avg8: bool
    exp_avg_sq8: bool
    rows: int
    cols: int
    offset: int  # elements before the first of each array: what breaks alignment
    masked: bool  # some rows are not active, and gradients have a scale
    first_element: int

    def __str__(self) -> str:
        bits = f"{8 if self.exp_avg8 else 32}-{8 if self.exp_avg_sq8 else 32}"
        rounding = "stochastic" if self.stochastic else "nearest"
        return f"{self.format}-{self.mode}-{self.dtype}-{rounding}-{self.grad}-{bits}-{self.rows}x{self.cols}"


# (mode, dtype of the master, stochastic)
KINDS = [("master", "f32", True), ("master", "bf16", False), ("residual", "f32", True)]
KINDS += [(mode, "f32", stochastic) for mode in ("in_place", "eco") for stochastic in (True, False)]


def cases(format: str, kind: tuple[str, str, bool]) -> Iterator[Case]:
    """Every type of gradient and moment, on shapes, alignments and options that change from case to case."""
    number = 8 * (KINDS.index(kind) + len(KINDS) * list(codec.FORMATS).index(format))
    for grad, exp_avg8, exp_avg_sq8 in itertools.product(("f32", "bf16"), (False, True), (False, True)):
        rows, cols = SHAPES[number % len(SHAPES)]
        offset, first = (0, 1)[number % 5 == 0], (0, 64, 3, 2**33 + 1, 2**33 + 2)[number % 5]
        yield Case(format, *kind, grad, exp_avg8, exp_avg_sq8, rows, cols, offset, number % 3 == 1, first)
        number += 1


def make_state(case: Case) -> State:
    """What a row may hold: a row of zeros and one of all subnormals among them."""
    rng = np.random.default_rng([case.rows, case.cols, codec.FORMATS[case.format], MODES[case.mode]])
    shape, blocks = (case.rows, case.cols), (case.rows, -(-case.cols // 256))
    weight = (rng.standard_normal(shape) * 0.02).astype(np.float32)
    exp_avg = (rng.standard_normal(shape) * 1e-3).astype(np.float32)
    exp_avg_sq = (rng.standard_normal(shape) ** 2 * 1e-6).astype(np.float32)
    if case.rows > 2:
        weight[0], exp_avg[0], exp_avg_sq[0] = 0, 0, 0
        weight[2] *= np.float32(1e-37)
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    state["codes"], state["absmax"] = codec.encode_oracle(weight, case.format)
    for name, is_8bit, size in (("exp_avg", case.exp_avg8, 1e-2), ("exp_avg_sq", case.exp_avg_sq8, 1e-4)):
        if is_8bit:
            state[name] = rng.integers(0, 256, shape, np.uint8)
            state[f"{name}_absmax"] = (rng.random(blocks) * size).astype(np.float32)
    if case.mode == "master":
        state["master"] = codec.to_dtype(weight, case.dtype)
    if case.mode == "residual":
        state["residual"] = rng.integers(-127, 128, shape, np.int8)
    state["step"] = rng.choice(np.array([0, 1, 9, 1000, 123456], np.int32), case.rows)
    state["changed"] = np.zeros(1, np.int32)
    return state


def make_inputs(case: Case, step: int) -> State:
    rng = np.random.default_rng([case.rows, case.cols, step])
    grad = (rng.standard_normal((case.rows, case.cols)) * 10.0 ** rng.integers(-4, 1, (case.rows, 1))).astype(
        np.float32
    )
    if case.rows > 2:
        grad[0] = 0
    inputs = {"grad": codec.to_dtype(grad, case.grad), "found_inf": np.zeros(1, np.float32)}
    if case.masked:
        inputs["active"] = rng.random(case.rows) < 0.6
        inputs["grad_scale"] = np.array([0.125], np.float32)
    return inputs


def make_args(case: Case, pointers: dict[str, ctypes.c_void_p]) -> ctypes.Structure:
    args = STRUCTS["MaskedAdamArgs"]()
    for name, pointer in pointers.items():
        setattr(args, name, pointer)
    for name, value in HYPER.items():
        setattr(args, name, value)
    args.num_rows, args.cols, args.seed, args.first_element = case.rows, case.cols, 2**40 + 7, case.first_element
    args.format, args.mode, args.stochastic = codec.FORMATS[case.format], MODES[case.mode], case.stochastic
    args.master_dtype, args.grad_dtype = codec.DTYPES[case.dtype], codec.DTYPES[case.grad]
    return args


def run_step(library: codec.Library, case: Case, state: State, inputs: State) -> State:
    """The state that one launch leaves."""
    library.native.masked_adam_args_size.restype = ctypes.c_size_t
    assert library.native.masked_adam_args_size() == ctypes.sizeof(STRUCTS["MaskedAdamArgs"])
    pointers = {}
    for name, array in {**state, **inputs}.items():
        aligned = name in ("codes", "step", "changed")
        pointers[name] = library.upload(array, 0 if aligned else case.offset * array.itemsize)
    library.call("masked_adam", ctypes.byref(make_args(case, pointers)), ctypes.c_void_p(codec.STREAM))
    left = {name: library.download(pointers[name], array) for name, array in state.items()}
    library.free()
    return left


def run_case(library: codec.Library, case: Case) -> list[State]:
    """The states after each of STEPS steps."""
    states = [make_state(case)]
    for step in range(STEPS):
        states.append(run_step(library, case, states[-1], make_inputs(case, step)))
    return states[1:]


def check_orders(library: codec.Library, case: Case) -> None:
    """The first step leaves the same bits in three orders of the threads."""
    state, inputs = make_state(case), make_inputs(case, 0)
    first = run_step(library, case, state, inputs)
    try:
        for schedule in (9, codec.WHOLE_WARPS):
            library.native.set_schedule(schedule)
            for name, value in run_step(library, case, state, inputs).items():
                np.testing.assert_array_equal(value, first[name], err_msg=f"{case} {name}, schedule {schedule}")
    finally:
        library.native.set_schedule(0)


def all_cases() -> Iterator[Case]:
    for format, kind in itertools.product(codec.FORMATS, KINDS):
        yield from cases(format, kind)


def digest(library: codec.Library) -> str:
    """Of every bit that every case leaves."""
    total = hashlib.sha256()
    for case in all_cases():
        for state in run_case(library, case):
            for name in sorted(state):
                total.update(state[name].tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    print(digest(codec.Library(sys.argv[1])))
