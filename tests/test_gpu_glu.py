"""The gated activation of cuda/ and hip/, run on the CPU: against float64 and the CPU backend, and under sanitizers."""

from __future__ import annotations

import importlib
import pathlib
import sys

import pytest
import torch
from usaf_ext import ops

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu_emulation"))
glu = importlib.import_module("glu_cases")
targets = importlib.import_module("expert_targets")

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module", params=targets.TARGETS)
def device(request):
    return targets.device(request.param)


@pytest.mark.parametrize("case", glu.cases(), ids=str)
def test_equals_oracle(device, case):
    glu.check_case(device, case)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("activation", glu.ACTIVATIONS)
def test_equals_cpu_backend(device, activation, dtype, interleaved):
    """Bit for bit, but for the order of the one sum."""
    case = glu.Case(activation, dtype, interleaved, 5, 77, bias=True)
    gate_up, grad_h = (
        torch.from_numpy(glu.sample(case, seed, 5, columns)[0]).view(TORCH_DTYPES[dtype])
        for seed, columns in ((1, 154), (2, 77))
    )
    bias, row_weight = torch.from_numpy(glu.sample_bias(case)), torch.from_numpy(glu.sample_row_weight(case))
    h = torch.from_numpy(glu.run_forward(device, case)).view(TORCH_DTYPES[dtype])
    assert torch.equal(h, ops.glu(gate_up, activation, interleaved=interleaved, bias=bias))
    expected = ops.glu_backward(grad_h, gate_up, activation, interleaved=interleaved, bias=bias, row_weight=row_weight)
    grad_gate_up, weighted_h, grad_row_weight = map(torch.from_numpy, glu.run_backward(device, case))
    assert torch.equal(grad_gate_up.view(TORCH_DTYPES[dtype]), expected[0])
    assert torch.equal(weighted_h.view(TORCH_DTYPES[dtype]), expected[1])
    torch.testing.assert_close(grad_row_weight, expected[2], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("target", targets.SANITIZED_TARGETS)
def test_under_sanitizers(target):
    result = targets.run_sanitized(target, glu.__file__)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == f"{len(glu.cases())} cases"
