"""bench/gpu.sh and what it runs, as far as that goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PARTS = "tests\tpassed\t12\nmemcheck\tfailed (exit code 9)\t3\nracecheck\tleft out\t0\n"
REPO = Path(__file__).resolve().parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    result = run("bash", "bench/gpu.sh", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "finds no GPU" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run("bash", "bench/gpu.sh").returncode == 2


def test_benchmarks_and_report(tmp_path):
    only = "^decode_nf4_bf16$|^gather$|^sort$"
    options = ("--device", "cpu", "--size", "test", "--rounds", "2", "--only", only)
    result = run(sys.executable, "bench/gpu_bench.py", "--out", str(tmp_path), *options)
    assert result.returncode == 0, result.stderr
    names = {row["case"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"] if "peer" not in row}
    assert names == {"decode_nf4_bf16", "gather", "sort"}

    (tmp_path / "parts.tsv").write_text(PARTS)
    (tmp_path / "tests.log").write_text("....\n4 passed in 3 s\n")
    (tmp_path / "memcheck.log").write_text("Invalid __global__ write of size 16 bytes\nERROR SUMMARY: 1 error\n")
    assert run(sys.executable, "bench/gpu_report.py", str(tmp_path)).returncode == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| tests | passed | 12 | 4 passed in 3 s |" in text
    assert "## memcheck: failed (exit code 9)" in text
    assert "Invalid __global__ write" in text
    assert "decode_nf4_bf16" in text
    assert [part["name"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]] == [
        "tests",
        "memcheck",
        "racecheck",
    ]


def test_a_device_that_is_not_there_is_an_error(tmp_path):
    result = run(sys.executable, "bench/gpu_bench.py", "--out", str(tmp_path), "--device", "cuda:7")
    assert result.returncode == 2
    assert "--device: " in result.stderr
    assert not list(tmp_path.iterdir())
