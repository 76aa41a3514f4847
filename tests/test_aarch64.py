"""The CPU kernels on another processor: cross-compiled for aarch64 and run under qemu-user, they give the same bits.
(glu to rounding: its exponential is the C library's.)"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import torch
from kernel_calls import REPO, run_call
from usaf_ext import _C, ops

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DTYPES = {"f32": (0, torch.float32), "bf16": (1, torch.bfloat16), "f16": (2, torch.float16)}
FORMAT_IDS = {name: number for number, name in enumerate(_C.FORMATS)}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run(launcher, **fields): one kernel launch on the emulated processor; arrays are updated in place."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        if os.environ.get("USAF_REQUIRE_COMPILERS"):
            pytest.fail(f"{', '.join(missing)}: not installed")
        pytest.skip(f"{', '.join(missing)}: not installed")
    folder = tmp_path_factory.mktemp("aarch64")
    runner = folder / "op_runner"
    sources = [pathlib.Path(__file__).parent / "aarch64/op_runner.cpp"]
    # The pager and its device too: they must compile there.
    sources += sorted((REPO / "cpp/cpu").glob("*.cpp")) + sorted((REPO / "cpp/memory").glob("*.cpp"))
    command = [COMPILER, "-std=c++20", "-O2", "-ffp-contract=off", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-static"]
    command += [f"-I{REPO / 'cpp'}", *map(str, sources), "-o", str(runner)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return lambda launcher, **fields: run_call([EMULATOR, str(runner)], folder / "call", launcher, **fields)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """A copy of the tensor's memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def _assert_same_bits(got: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_array_equal(got.reshape(-1).view(np.uint8), _bytes(expected))


@pytest.mark.parametrize("cols", [1, 64, 97, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", _C.FORMATS)
def test_codec(run, format, dtype, cols):
    number, torch_dtype = DTYPES[dtype]
    weight = torch.randn(5, cols).to(torch_dtype)
    codes, absmax = ops.quantize_blocks(weight, format)
    got_codes, got_absmax = np.full(codes.nbytes, 0xAA, np.uint8), np.full(absmax.nbytes, 0xAA, np.uint8)
    common = {"num_rows": 5, "cols": cols, "format": FORMAT_IDS[format], "row_index": None}
    run(
        "encode_rows",
        weight=_bytes(weight),
        codes=got_codes,
        absmax=got_absmax,
        weight_stride=cols,
        weight_dtype=number,
        **common,
    )
    _assert_same_bits(got_codes, codes)
    _assert_same_bits(got_absmax, absmax)
    out = np.zeros(weight.nbytes, np.uint8)
    run(
        "decode_rows",
        codes=got_codes,
        absmax=got_absmax,
        out=out,
        out_index=None,
        out_stride=cols,
        out_dtype=number,
        **common,
    )
    _assert_same_bits(out, ops.dequantize_blocks(codes, absmax, cols, format, dtype=torch_dtype))


@pytest.fixture
def routing(run):
    """A routing with empty experts and "not here" slots, sorted on the emulated processor."""
    num_tokens, top_k, num_experts = 19, 3, 7
    index = torch.randint(0, num_experts + 1, (num_tokens, top_k))
    index[index == 2] = num_experts  # expert 2 has no tokens
    offsets, source = np.zeros(num_experts + 1, np.int32), np.zeros(index.numel(), np.int32)
    inverse = np.zeros(index.numel(), np.int32)
    sizes = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
    run("sort_by_expert", index=index.numpy(), offsets=offsets, source=source, inverse=inverse, counts=None, **sizes)
    return index, offsets, source, inverse


@pytest.mark.parametrize("hidden_size", [1, 64, 131])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_combine(run, routing, dtype, hidden_size):
    index, offsets, source, inverse = routing
    number, torch_dtype = DTYPES[dtype]
    num_tokens, top_k = index.shape
    x = torch.randn(num_tokens, hidden_size).to(torch_dtype)
    permuted, expected_offsets, expected_inverse = ops.expert_gather(x, index, len(offsets) - 1)
    _assert_same_bits(offsets, expected_offsets)
    _assert_same_bits(inverse, expected_inverse)
    rows = np.zeros(permuted.nbytes, np.uint8)
    sizes = {"hidden_size": hidden_size, "top_k": top_k, "dtype": number}
    run("gather_rows", x=_bytes(x), source=source, out=rows, num_rows=index.numel(), **sizes)
    _assert_same_bits(rows, permuted)

    weights = torch.rand(num_tokens, top_k)
    out = np.zeros(x.nbytes, np.uint8)
    pairs = {"inverse": inverse, "weights": _bytes(weights), "num_tokens": num_tokens, "weights_dtype": 0, **sizes}
    run("combine_rows", permuted=rows, out=out, **pairs)
    _assert_same_bits(out, ops.expert_scatter(permuted, expected_inverse, weights))

    grad_out = torch.randn_like(x)
    grad_rows, grad_weights = np.zeros(permuted.nbytes, np.uint8), np.zeros(weights.nbytes, np.uint8)
    run(
        "combine_rows_backward",
        grad_out=_bytes(grad_out),
        permuted=rows,
        grad_permuted=grad_rows,
        grad_weights=grad_weights,
        source=None,
        num_rows=index.numel(),
        **pairs,
    )
    expected = torch.ops.usaf.expert_scatter_backward(grad_out, permuted, expected_inverse, weights)
    _assert_same_bits(grad_rows, expected[0])
    _assert_same_bits(grad_weights, expected[1])


@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_glu(run, dtype, activation):
    number, torch_dtype = DTYPES[dtype]
    name = ("silu", "gelu_tanh", "swiglu_clamped")[activation]
    rows, width = 5, 37
    gate_up = torch.randn(rows, 2 * width).mul(3).to(torch_dtype)
    grad_h, row_weight = torch.randn(rows, width).to(torch_dtype), torch.rand(rows)
    h = np.zeros(grad_h.nbytes, np.uint8)
    common = {"num_rows": rows, "intermediate_size": width, "interleaved": False, "dtype": number, "bias": None}
    run("glu", gate_up=_bytes(gate_up), h=h, activation=activation, **common)
    outputs = {
        "grad_gate_up": np.zeros(gate_up.nbytes, np.uint8),
        "weighted_h": np.zeros(grad_h.nbytes, np.uint8),
        "grad_row_weight": np.zeros(row_weight.nbytes, np.uint8),
    }
    run(
        "glu_backward",
        grad_h=_bytes(grad_h),
        gate_up=_bytes(gate_up),
        row_weight=_bytes(row_weight),
        activation=activation,
        **outputs,
        **common,
    )
    expected = [ops.glu(gate_up, name), *ops.glu_backward(grad_h, gate_up, name, row_weight=row_weight)]
    tolerance = {"f32": 1e-5, "bf16": 2**-7, "f16": 2**-10}[dtype]
    for got, want in zip((h, *outputs.values()), expected):
        value = torch.from_numpy(got).view(want.dtype).view_as(want)
        torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hidden_size", [64, 131])
@pytest.mark.parametrize("grad_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_gradient_and_importance(run, dtype, grad_dtype, hidden_size):
    number, torch_dtype = DTYPES[dtype]
    grad_number, torch_grad_dtype = DTYPES[grad_dtype]
    num_experts, width = 3, 21
    offsets = torch.tensor([0, 9, 9, 14], dtype=torch.int32)  # expert 1 is empty
    rows = int(offsets[-1])
    x, grad_out = (torch.randn(rows, hidden_size).to(torch_dtype) for _ in range(2))
    grad_gate_up, weighted_h = (torch.randn(rows, cols).to(torch_dtype) for cols in (2 * width, width))
    neuron_expert = torch.tensor([0, 0, 1, 2, 2], dtype=torch.int32)
    neuron_index = torch.tensor([3, 20, 7, 0, 19], dtype=torch.int32)
    activations = {
        "x": _bytes(x),
        "grad_out": _bytes(grad_out),
        "grad_gate_up": _bytes(grad_gate_up),
        "weighted_h": _bytes(weighted_h),
        "offsets": _bytes(offsets),
    }
    sizes = {
        "num_experts": num_experts,
        "hidden_size": hidden_size,
        "intermediate_size": width,
        "dtype": number,
    }
    grad = torch.randn(len(neuron_expert), 3, hidden_size).to(torch_grad_dtype)
    got = _bytes(grad)
    run(
        "row_gradient",
        neuron_expert=_bytes(neuron_expert),
        neuron_index=_bytes(neuron_index),
        grad=got,
        num_neurons=len(neuron_expert),
        first_expert=0,
        grad_dtype=grad_number,
        **activations,
        **sizes,
    )
    ops.row_gradient_(grad, x, grad_out, grad_gate_up, weighted_h, offsets, neuron_expert, neuron_index)
    _assert_same_bits(got, grad)

    importance = torch.rand(num_experts, width)
    got = _bytes(importance)
    run("row_importance", importance=got, weights=None, **activations, **sizes)
    _C.limit_isa("plain")  # the kernel, not the GEMMs that bf16 takes where the CPU has them
    ops.row_importance_(importance, x, grad_out, grad_gate_up, weighted_h, offsets)
    _C.limit_isa(_C.detected_isa())
    _assert_same_bits(got, importance)


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("mode", ["master", "in_place", "residual", "eco"])
@pytest.mark.parametrize("format", _C.FORMATS)
def test_masked_adam(run, format, mode, moments):
    if format == "bf16" and mode == "residual":
        pytest.skip("residual needs a block format")
    rows, cols = 4, 331
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    weight = torch.randn(rows, cols).mul(0.02).bfloat16()
    codes, absmax = ops.quantize_blocks(weight, format)
    if moments == "8bit":
        exp_avg, exp_avg_absmax = ops.empty_moments8((rows, cols))
        exp_avg_sq, exp_avg_sq_absmax = ops.empty_moments8((rows, cols))
    else:
        exp_avg, exp_avg_sq = torch.zeros(rows, cols), torch.zeros(rows, cols)
        exp_avg_absmax = exp_avg_sq_absmax = None
    tensors = {
        "codes": codes,
        "absmax": absmax,
        "master": weight.clone() if mode == "master" else None,
        "residual": torch.zeros(rows, cols, dtype=torch.int8) if mode == "residual" else None,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "exp_avg_absmax": exp_avg_absmax,
        "exp_avg_sq_absmax": exp_avg_sq_absmax,
        "step": torch.zeros(rows, dtype=torch.int32),
    }
    active = torch.tensor([True, True, False, True])
    arrays = {name: None if tensor is None else _bytes(tensor) for name, tensor in tensors.items()}
    for _ in range(3):
        grad = torch.randn(rows, cols).mul(0.01)
        run(
            "masked_adam",
            grad=_bytes(grad),
            active=_bytes(active),
            grad_scale=None,
            found_inf=None,
            changed=None,
            num_rows=rows,
            cols=cols,
            seed=11,
            first_element=7,
            format=FORMAT_IDS[format],
            mode=["master", "in_place", "residual", "eco"].index(mode),
            master_dtype=1,
            grad_dtype=0,
            stochastic=True,
            **hyper,
            **arrays,
        )
        ops.masked_adam_(
            **tensors, grad=grad, active=active, format=format, mode=mode, seed=11, first_element=7, **hyper
        )
    for name, array in arrays.items():
        if array is not None:
            _assert_same_bits(array, tensors[name])


def test_moments_squares_and_noise(run):
    codes = torch.randint(0, 256, (3, 300), dtype=torch.uint8)
    absmax = torch.rand(3, 2)
    for signed in (True, False):
        out = np.zeros(codes.numel() * 4, np.uint8)
        arrays = {"codes": _bytes(codes), "absmax": _bytes(absmax), "out": out}
        run("decode_moments8", num_rows=3, cols=300, is_signed=signed, **arrays)
        _assert_same_bits(out, ops.dequantize_moments8(codes, absmax, signed))

    rows = torch.randn(3, 101)
    squares = np.zeros(3 * 8, np.uint8)
    run("squares_of_rows", rows=_bytes(rows), squares=squares, num_rows=3, cols=101, dtype=0)
    torch.testing.assert_close(torch.from_numpy(squares).view(torch.float64), rows.double().square().sum(1))

    noise = torch.empty(5, 7)
    got, key = _bytes(noise), {"seed": 3, "step": 2, "micro_batch": 1, "layer": 4}
    run("router_uniform", out=got, num_tokens=5, num_experts=7, **key)
    ops.router_uniform_(noise, **key)
    _assert_same_bits(got, noise)
