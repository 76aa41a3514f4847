"""What of bench/gpu.sh needs no GPU: the script's course, the timing, the cases on the CPU, and the report."""

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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "bench"))

import codec_work
import device_timing
import gpu_bench
import gpu_measure
import gpu_report
from cases import CPU, TEST_SHAPE, Work
from conftest import NEED_A_GPU
from pairing import Copy

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
    assert measured.info["size"] == "size; other left out: RuntimeError: no library for this GPU"
    assert measured.info["calls"] in (5, 6)  # of a millisecond, for a reading of five
    last_round = order[-(measured.info["calls"] + 3 + 3) :]
    assert last_round[:4] == ["ours0", "ours1", "ours2", "ours0"]
    assert last_round[-3:] == ["copy"] * 3
    with pytest.raises(RuntimeError, match="no library"):
        device_timing.measure("op", [Work("", 1, broken)], CPU, None)


def run_bench(monkeypatch, out, *arguments):
    command = ["gpu_measure.py", "--device", "cpu", "--size", "test", "--rounds", "2", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return gpu_measure.main(), json.loads((out / "bench.json").read_text())


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
    assert peers >= {gpu_report.RESIDENT, gpu_report.SWEEPS}
    assert re.search(r"a step: \d+ page misses, \d+ MB in", ours["step[37]"]["size"])
    assert gpu_report.BARE_COPIES in {row.get("peer") for row in result["rows"]}


def test_a_case_that_fails_costs_no_other(monkeypatch, tmp_path):
    monkeypatch.setattr(device_timing, "READING_SECONDS", 1e-4)

    def broken(shape):
        raise ValueError("wrong shape\nand more")

    monkeypatch.setitem(gpu_measure.OP_CASES, "sort", broken)
    code, result = run_bench(monkeypatch, tmp_path, "--only", "^(gather|sort|glu)$")
    assert code == 1
    assert result["failed"] == {"sort": "ValueError: wrong shape"}
    assert [row["case"] for row in result["rows"] if "peer" not in row] == ["gather", "glu"]


def test_a_device_that_fails_gets_a_new_process(monkeypatch, tmp_path):
    """gather's figure is written before, scatter is left to the next process, which does not begin anew."""
    monkeypatch.setattr(device_timing, "READING_SECONDS", 1e-4)
    broken = []

    def breaks(shape):
        broken.append(True)
        raise RuntimeError("an illegal memory access")

    def synchronize(device):
        if broken:
            raise RuntimeError("an illegal memory access")

    only = ["--only", "^(encode_nf4_bf16|gather|scatter|sort)$"]
    with monkeypatch.context() as patch:
        patch.setitem(gpu_measure.OP_CASES, "gather", breaks)
        patch.setattr(gpu_measure, "synchronize", synchronize)
        code, result = run_bench(monkeypatch, tmp_path, *only)
    assert code == gpu_bench.BROKEN
    assert result["running"] is None
    assert result["failed"] == {"gather": "RuntimeError: an illegal memory access"}
    (first, *peers) = result["rows"]
    assert gpu_report.CHECK in {row["peer"] for row in peers}
    code, result = run_bench(monkeypatch, tmp_path, *only)
    assert code == 1
    assert result["failed"] == {"gather": "RuntimeError: an illegal memory access"}
    assert result["rows"][0] == first
    assert [row["case"] for row in result["rows"] if "peer" not in row] == ["encode_nf4_bf16", "scatter", "sort"]


def test_a_case_that_ends_the_process_costs_no_other(tmp_path):
    measure = tmp_path / "measure.py"
    measure.write_text(f"""import os, sys
sys.path.insert(0, {str(REPO / "bench")!r})
import device_timing, gpu_measure
device_timing.READING_SECONDS = 1e-4
gpu_measure.OP_CASES["gather"] = lambda shape: os._exit(7)
sys.exit(gpu_measure.main())
""")
    (tmp_path / "bench.json").write_text("of another run")
    options = ["--device=cpu", "--size=test", "--rounds=2", "--only=^(gather|scatter|glu)$"]
    assert gpu_bench.measure_all(tmp_path, 100, options, measure) == 1
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["failed"] == {"gather": "ended the process (exit code 7)"}
    assert [row["case"] for row in result["rows"] if "peer" not in row] == ["scatter", "glu"]


def test_a_broken_bitsandbytes_costs_itself_alone(monkeypatch):
    class Broken:
        def quantize_4bit(self, *_, **__):
            raise RuntimeError("no kernel image is available\nfor this GPU")

        dequantize_4bit = quantize_4bit

    monkeypatch.setattr(device_timing, "READING_SECONDS", 1e-4)
    monkeypatch.setattr(codec_work, "bnb", Broken())
    for name in ("encode_nf4_fp32", "decode_nf4_fp32"):
        measured = device_timing.measure(name, [codec_work.CODEC_CASES[name](TEST_SHAPE)], CPU, None, rounds=2)
        assert len(measured.seconds) == 2
        assert "bitsandbytes left out: RuntimeError: no kernel image is available for" in measured.info["size"]


def test_no_case_begins_after_its_time(monkeypatch, tmp_path):
    code, result = run_bench(monkeypatch, tmp_path, "--seconds", "0", "--only", "^(gather|glu)$")
    assert code == 0
    assert result["rows"] == []
    assert result["left_out"] == ["gather", "glu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_measure.py", "--device", "cuda", "--out", str(tmp_path)])
    assert gpu_measure.main() == 2
    assert "--device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def row(case, percent=None, milliseconds=1.0, **peer):
    return {"case": case, "percent_of_copy": percent, "median_ms": milliseconds, **peer}


def test_figures_are_judged_by_their_aims():
    rows = [
        row("decode_nf4_bf16", 91.0),
        row("encode_int8_fp32", 89.0),
        row("decode_residual", 10.0),
        row("gather", 86.0),
        row("gather", 40.0, peer="torch", ours_over_peer=0.4),
        row("copies", None),
        row("copies", None, peer="bare asynchronous copies", ours_over_peer=1.04),
        row("step[8192]", None),
        row("step[8192]", None, 10.0, peer="all pages resident", ours_over_peer=1.07),
        row("step[8192]", None, 9.0, peer="copies of two sweeps alone", ours_over_peer=1.2),
    ]
    judged = {aim["case"]: aim["met"] for aim in gpu_report.judge(rows)}
    assert judged == {
        "decode_nf4_bf16": True,
        "encode_int8_fp32": False,
        "gather": True,
        "copies": True,
        "step[8192]": False,
    }


def test_a_step_whose_copies_take_longer_is_not_judged():
    def step(copies):
        return [
            row("step[512]"),
            row("step[512]", None, 10.0, peer=gpu_report.RESIDENT, ours_over_peer=1.5),
            row("step[512]", None, copies, peer=gpu_report.SWEEPS, ours_over_peer=1.2),
        ]

    assert [aim["met"] for aim in gpu_report.judge(step(9.0))] == [False]
    assert gpu_report.judge(step(11.0)) == []
    assert gpu_report.judge(step(11.0)[:2]) == []


def write_parts(work):
    (work / "parts.tsv").write_text("build\tpassed\t3\tfine\n")
    (work / "build.log").write_text("fine\n")


def test_a_report_says_what_figures_hold(tmp_path):
    write_parts(tmp_path)
    figures = {"size": "", "bytes": 1, "gb_per_s": 1.0, "copy_gb_per_s": 1.0, "iqr_ms": 0.0, "ours_over_peer_iqr": 0.0}
    rows = [
        row("encode_nf4_bf16", 60.0, 1.0),
        row("encode_nf4_bf16", 180.0, 0.25, peer=gpu_report.CHECK, ours_over_peer=4.0),
        row("step[512]", None, 15.0),
        row("step[512]", None, 10.0, peer=gpu_report.RESIDENT, ours_over_peer=1.5),
        row("step[512]", None, 11.0, peer=gpu_report.SWEEPS, ours_over_peer=1.36),
        row("sort", 20.0),
    ]
    head = {"device": "a GPU", "versions": {}, "command": "", "date": "", "load_average_at_start": 0.0, "copy": "1 GB"}
    ran = {"rows": [{**figures, **r} for r in rows], "failed": {}, "left_out": [], "running": "scatter"}
    gpu_bench.write(tmp_path, {**head, **ran})
    assert gpu_report.main(tmp_path, tmp_path) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert re.search(r"encode_nf4_bf16: 60% of the copy, the check .* included; 80% less the time of that check", text)
    assert re.search(r"pager stall: step\[512\], \+50\.0% .*not judged, its copies take longer", text)
    assert "`sort` moves so little" in text
    assert "out of time within: scatter" in text


def test_broken_figures_cost_nothing_else(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "bench.json").write_text('{"rows": [{"case": "gath')
    assert gpu_report.main(tmp_path, tmp_path) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| build | passed | 3 | fine |" in text
    assert "bench.json cannot be read (JSONDecodeError" in text
    assert '"gath' in text
    assert (tmp_path / "gpu.log").read_text() == "==== build\nfine\n"
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["name"] == "build"
