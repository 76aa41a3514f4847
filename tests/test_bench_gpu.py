"""The course of bench/gpu.sh, which needs no GPU, and what conftest.py does for it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import NEED_A_GPU

REPO = pathlib.Path(__file__).resolve().parents[1]
# Stands for python3 in the script: notes its calls; a build and the benchmarks pass, the tests fail.
FAKE_PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 90-real ;;
  *gpu_report.py*) exec "$REAL_PYTHON" "$@" ;;
  *"-m pytest tests/test_gpu_layer.py tests/test_gpu_package.py"*) echo "3 failed, 7 passed in 1s"; exit 1 ;;
  *gpu_bench.py*)
    echo "a case took | long"
    if [ -n "${BENCHMARK_SECONDS:-}" ]; then
      echo $$ >"$CALLS.benchmark"
      sleep "$BENCHMARK_SECONDS"
    fi ;;
  *"-m pip install"*" . "*) exit "${PIP_CODE:-0}" ;;
  *"import bitsandbytes"*) [ -z "${NO_BITSANDBYTES:-}" ] || { echo "No module named 'bitsandbytes'"; exit 1; } ;;
esac
"""
# Refuses its filter if it is an old one; else one of the checks finds an error.
FAKE_SANITIZER = r"""#!/bin/sh
echo "compute-sanitizer $*" >>"$CALLS"
case "$OLD_SANITIZER$*" in
  *--kernel-name*) [ -z "$OLD_SANITIZER" ] || { echo "unrecognised option"; exit 1; } ;;
esac
echo "20 checks against the CPU's plain path, 0 failed"
echo "ERROR SUMMARY: 1 error"
exit 9
"""


def start_script(
    *arguments: str, path: str | None = None, script: str = "gpu.sh", **environment: str
) -> subprocess.Popen[str]:
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PATH"] = path + os.pathsep + variables["PATH"]
    command = ["bash", str(REPO / "bench" / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def run_script(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    process = start_script(*arguments, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def tools(tmp_path):
    """What run_script takes to find the fakes instead of a GPU's tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("python3", FAKE_PYTHON), ("nvcc", "#!/bin/sh\n"), ("compute-sanitizer", FAKE_SANITIZER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"path": str(folder), "CALLS": str(tmp_path / "calls"), "REAL_PYTHON": sys.executable}


def parts_of(out: pathlib.Path) -> dict[str, dict]:
    return {part["name"]: part for part in json.loads((out / "gpu.json").read_text())["parts"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.sh", "gpu_tuning.sh"])
def test_without_a_gpu_it_says_so(tmp_path, script):
    folder = str(pathlib.Path(sys.executable).parent)
    result = run_script(str(tmp_path / "out"), path=folder, script=script)
    assert result.returncode == 2
    assert "no GPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "expected OUT_DIR"), (["out", "nowhere"], "no folder nowhere")],
    ids=["none", "wheels"],
)
def test_bad_arguments(tmp_path, arguments, message):
    result = run_script(*(str(tmp_path / argument) if argument == "out" else argument for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr


def test_the_constants_that_are_tuned_stand_where_the_script_seeks_them():
    (pack, adam) = re.search(r'VARIANTS=\("(\d) (\d)"', (REPO / "bench/gpu_tuning.sh").read_text()).groups()
    assert f"constexpr int kBlocksPerSm = {pack};" in (REPO / "cuda/pack.h").read_text()
    assert f"constexpr int kBlocksPerSm = {adam};" in (REPO / "cuda/masked_adam.cu").read_text()


def test_a_failed_part_does_not_stop_the_next(tmp_path, tools):
    out = tmp_path / "out"
    result = run_script(str(out), **tools)
    assert result.returncode == 1, result.stderr
    parts = parts_of(out)
    assert {name: part["status"] for name, part in parts.items()} == {
        "oracles": "passed",
        "build": "passed",
        "self_check": "passed",
        "gpu_tests": "failed",
        "benchmarks": "passed",
        "hip_on_cuda": "passed",
        "memcheck": "failed",
        "racecheck": "failed",
    }
    assert parts["gpu_tests"]["last_line"] == "3 failed, 7 passed in 1s"
    assert re.search(r"\| benchmarks \| passed \| \d+ \| a case took / long \|", (out / "gpu.md").read_text())
    assert "==== gpu_tests\n3 failed" in (out / "gpu.log").read_text()
    called = (tmp_path / "calls").read_text()
    assert "CMAKE_CUDA_ARCHITECTURES=90-real" in called
    assert "tests/gpu_builds.py hip_on_cuda --architecture 90-real" in called
    assert "tests/gpu_builds.py cuda" not in called
    sanitized = [line for line in called.splitlines() if line.startswith("compute-sanitizer")]
    assert [line.split(" --target")[0] for line in sanitized] == [
        "compute-sanitizer --tool memcheck",
        "compute-sanitizer --tool racecheck",
    ]
    assert all("--kernel-name kernel_substring=usaf" in line for line in sanitized)


def test_what_falls_back_and_what_is_said(tmp_path, tools):
    """pip that cannot build, a sanitizer that knows no filter, a Python without bitsandbytes."""
    out = tmp_path / "out"
    run_script(str(out), **tools, PIP_CODE="1", OLD_SANITIZER="yes", NO_BITSANDBYTES="yes")
    parts, called = parts_of(out), (tmp_path / "calls").read_text()
    assert parts["oracles"]["status"] == "failed"
    assert "WHEELS_DIR" in parts["oracles"]["last_line"]
    assert parts["build"]["status"] == "passed"
    assert "tests/gpu_builds.py cuda --architecture 90-real" in called
    assert "compute-sanitizer --tool memcheck" in called
    for tool in ("memcheck", "racecheck"):
        assert parts[tool]["last_line"] == "ERROR SUMMARY: 1 error"
        assert "without the filter" in (out / "gpu.log").read_text().split(f"==== {tool}\n")[1]


def test_a_run_that_is_killed_leaves_its_report(tmp_path, tools):
    out, benchmark = tmp_path / "out", tmp_path / "calls.benchmark"
    process = start_script(str(out), **tools, BENCHMARK_SECONDS="60")
    for _ in range(300):
        if benchmark.exists() and benchmark.read_text():
            break
        time.sleep(0.1)
    assert "gpu_tests" in parts_of(out)  # already: had it been killed so that it cannot notice
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert parts_of(out)["benchmarks"]["status"] == "interrupted"
    assert "==== benchmarks\na case took" in (out / "gpu.log").read_text()
    pid = int(benchmark.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_script_names_the_files_of_tests_that_need_a_gpu():
    named = re.search(r"tests/test_\{(.*)\}\.py", (REPO / "bench/gpu.sh").read_text())
    assert named is not None
    assert {f"test_{name}.py" for name in named[1].split(",")} == NEED_A_GPU


# What conftest.py does for it


def run_pytest(tmp_path, source, **environment):
    (tmp_path / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "conftest"]
    path = os.pathsep.join([str(REPO / "tests"), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=variables)


def test_failures_are_noted_as_they_come(tmp_path):
    source = """import os
def test_fails(): assert 1 == 2
def test_ends(): os._exit(7)
"""
    result = run_pytest(tmp_path, source, USAF_FAILURES=str(tmp_path / "failures"))
    assert result.returncode == 7
    noted = (tmp_path / "failures").read_text()
    assert noted.startswith("test_it.py::test_fails (call)\n")
    assert "assert 1 == 2" in noted


def test_a_worker_whose_gpu_broke_ends(tmp_path):
    source = """import torch
def test_breaks():
    def synchronize(): raise RuntimeError("an illegal memory access")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
def test_next(): raise SystemError
"""
    failures = str(tmp_path / "failures")
    assert run_pytest(tmp_path, source, USAF_FAILURES=failures, PYTEST_XDIST_WORKER="gw0").returncode == 3
    noted = pathlib.Path(failures).read_text()
    assert noted.startswith("test_it.py::test_breaks (the GPU answers no more)\nan illegal memory access")
    assert "test_next" not in noted
