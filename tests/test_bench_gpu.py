"""What of bench/gpu.sh needs no GPU: the script's course, the timing, the cases on the CPU, and the report."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "bench"))

import device_timing
import gpu_bench
import gpu_report
from cases import CPU, Work
from pairing import Copy

REPO = pathlib.Path(__file__).resolve().parents[1]
# Stands for python3 in the script: notes its calls; a build and the benchmarks pass, the tests fail.
FAKE_PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 90-real ;;
  *gpu_report.py*) exec "$REAL_PYTHON" "$@" ;;
  *"-m pytest"*"-m gpu tests") echo "3 failed, 7 passed in 1s"; exit 1 ;;
  *gpu_bench.py*) echo "a case took | long" ;;
esac
"""


def run_script(*arguments: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    variables = {**os.environ, **environment}
    if path is not None:
        variables["PATH"] = path + os.pathsep + variables["PATH"]
    command = ["bash", str(REPO / "bench/gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    folder = str(pathlib.Path(sys.executable).parent)
    result = run_script(str(tmp_path / "out"), path=folder)
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


def test_a_failed_part_does_not_stop_the_next(tmp_path):
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    for name, text in (("python3", FAKE_PYTHON), ("nvcc", "#!/bin/sh\n"), ("compute-sanitizer", "#!/bin/sh\nexit 9\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    out = tmp_path / "out"
    result = run_script(str(out), path=str(tools), CALLS=str(calls), REAL_PYTHON=sys.executable)
    assert result.returncode == 1, result.stderr
    parts = {part["name"]: part for part in json.loads((out / "gpu.json").read_text())["parts"]}
    assert {name: part["status"] for name, part in parts.items()} == {
        "build": "passed",
        "self_check": "passed",
        "gpu_tests": "failed",
        "benchmarks": "passed",
        "hip_on_cuda": "passed",
        "memcheck": "failed",
        "racecheck": "failed",
    }
    assert parts["gpu_tests"]["last_line"] == "3 failed, 7 passed in 1s"
    assert "| benchmarks | passed | 0 | a case took / long |" in (out / "gpu.md").read_text()
    assert "==== gpu_tests\n3 failed" in (out / "gpu.log").read_text()
    called = calls.read_text()
    assert "CMAKE_CUDA_ARCHITECTURES=90-real" in called
    assert "tests/gpu_builds.py hip_on_cuda --architecture 90-real" in called


def test_works_take_turns_and_readings_cover_many_calls(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(device_timing.time, "perf_counter", lambda: now[0])

    def spend(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    def broken():
        raise RuntimeError("no library for this GPU")

    works = [
        Work("size", 4_000_000, spend(f"ours{i}", 0.001), {"peer": spend(f"peer{i}", 0.004), "other": broken})
        for i in range(3)
    ]
    measured = device_timing.measure("op", works, CPU, Copy(spend("copy", 0.002), 8_000_000), rounds=5)
    assert measured.seconds == pytest.approx([0.001] * 5)
    assert measured.info["peers"] == {"peer": pytest.approx([0.004] * 5)}
    assert measured.info["copy_rates"] == pytest.approx([4e9] * 5)
    assert measured.info["calls"] in (5, 6)  # of a millisecond, for a reading of five
    last_round = order[-(measured.info["calls"] + 3 + 3) :]
    assert last_round[:4] == ["ours0", "ours1", "ours2", "ours0"]
    assert last_round[-3:] == ["copy"] * 3
    with pytest.raises(RuntimeError, match="no library"):
        device_timing.measure("op", [Work("", 1, broken)], CPU, None)


def run_bench(monkeypatch, out, *arguments):
    command = ["gpu_bench.py", "--device", "cpu", "--size", "test", "--rounds", "2", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return gpu_bench.main(), json.loads((out / "bench.json").read_text())


def test_cases_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(device_timing, "READING_SECONDS", 1e-4)
    code, result = run_bench(monkeypatch, tmp_path, "--only", "^(decode_nf4_bf16|sort|copies|step.*|decode_residual)$")
    assert code == 0
    assert result["failed"] == {}
    ours = {row["case"]: row for row in result["rows"] if "peer" not in row}
    assert list(ours) == ["decode_nf4_bf16", "copies", "step[37]", "sort", "decode_residual"]
    assert ours["sort"]["percent_of_copy"] > 0
    assert ours["copies"]["bytes"] > 0
    assert ours["copies"]["percent_of_copy"] is None
    peers = {row["peer"] for row in result["rows"] if row["case"] == "step[37]" and "peer" in row}
    assert peers >= {"all pages resident", "copies of two sweeps alone"}


def test_a_case_that_fails_costs_no_other(monkeypatch, tmp_path):
    monkeypatch.setattr(device_timing, "READING_SECONDS", 1e-4)

    def broken(shape):
        raise ValueError("wrong shape\nand more")

    monkeypatch.setitem(gpu_bench.OP_CASES, "sort", broken)
    code, result = run_bench(monkeypatch, tmp_path, "--only", "^(gather|sort|glu)$")
    assert code == 1
    assert result["failed"] == {"sort": "ValueError: wrong shape"}
    assert [row["case"] for row in result["rows"] if "peer" not in row] == ["gather", "glu"]


def test_no_case_begins_after_its_time(monkeypatch, tmp_path):
    code, result = run_bench(monkeypatch, tmp_path, "--seconds", "0", "--only", "^(gather|glu)$")
    assert code == 0
    assert result["rows"] == []
    assert result["left_out"] == ["gather", "glu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py", "--device", "cuda", "--out", str(tmp_path)])
    assert gpu_bench.main() == 2
    assert "--device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_figures_are_judged_by_their_aims():
    def row(case, percent=None, **peer):
        return {"case": case, "percent_of_copy": percent, **peer}

    rows = [
        row("decode_nf4_bf16", 91.0),
        row("encode_int8_fp32", 89.0),
        row("decode_residual", 10.0),
        row("gather", 86.0),
        row("gather", 40.0, peer="torch", ours_over_peer=0.4),
        row("copies", None),
        row("copies", None, peer="bare asynchronous copies", ours_over_peer=1.04),
        row("step[8192]", None, peer="all pages resident", ours_over_peer=1.07),
    ]
    judged = {aim["case"]: aim["met"] for aim in gpu_report.judge(rows)}
    assert judged == {
        "decode_nf4_bf16": True,
        "encode_int8_fp32": False,
        "gather": True,
        "copies": True,
        "step[8192]": False,
    }
