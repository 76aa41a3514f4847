"""The figures of bench/gpu.sh: the timing, the cases on the CPU, what a bad one costs, and the report."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "bench"))

import codec_work
import device_timing
import gpu_bench
import gpu_measure
import gpu_report
from cases import CPU, TEST_SHAPE, Work
from pairing import Copy

REPO = pathlib.Path(__file__).resolve().parents[1]


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
