"""The main job as a user runs it: `usaf-ext demo`, no arguments, and what it must show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from usaf_ext import demo
from usaf_ext.cli import main

BASELINE = Path(__file__).parent.parent / "bench" / "results" / "demo_baseline.jsonl"
FIELDS = set(
    """loss_new_before loss_new_after loss_old_before loss_old_after loss_new_control trained_parameters density
    device_budget_bytes device_peak_bytes page_hits page_misses bytes_in stall_seconds tokens_per_second load_entropy
    router_trained quantisation_gap loss_new_export_original loss_new_export_dequantized
    untrained_bit_identical""".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder and report of the demo with the router frozen."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_report_is_whole(run):
    folder, report = run
    assert set(report) >= FIELDS
    assert len(report["load_entropy"]) == 4
    for plot in ("loss.png", "expert_load.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")


def test_learns_as_much_as_it_must(run):
    """At least 20% under the start, and at least half of what full fp32 fine-tuning gains in as many steps; the old
    text suffers less. Full fine-tuning was measured once, each rate of the grid (bench/demo_model/baseline.py)."""
    _, report = run
    full = [json.loads(line) for line in BASELINE.read_text().splitlines()]
    full = [r for r in full if r["method"] == "full" and r["schedule"] == "constant" and r["steps"] == 200]
    rates = sorted(r["learning_rate"] for r in full)
    best = min(full, key=lambda r: r["loss_new_after"])
    assert rates[0] < best["learning_rate"] < rates[-1]
    assert report["density"] <= 0.02
    assert not report["router_trained"]
    assert report["loss_new_after"] <= 0.8 * report["loss_new_before"]
    gain = report["loss_new_before"] - report["loss_new_after"]
    assert gain >= 0.5 * (best["loss_new_before"] - best["loss_new_after"])
    assert report["loss_old_after"] - report["loss_old_before"] < best["loss_old_after"] - best["loss_old_before"]


def test_proves_its_result(run):
    folder, report = run
    assert report["loss_new_control"] == report["loss_new_before"]
    assert report["untrained_bit_identical"] is True
    assert abs(report["loss_new_export_dequantized"] - report["loss_new_after"]) <= 1e-4
    assert abs(report["loss_new_export_original"] - report["loss_new_after"]) < 0.05
    assert report["device_peak_bytes"] <= report["device_budget_bytes"]
    store = json.loads((folder / "store" / "usaf_store.json").read_text())
    assert len(store["page_crc32"]) == 64
    assert report["page_misses"] > 64  # pages truly swapped
    assert report["bytes_in"] == report["page_misses"] * store["page_bytes"]
    for base in ("original", "dequantized"):
        AutoModelForCausalLM.from_pretrained(folder / f"export-{base}")


@pytest.mark.slow
@pytest.mark.parametrize(("router", "dtype"), [("topk", "float32"), ("frozen", "bfloat16"), ("topk", "bfloat16")])
def test_whole_run_of_the_other_variants(run, router, dtype, tmp_path):
    """All steps; the demo itself raises unless control, export, budget and untrained bits hold."""
    _, main_report = run
    assert main(["demo", "--out", str(tmp_path / "out"), "--router", router, "--dtype", dtype]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loss_new_after"] < main_report["loss_new_after"] + 0.05
    assert report["router_trained"] is (router == "topk")


def test_runs_again_in_its_own_folder_in_bf16_with_the_router(run, monkeypatch, tmp_path):
    """A shorter run of the other variant; its own checks (bf16 export within 2e-3, control) must hold too."""
    from dataclasses import replace

    monkeypatch.setattr(demo, "CONFIG", replace(demo.CONFIG, steps=12, importance_batches=2))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "report.json").write_text("of an earlier demo")
    assert main(["demo", "--out", str(tmp_path / "again"), "--router", "topk", "--dtype", "bfloat16"]) == 0
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["router_trained"] is True
    assert report["untrained_bit_identical"] is True
    assert report["loss_new_after"] < report["loss_new_before"]
