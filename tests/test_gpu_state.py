"""Residuals and 8-bit moments on cuda/ and hip/, run on the CPU: against float64 and, bit for bit, the CPU backend."""

from __future__ import annotations

import importlib
import pathlib
import sys

import numpy as np
import pytest
import torch
from usaf_ext import ops

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu_emulation"))
codec = importlib.import_module("codec_cases")
state = importlib.import_module("state_cases")
targets = importlib.import_module("expert_targets")

FORMATS = list(state.FORMATS)


@pytest.fixture(scope="module", params=targets.TARGETS)
def device(request):
    return targets.device(request.param)


def tensors(*arrays):
    return [torch.from_numpy(array.copy()) for array in arrays]


@pytest.mark.parametrize("format", FORMATS)
def test_residual_equals_oracle(device, format):
    for case in state.cases(format):
        state.check_residual(device, case)


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_moments_equal_oracle(device, kind):
    for case in state.cases(kind):
        state.check_moments(device, case)


@pytest.mark.parametrize("format", FORMATS)
def test_residual_equals_cpu_backend(device, format):
    for case in state.cases(format)[::2]:
        codes, absmax = state.sample_codes(case)
        residual = state.sample_residual(case)
        got = torch.from_numpy(state.run_decode(device, case, codes, absmax, residual))
        expected = ops.dequantize_residual(*tensors(codes, absmax, residual), format)
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), str(case)
        weight = state.weights_around(case, codes, absmax)
        got = torch.from_numpy(state.run_encode(device, case, codes, absmax, weight))
        assert torch.equal(got, ops.quantize_residual(*tensors(weight, codes, absmax), format)), str(case)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_decodes_as_on_the_cpu(device, format):
    """Also those that no weight gets: NaN, -128, infinities."""
    case = state.Case(format, 4, 8192 if format == "bf16" else 200, 0)
    codes = np.random.default_rng(1).integers(0, 256, (4, codec.code_bytes(format, case.cols)), np.uint8)
    absmax = (
        np.random.default_rng(2)
        .random((4, codec.num_blocks(format, case.cols)))
        .astype(np.float16 if format == "nf4_f16" else np.float32)
    )
    residual = state.sample_residual(case)
    got = torch.from_numpy(state.run_decode(device, case, codes, absmax, residual))
    expected = ops.dequantize_residual(*tensors(codes, absmax, residual), format)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(nan=0), expected.nan_to_num(nan=0))


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_moments_equal_cpu_backend(device, kind):
    for case in state.cases(kind)[::2]:
        got = torch.from_numpy(state.run_moments(device, case))
        expected = ops.dequantize_moments8(*tensors(*state.sample_moments(case)), kind == "signed")
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), str(case)


def test_runs_on_the_passed_stream_and_not_on_empty_work(device):
    state.run_moments(device, state.Case("signed", 1, 5, 0))
    assert device.native.last_stream() == 0x5EED
    before = device.native.launches()
    for shape in ((0, 64), (3, 0)):
        state.run_moments(device, state.Case("signed", *shape, 0))
        case = state.Case("nf4", *shape, 0)
        codes, absmax = state.sample_codes(case)
        state.run_decode(device, case, codes, absmax, state.sample_residual(case))
        state.run_encode(device, case, codes, absmax, np.zeros(shape, np.float32))
    assert device.native.launches() == before


def test_failed_launch_is_an_error(device):
    case = state.Case("nf4", 1, 64, 0)
    codes, absmax = state.sample_codes(case)
    runs = {
        "decode_residual": lambda: state.run_decode(device, case, codes, absmax, state.sample_residual(case)),
        "encode_residual": lambda: state.run_encode(device, case, codes, absmax, np.zeros((1, 64), np.float32)),
        "decode_moments8": lambda: state.run_moments(device, state.Case("signed", 1, 64, 0)),
    }
    for name, run in runs.items():
        device.native.fail_next_launch(98)
        with pytest.raises(RuntimeError, match=f"{name}: (CUDA|HIP) launch failed"):
            run()


def test_unaligned_codes_are_refused(device):
    case = state.Case("nf4", 1, 64, 0)
    codes, absmax = state.sample_codes(case)
    device.skew = 4
    try:
        with pytest.raises(RuntimeError, match="codes: expected an address that is a multiple of 16"):
            state.run_decode(device, case, codes, absmax, state.sample_residual(case))
        with pytest.raises(RuntimeError, match="codes: expected an address that is a multiple of 16"):
            state.run_encode(device, case, codes, absmax, np.zeros((1, 64), np.float32))
    finally:
        device.skew = 0


@pytest.mark.parametrize("target", targets.SANITIZED_TARGETS)
def test_under_sanitizers(target):
    result = targets.run_sanitized(target, state.__file__)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == f"{len(state.RESIDUAL_CASES) + len(state.MOMENT_CASES)} cases"
