"""The simulated timeline (bench/timeline.py): intervals, the assumed durations, the command line."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "bench"))

import timeline
import virtual_time
from cards import CARDS, Durations, qwen3_30b_a3b
from timeline_plot import Lanes, busy_shares, common_seconds, merged


def test_intervals():
    union = merged([(0.0, 1.0), (1.0, 2.0), (1.5, 1.75), (3.0, 3.0), (4.0, 6.0)])
    assert union == [(0.0, 2.0), (4.0, 6.0)]
    assert common_seconds(union, [(1.5, 4.5), (5.0, 9.0)]) == 0.5 + 0.5 + 1.0
    assert common_seconds(union, []) == 0.0
    assert busy_shares(union, 8.0, 4) == [1.0, 0.0, 1.0, 0.0]
    assert busy_shares([(1.0, 3.0)], 8.0, 4) == [0.5, 0.5, 0.0, 0.0]
    assert busy_shares([(6.0, 8.0)], 8.0, 4) == [0.0, 0.0, 0.0, 1.0]


def test_lanes_begin_with_the_step():
    spans = [(True, 0, 1.0, 5.0), (False, 0, 5.0, 6.0), (True, 0, 6.0, 8.0), (False, 0, 7.0, 9.0)]
    lanes = Lanes.of(spans, begin=5.0, turn=7.0)
    assert lanes == Lanes([(1.0, 3.0)], [(0.0, 1.0), (2.0, 4.0)], 2.0)
    assert lanes.overlap() == 0.5


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_durations_are_the_roofs(card):
    model = qwen3_30b_a3b()
    work = Durations(model, card, num_tokens=8192, density=0.01)
    assert work.expert_forward(0) == work.expert_backward(0) == 0.0
    weights = 3 * 2048 * 768
    assert model.page_bytes >= weights // 2 + weights // 64 * 4
    flops = (6 * 2048 * 768, 10.06 * 2048 * 768)  # a token, forward and backward
    for seconds, per_token in zip((work.expert_forward, work.expert_backward), flops):
        slope = (seconds(40_000) - seconds(20_000)) / 20_000
        assert slope > per_token / (card.peak_flops * card.gemm_share)
        few = seconds(1)  # its weights: decoded (read and written), then read
        assert few > (model.page_bytes + 2 * 2 * weights) / card.memory_bandwidth
    # All FLOPs of forward, recompute and backward are 16e9 a token (9.7e9 of them experts'); the rest is memory's time.
    layer = 2 * work.dense_forward() + work.dense_backward()
    layer += 128 * (work.expert_forward(512) + work.expert_backward(512))
    step = 48 * layer + 2 * work.head()
    assert 16e9 < step * card.peak_flops * card.gemm_share / 8192 < 26e9


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cards", "h100"], "--cards: invalid choice: 'h100'"),
        (["--tokens", "0"], "--tokens: expected a whole number above 0, got '0'"),
        (["--tokens", "many"], "--tokens: expected a whole number above 0, got 'many'"),
        (["--budgets", "-1"], "--budgets: expected"),
        (["--density", "1.5"], "--density: expected a number above 0 and at most 1, got '1.5'"),
        (["--gemm-share", "none"], "--gemm-share: expected a number above 0 and at most 1, got 'none'"),
        (["--out", "/nowhere/at/all"], "--out: expected a folder that exists, got '/nowhere/at/all'"),
    ],
)
def test_bad_arguments_are_named(arguments, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        timeline.main(arguments)
    assert exit_.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.skipif(not virtual_time.available(), reason="no C++ compiler")
def test_writes_table_record_and_plot(tmp_path, capsys):
    timeline.main(["--cards", "rtx3060", "--tokens", "512", "--budgets", "4", "16", "--out", str(tmp_path)])
    text = (tmp_path / "timeline.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert "not a measurement" in text.splitlines()[2]
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))["rows"]
    small, all_pages = rows
    assert small["bytes_in"] > 20e9
    assert 50 < small["overlap_percent"] <= 100
    assert all_pages["bytes_in"] < 1e8  # experts that no earlier step used
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(512 / row["step_seconds"])
        assert f"| {row['step_seconds']:.3f} s | {row['tokens_per_second']:.0f} |" in text
