"""Masked Adam of cuda/ and hip/, run on the CPU by the emulation: every bit equals the CPU backend's."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import usaf_ext.ops as ops
from usaf_ext import _C

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu_emulation"))
build = importlib.import_module("build_emulation")
codec = importlib.import_module("codec_cases")
adam = importlib.import_module("adam_cases")

TARGETS = {"cuda": ("adam_cuda", 32), "hip_wave32": ("adam_hip", 32), "hip_wave64": ("adam_hip", 64)}
CASE = adam.Case("nf4", "master", "f32", False, "f32", False, False, 3, 100, 0, False, 0)

on_device = pytest.mark.skipif(
    _C.GPU_BACKEND is None or not torch.cuda.is_available(), reason="needs a GPU, and a build with its kernels"
)


@pytest.fixture(scope="module", params=TARGETS)
def library(request, tmp_path_factory):
    name, wave_size = TARGETS[request.param]
    path = build.build_library(tmp_path_factory.mktemp("adam"), name, wave_size=wave_size)
    library = codec.Library(str(path))
    library.target = name, wave_size
    return library


def as_torch(name: str, array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if name in ("master", "grad") and array.dtype == np.uint16 else tensor


def as_torch_bits(tensor: torch.Tensor) -> torch.dtype:
    return torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype  # numpy has no bfloat16


def op_step(case, state, inputs, device="cpu"):
    """The state after one masked_adam_ of that device's backend."""
    tensors = {name: as_torch(name, array).to(device) for name, array in {**state, **inputs}.items()}
    apply_op(case, tensors)
    return {name: tensors[name].view(as_torch_bits(tensors[name])).cpu().numpy() for name in state}


def apply_op(case, tensors):
    options = {"format": case.format, "mode": case.mode, "stochastic": case.stochastic, "seed": 2**40 + 7}
    ops.masked_adam_(**tensors, **adam.HYPER, **options, first_element=case.first_element)


def assert_same(got, expected, message):
    for name, array in got.items():
        bits = array.reshape(-1).view(np.uint8), expected[name].reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(*bits, err_msg=f"{message} {name}")


@pytest.mark.parametrize("kind", adam.KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}-{kind[2]}")
@pytest.mark.parametrize("format", codec.FORMATS)
def test_every_bit_equals_the_cpu_backend(library, format, kind):
    for case in adam.cases(format, kind):
        state = adam.make_state(case)
        for step, left in enumerate(adam.run_case(library, case)):
            inputs = adam.make_inputs(case, step)
            assert_same(left, op_step(case, state, inputs), f"{case} step {step}")
            active = inputs.get("active", np.ones(case.rows, bool))
            np.testing.assert_array_equal(left["step"], state["step"] + active)
            state = left
        adam.check_orders(library, case)


def test_cases_reach_what_they_should():
    every = list(adam.all_cases())
    assert {(case.format, case.mode, case.exp_avg8, case.grad) for case in every} >= set(
        itertools.product(codec.FORMATS, adam.MODES, (False, True), ("f32", "bf16"))
    )
    assert {(case.rows, case.cols) for case in every} == set(adam.SHAPES)
    assert {(case.offset, case.masked) for case in every} == set(itertools.product((0, 1), (False, True)))


def test_found_inf_changes_no_bit(library):
    for exp_avg8, value in itertools.product((False, True), (1.0, np.inf, np.nan)):
        case = adam.Case("nf4", "eco", "f32", True, "f32", exp_avg8, exp_avg8, 3, 100, 0, True, 0)
        state, inputs = adam.make_state(case), adam.make_inputs(case, 0)
        inputs["found_inf"][0] = value
        left = adam.run_step(library, case, state, inputs)
        assert_same(left, state, str(case))


@pytest.mark.parametrize("mode", adam.MODES)
def test_changed_says_whether_a_bit_changed(library, mode):
    """Without gradients, moments and decay a step moves nothing; and `changed` is never cleared."""
    case = adam.Case("int8", mode, "f32", False, "f32", False, False, 3, 100, 0, False, 0)
    state, inputs = adam.make_state(case), adam.make_inputs(case, 0)
    assert adam.run_step(library, case, state, inputs)["changed"][0] == 1
    zeros = np.zeros((3, 100), np.float32)
    still = {**state, "exp_avg": zeros, "exp_avg_sq": zeros}
    if mode == "residual":
        still["residual"] = np.zeros((3, 100), np.int8)
    idle = {**inputs, "grad": zeros, "active": np.array([True, True, False])}
    once = adam.run_step(library, case, still, {**idle, "grad_scale": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(once["changed"][0], op_step(case, still, idle)["changed"][0])
    assert adam.run_step(library, case, {**state, "changed": np.ones(1, np.int32)}, idle)["changed"][0] == 1


def test_launch_goes_to_the_passed_stream(library):
    library.native.last_stream.restype = ctypes.c_void_p
    adam.run_step(library, CASE, adam.make_state(CASE), adam.make_inputs(CASE, 0))
    assert library.native.last_stream() == codec.STREAM


def test_rows_without_weights_only_count(library):
    """As on the CPU: such a row's step is made all the same. No rows: no launch."""
    case = adam.Case("nf4", "master", "f32", False, "f32", True, True, 3, 0, 0, True, 0)
    state, inputs = adam.make_state(case), adam.make_inputs(case, 0)
    assert_same(adam.run_step(library, case, state, inputs), op_step(case, state, inputs), str(case))
    before = library.native.launches()
    empty = adam.Case("nf4", "master", "f32", False, "f32", False, False, 0, 64, 0, False, 0)
    adam.run_step(library, empty, adam.make_state(empty), adam.make_inputs(empty, 0))
    assert library.native.launches() == before


def test_failed_launch_is_an_error(library):
    library.native.fail_next_launch(98)
    with pytest.raises(RuntimeError, match=r"masked_adam: (CUDA|HIP) launch failed"):
        adam.run_step(library, CASE, adam.make_state(CASE), adam.make_inputs(CASE, 0))
    library.free()


def test_unaligned_codes_are_refused(library):
    state, inputs = adam.make_state(CASE), adam.make_inputs(CASE, 0)
    pointers = {name: library.upload(array) for name, array in {**state, **inputs}.items()}
    pointers["codes"] = library.upload(state["codes"], 4)
    with pytest.raises(RuntimeError, match="codes: expected an address that is a multiple of 16"):
        library.call("masked_adam", ctypes.byref(adam.make_args(CASE, pointers)), None)
    library.free()


@pytest.mark.parametrize("library", ["cuda", "hip_wave32"], indirect=True)
def test_clean_under_sanitizers(library, tmp_path):
    """And the same bits: nothing that is read was left unset."""
    name, wave_size = library.target
    sanitized = build.build_library(tmp_path, name, sanitize=True, wave_size=wave_size)
    command = [sys.executable, adam.__file__, str(sanitized)]
    environment = build.sanitizer_environment()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == adam.digest(library)


@on_device
@pytest.mark.parametrize("kind", adam.KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}-{kind[2]}")
@pytest.mark.parametrize("format", codec.FORMATS)
def test_device_equals_the_cpu_backend(format, kind):
    for case in adam.cases(format, kind):
        state = adam.make_state(case)
        for step in range(adam.STEPS):
            inputs = adam.make_inputs(case, step)
            left = op_step(case, state, inputs, "cuda")
            assert_same(left, op_step(case, state, inputs), f"{case} step {step}")
            state = {name: array.view(state[name].dtype) for name, array in left.items()}


@on_device
def test_device_step_replays_from_a_graph():
    state, inputs = adam.make_state(CASE), adam.make_inputs(CASE, 0)
    tensors = {name: as_torch(name, array).cuda() for name, array in {**state, **inputs}.items()}
    apply_op(CASE, {name: tensor.clone() for name, tensor in tensors.items()})  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply_op(CASE, tensors)
    for _ in range(2):
        graph.replay()
        state = op_step(CASE, state, inputs)
    assert_same({name: tensors[name].cpu().numpy() for name in state}, state, "graph")
