"""The GPU build of the extension without a GPU: the real sources of cuda/ and hip/ under the emulator, on a torch
device of the tests' own. It is built here, and what takes a device is tested on it in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import devices
import pytest
from usaf_ext import self_check

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "gpu_emulation"))
build_device = importlib.import_module("build_device")

if devices.is_emulated():
    pytest.skip("this is the emulated build", allow_module_level=True)
if build_device.missing_tools():
    pytest.skip(f"to build it takes {' and '.join(build_device.missing_tools())}", allow_module_level=True)


@pytest.fixture(scope="module", params=["cuda", pytest.param("hip", marks=pytest.mark.slow)])
def package(request):
    return build_device.build(request.param)


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)


def check_passed(result: subprocess.CompletedProcess[str], at_least: int) -> None:
    """pytest passed, and this many tests."""
    tail = result.stdout[-8000:] + result.stderr[-2000:]
    assert result.returncode == 0, tail
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, tail
    assert int(passed.group(1)) >= at_least, tail


def test_the_device_itself(package):
    check_passed(run(package, "-m", "pytest", str(TESTS / "test_fake_gpu.py")), 20)


def test_the_ops(package):
    files = [*sorted(TESTS.glob("test_ops_*.py")), TESTS / "test_row_importance.py"]
    check_passed(run(package, "-m", "pytest", "-k", "fake_gpu or test_ops_devices", *map(str, files)), 500)


def test_the_expert_layer(package):
    check_passed(run(package, "-m", "pytest", str(TESTS / "test_gpu_layer.py")), 25)


def test_the_package(package):
    """Memory, loader, commands, training steps and optimizer on the device."""
    files = [TESTS / f"test_{name}.py" for name in ("gpu_package", "gpu_training", "optimizer", "delta")]
    check_passed(
        run(package, "-m", "pytest", "-k", "fake_gpu or test_gpu_package or test_gpu_training", *map(str, files)), 60
    )


# One run of each kind: what its tests on the CPU show holds on the device.
RUNS = (
    "test_bank_training.py::test_the_host_trains_the_same_bits_as_the_device[fake_gpu-nf4-release]",
    "test_bank_training.py::test_a_run_with_reselection_resumes_bit_for_bit[fake_gpu-residual-2]",
    "test_update.py::test_float16_trains_in_both_orders_and_resumes[fake_gpu]",
    "test_training.py::test_resume_continues_bit_for_bit[fake_gpu-gumbel]",
    "test_reselection.py::test_nothing_learnt_is_lost[fake_gpu-master-host-8bit]",
    "test_reselection.py::test_delta_and_export_give_the_model_that_was_evaluated[fake_gpu]",
)


def test_whole_runs(package):
    check_passed(run(package, "-m", "pytest", *(str(TESTS / name) for name in RUNS)), len(RUNS))


@pytest.mark.slow
def test_all_runs(package):
    files = [TESTS / f"test_{name}.py" for name in ("bank_training", "update", "training", "reselection")]
    check_passed(run(package, "-m", "pytest", "-k", "fake_gpu", *map(str, files)), 70)


def test_the_self_check(package):
    result = run(package, "-m", "usaf_ext.cli", "info", "--check")
    lines = [line.split() for line in result.stdout.splitlines() if "fake_gpu:0" in line]
    statuses = [line[0] for line in lines if line[1] == "fake_gpu:0"]
    assert len(statuses) == len(self_check.checks()), result.stdout + result.stderr
    assert set(statuses) <= {"pass", "absent"}, result.stdout
    assert result.returncode == 0


def test_the_benchmarks_of_a_gpu(package, tmp_path):
    """They find everything on the device; the times are the emulator's and say nothing."""
    cases = "^(decode_nf4_bf16|adam_master_nf4|sort|copies|step.*)$"
    sizes = ["--device", "fake_gpu", "--size", "test", "--rounds", "1"]
    result = run(package, str(TESTS.parent / "bench/gpu_bench.py"), *sizes, "--only", cases, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    ours = [row["case"] for row in rows if "peer" not in row]
    assert ours == ["decode_nf4_bf16", "adam_master_nf4", "copies", "step[37]", "sort"]
