"""The benchmarks' cases: ours and every peer really do the same work; and the figures of their report."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "bench"))

import layers
import tables
from cases import TEST_SHAPE
from op_cases import OP_CASES


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", OP_CASES)
def test_peers_do_the_same_work(name):
    work = OP_CASES[name](TEST_SHAPE)
    assert work.moved > 0
    ours = work.ours()
    for peer, run in work.peers.items():
        theirs = run()
        if ours is None and theirs is None:
            continue  # a mode that keeps no weights to compare: tests/test_ops_adam.py has its oracle
        for mine, other in zip(_tensors(ours), _tensors(theirs), strict=True):
            mine, other = mine.double().reshape(-1), other.double().reshape(-1)
            worst = float((mine - other).abs().max() / other.abs().max())
            assert worst <= work.tolerance, f"{peer}: {worst}"


def test_layer_peers_do_the_same_work():
    case = TEST_SHAPE.layer
    peer = layers.transformers_experts(case)
    inputs = case.inputs()
    ours = layers.paged_experts(peer, format="bf16")
    layers.train_neurons(ours.layer, 0.1)
    grad_x, grad_weights, norm = layers.ours_step(ours, inputs)()
    assert float(norm) > 0
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        theirs = layers.transformers_step(peer, inputs, implementation, weight_gradients=False)()
        for mine, other in zip((grad_x, grad_weights), theirs):
            worst = float((mine.double() - other.double()).abs().max() / other.double().abs().max())
            assert worst < 0.03, f"{implementation}: {worst}"


def test_qlora_peer_computes_the_nf4_experts():
    pytest.importorskip("experts4bit_qlora", reason="experts4bit-qlora is not installed (make bench installs it)")
    case = TEST_SHAPE.layer
    peer = layers.transformers_experts(case)
    inputs = case.inputs()
    ours = layers.paged_experts(peer)
    layers.train_neurons(ours.layer, 0.1)
    grad_x = layers.ours_step(ours, inputs)()[0].double()
    other = layers.qlora_step(peer, inputs)()[0].double()
    # Its W_down blocks run along the intermediate size, ours along the hidden size: the same up to NF4's error.
    assert float((grad_x - other).norm() / other.norm()) < 0.2


def test_affine_fit_names_the_worst_point():
    rows = [{"axis": "tokens", "x": x, "median_ms": 2.0 + 3.0 * x} for x in (1, 2, 3, 4)]
    (fit,) = tables.linear_fits(rows)
    assert fit["ms_per_unit"] == pytest.approx(3.0)
    assert fit["ms_at_zero"] == pytest.approx(2.0)
    assert fit["worst_percent_above_fit"] == pytest.approx(0.0, abs=1e-9)
    rows[2]["median_ms"] *= 2
    (fit,) = tables.linear_fits(rows)
    assert fit["worst_x"] == 3
    assert fit["worst_percent_above_fit"] > 10


def test_rows_pair_each_round():
    info = {
        "size": "s",
        "bytes": 4_000_000_000,
        "copy_rates": [4e9, 4e9, 1e9],
        "threads": 1,
        "axis": "tokens",
        "x": 8,
        "peer_x": {"torch": 4},
        "peers": {"torch": [1.0, 4.0, 12.0]},
    }
    ours, peer = tables.rows_of([tables.Measurement("op[x]", info, [2.0, 4.0, 6.0])])
    assert ours["gb_per_s"] == pytest.approx(1.0)
    assert ours["percent_of_copy"] == pytest.approx(50.0)  # the median of 50, 25 and 67
    assert (ours["x"], peer["x"], peer["axis"]) == (8, 4, "tokens")
    assert peer["ours_over_peer"] == pytest.approx(1.0)  # the median of 2, 1 and 0.5, not 4 / 4
    environment = {
        "device": "d",
        "versions": {},
        "command": "c",
        "date": "t",
        "load_average_at_start": 0.0,
        "copy": "1 GiB",
    }
    assert "1.00 +- " in tables.markdown(environment, [ours, peer], [])
