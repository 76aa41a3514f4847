"""The neurons' gradients and the routers' noise of cuda/ and hip/, run on the CPU: against float64 and the CPU backend,
and under sanitizers."""

from __future__ import annotations

import importlib
import pathlib
import sys

import numpy as np
import pytest
import torch
from usaf_ext import ops

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu_emulation"))
rows = importlib.import_module("row_gradient_cases")
targets = importlib.import_module("expert_targets")

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module", params=targets.TARGETS)
def device(request):
    return targets.device(request.param)


@pytest.mark.parametrize("case", rows.cases(), ids=str)
def test_equals_oracle(device, case):
    rows.check_case(device, case)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("grad_dtype", ["f32", "bf16"])
def test_equals_cpu_backend(device, dtype, grad_dtype):
    case = rows.Case(dtype, grad_dtype, (40, 0, 7), 67, 10, 9)
    operands = rows.Operands(case)
    activations = [
        torch.from_numpy(stored).view(TORCH_DTYPES[dtype])
        for stored in (operands.x, operands.grad_out, operands.grad_gate_up, operands.weighted_h)
    ]
    offsets = torch.from_numpy(operands.offsets)
    neuron_expert, neuron_index = map(torch.from_numpy, rows.sample_neurons(case))
    stored, _ = rows.sample(case, 5, grad_dtype, len(neuron_expert), 3, case.hidden_size)
    grad = torch.from_numpy(stored.copy()).view(TORCH_DTYPES[grad_dtype])
    ops.row_gradient_(grad, *activations, offsets, neuron_expert, neuron_index)
    rows.run_gradient(device, case, operands, stored)
    assert torch.equal(torch.from_numpy(stored).view(TORCH_DTYPES[grad_dtype]), grad)

    got, importance = np.zeros((3, 10), np.float32), torch.zeros(3, 10)
    rows.run_importance(device, operands, None, got)
    ops.row_importance_(importance, *activations, offsets)
    torch.testing.assert_close(torch.from_numpy(got), importance, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_squares_of_any_size_are_summed_as_in_double(device, dtype):
    """Squares that fp32 would round to 0 or infinity, subnormals, zeros, all sizes in one row, and a NaN."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((10, 1030)).astype(np.float32)
    values[1:7] *= np.array([1e-9, 1e-13, 1e-25, 1e-39, 1e19, 1e37], np.float32)[:, None]
    values[7] *= 10.0 ** rng.uniform(-40, 37, 1030).astype(np.float32)
    values[8, 5:] = 0
    values[9, 700] = np.nan
    stored = rows.to_dtype(values, dtype)
    exact = (rows.from_dtype(stored, dtype).astype(np.float64) ** 2).sum(-1)
    squares = np.full(10, 7.0)
    sizes = {"num_rows": 10, "cols": 1030, "dtype": rows.DTYPES[dtype]}
    device.run("squares_of_rows", rows=stored, squares=squares, **sizes)
    np.testing.assert_allclose(squares, exact, rtol=1e-13)
    assert 0 < squares[4] < 1e-73
    assert np.isnan(squares[9])


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(9, 128), (5, 7), (1, 1), (3, 1026), (0, 4)])
def test_router_uniform_equals_cpu_backend(device, num_tokens, num_experts):
    expected = torch.empty(num_tokens, num_experts)
    counters = {"seed": 2**63 - 5, "step": 4, "micro_batch": 2, "layer": 3}
    ops.router_uniform_(expected, **counters)
    got = rows.run_uniform(device, num_tokens, num_experts, **counters)
    assert torch.equal(torch.from_numpy(got), expected)


@pytest.mark.parametrize("target", targets.SANITIZED_TARGETS)
def test_under_sanitizers(target):
    result = targets.run_sanitized(target, rows.__file__)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == f"{len(rows.cases())} cases"
