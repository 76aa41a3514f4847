"""The routing kernels of cuda/ and hip/, run on the CPU: against a numpy oracle and the CPU backend, and under
sanitizers."""

from __future__ import annotations

import importlib
import pathlib
import sys

import numpy as np
import pytest
import torch
from usaf_ext import ops

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu_emulation"))
calls = importlib.import_module("expert_calls")
gather = importlib.import_module("gather_cases")
targets = importlib.import_module("expert_targets")

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module", params=targets.TARGETS)
def device(request):
    return targets.device(request.param)


@pytest.mark.parametrize("case", gather.cases(), ids=str)
def test_equals_oracle(device, case):
    gather.check_case(device, case)


@pytest.mark.parametrize("num_experts", [1, 31, 32, 33, 200])
def test_sort_is_stable(device, num_experts):
    rng = np.random.default_rng(num_experts)
    index = rng.integers(0, num_experts + 1, (5000, 2))
    gather.check_sort(device, index, num_experts)
    gather.check_sort(device, np.full((40, 4), num_experts - 1), num_experts)  # all on one expert
    gather.check_sort(device, np.full((40, 4), num_experts), num_experts)  # none here


def test_sort_leaves_out_what_is_no_expert(device):
    """An index that the CPU would refuse must not write outside."""
    index = np.array([[0, 7], [-3, 1], [2**40, 2]])
    expected = gather.sort_oracle(np.array([[0, 3], [3, 1], [3, 2]]), 3)
    for got, want in zip(gather.run_sort(device, index, 3), expected):
        np.testing.assert_array_equal(got, want)


def tensor(stored: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(stored).view(TORCH_DTYPES[dtype])


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_equals_cpu_backend(device, dtype):
    case = gather.Case(dtype, "f32", 21, 4, 5, 77)
    index = gather.sample_index(case)
    stored, _ = gather.sample(case, 1, case.num_tokens, case.hidden_size)
    permuted, offsets, inverse = ops.expert_gather(tensor(stored, dtype), torch.from_numpy(index), case.num_experts)
    got_offsets, source, got_inverse = gather.run_sort(device, index, case.num_experts)
    np.testing.assert_array_equal(got_offsets, offsets.numpy())
    np.testing.assert_array_equal(got_inverse.reshape(index.shape), inverse.numpy())

    weights, _ = gather.sample_weights(case)
    sizes = {"num_tokens": 21, "top_k": 4, "hidden_size": 77, "dtype": calls.DTYPES[dtype], "weights_dtype": 0}
    rows = permuted.view(torch.uint8).numpy().reshape(index.size, -1)
    out = np.zeros_like(stored)
    maps = {"inverse": got_inverse, "weights": weights}
    device.run("combine_rows", permuted=rows, out=out, **maps, **sizes)
    assert torch.equal(tensor(out, dtype), ops.expert_scatter(permuted, inverse, torch.from_numpy(weights)))

    grad_rows, grad_weights = np.zeros_like(rows), np.zeros_like(weights)
    outputs = {"grad_permuted": grad_rows, "grad_weights": grad_weights, "source": source}
    device.run("combine_rows_backward", grad_out=stored, permuted=rows, num_rows=index.size, **outputs, **maps, **sizes)
    expected = torch.ops.usaf.expert_scatter_backward(
        tensor(stored, dtype), permuted, inverse, torch.from_numpy(weights)
    )
    assert torch.equal(tensor(grad_rows, dtype), expected[0])
    torch.testing.assert_close(torch.from_numpy(grad_weights), expected[1], rtol=1e-5, atol=1e-4)


def test_stream_and_empty_work(device):
    case = gather.Case("f32", "f32", 2, 1, 2, 4)
    gather.check_case(device, case)
    assert device.native.last_stream() == calls.STREAM
    before = device.native.launches()
    nothing = np.zeros((0, 4), np.float32)
    sizes = {"num_rows": 0, "hidden_size": 4, "top_k": 1, "dtype": 0}
    device.run("gather_rows", x=nothing, source=np.zeros(0, np.int32), out=nothing, **sizes)
    assert device.native.launches() == before


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_gather_is_five_launches(device):
    """Four of the sort; the permute zeroes the rows without a pair itself, wherever they are."""
    before = device.native.launches()
    gather.run_sort(device, np.zeros((300, 2), np.int64), 3)
    assert device.native.launches() - before == 4
    rows = np.arange(5 * 77, dtype=np.float32).reshape(5, 77)
    inverse = np.array([[3, -1], [0, 9], [-1, -1], [7, 2], [11, -1]], np.int32)
    source = np.full(12, -1, np.int32)
    expected = np.zeros((12, 77), np.float32)
    for token, slot in np.argwhere(inverse >= 0):
        source[inverse[token, slot]] = token * 2 + slot
        expected[inverse[token, slot]] = rows[token]
    out = np.full_like(expected, 7)
    sizes = {"num_rows": 12, "num_tokens": 5, "top_k": 2, "hidden_size": 77, "dtype": 0}
    device.run("permute_rows", x=rows, source=source, inverse=inverse, out=out, **sizes)
    np.testing.assert_array_equal(out, expected)
    assert device.native.launches() - before == 5


def test_failed_launch_is_an_error(device):
    index = np.zeros((2, 1), np.int64)
    device.native.fail_next_launch(98)
    with pytest.raises(RuntimeError, match=r"sort_by_expert: (CUDA|HIP) launch failed"):
        gather.run_sort(device, index, 2)


@pytest.mark.parametrize("target", targets.SANITIZED_TARGETS)
def test_under_sanitizers(target):
    result = targets.run_sanitized(target, gather.__file__)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == f"{len(gather.cases())} cases"
