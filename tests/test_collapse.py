"""Collapse is reported while it happens, once a change; a router warm-up with a load-balancing loss undoes it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from trained_models import paged_model, tokens
from usaf_ext import TrainConfig, train
from usaf_ext.collapse import CollapseMonitor, as_json
from usaf_ext.router import CollapsedLayer, LoadTracker, find_routers

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = list(tokens(16, length=24, vocabulary=40))
EVEN, DEAD, SWAMPED = [100, 100, 100, 100], [140, 130, 130, 0], [196, 70, 67, 67]


def step(*layers):
    load = LoadTracker(len(layers), 4)
    load.add([torch.tensor(counts, dtype=torch.int32) for counts in layers], 200)
    return load


def test_a_window_is_judged_when_it_holds_enough_tokens():
    monitor = CollapseMonitor(2, 4)
    quarter = step([35, 33, 32, 0], [25, 25, 25, 25])
    assert [monitor.add_step(quarter) for _ in range(4)] == [False, False, False, True]
    assert monitor.collapsed == [CollapsedLayer(0, (3,), ())]
    assert as_json(monitor.collapsed) == [{"layer": 0, "dead": [3], "swamping": []}]


def test_only_changes_are_told(caplog):
    monitor = CollapseMonitor(2, 4)
    with caplog.at_level(logging.INFO, logger="usaf_ext"):
        told = [monitor.add_step(step(*layers)) for layers in [(DEAD, EVEN), (DEAD, EVEN), (DEAD, SWAMPED)]]
        assert told == [True, False, True]
        assert monitor.collapsed == [CollapsedLayer(0, (3,), ()), CollapsedLayer(1, (), (0,))]
        assert monitor.add_step(step(EVEN, SWAMPED))
        assert not monitor.add_step(step(EVEN, SWAMPED))
    assert monitor.finish() == [CollapsedLayer(1, (), (0,))]
    said = [(record.levelname, record.getMessage()[:24]) for record in caplog.records]
    assert said == [
        ("WARNING", "MoE layer 0 collapsed: 1"),
        ("WARNING", "MoE layer 1 collapsed: 0"),
        ("INFO", "MoE layer 0 recovered: n"),
    ]


def test_a_run_without_a_full_window_is_judged_at_its_end():
    monitor = CollapseMonitor(1, 4)
    assert monitor.finish() == []
    monitor = CollapseMonitor(1, 4)
    assert not monitor.add_step(step([50, 25, 25, 0]))
    assert monitor.collapsed == []
    assert monitor.finish() == [CollapsedLayer(0, (3,), ())]


def test_state_goes_on_in_the_middle_of_a_window():
    whole, first = CollapseMonitor(1, 4), CollapseMonitor(1, 4)
    steps = [step(DEAD), step([50, 25, 25, 0]), step([75, 75, 75, 75])]
    told = [whole.add_step(load) for load in steps]
    assert told == [True, False, True]
    assert [first.add_step(load) for load in steps[:2]] == told[:2]
    second = CollapseMonitor(1, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.collapsed == first.collapsed != []
    assert second.add_step(steps[2])
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ValueError, match=r"expected counts \(2, 4\), got \(1, 4\)"):
        CollapseMonitor(2, 4).load_state_dict(first.state_dict())


def collapsing_model(checkpoint):
    """Every token shares a large component, and the routers send it to experts 0 and 1."""
    model = paged_model(checkpoint)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 4 * model.get_input_embeddings().weight.std()
        for router in find_routers(model).values():
            router.weight.mul_(0.2)
            router.weight[:2, 0] += 0.5
    return model


def test_a_collapse_is_reported_and_a_warm_up_with_balancing_rescues_it(tiny_checkpoint, tmp_path, caplog):
    settings = {"steps": 30, "batch_size": 8, "seq_len": 24, "density": 0.05, "router": "topk", "aux_loss_coef": 0.0}
    settings |= {"router_learning_rate": 1e-2, "importance_batches": 1}

    def run(name, **changes):
        caplog.clear()
        result = train(collapsing_model(tiny_checkpoint), DATA, TrainConfig(**settings | changes), tmp_path / name)
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        entropy = [record["load_entropy"] for record in log if record["event"] == "step"]
        told = [(record["step"], record["layers"]) for record in log if record["event"] == "collapse"]
        warnings = [
            r.getMessage() for r in caplog.records if r.name == "usaf_ext.collapse" and r.levelname == "WARNING"
        ]
        return result, entropy, told, warnings

    lost, entropy, told, warnings = run("lost", router_learning_rate=1e-6)
    assert {layer.layer for layer in lost.collapsed} == {0, 1}
    assert all(layer.swamping == (0, 1) for layer in lost.collapsed)
    assert len(told) == 1  # though it is collapsed in every window
    assert told[0][0] == 2
    assert len(warnings) == 2
    assert max(entropy[-1]) < 0.6

    rescued, entropy, told, warnings = run("rescued", router_warmup_steps=15, aux_loss_coef=1.0)
    assert rescued.collapsed == []
    assert told[0][0] == 2
    assert told[-1][1] == []
    assert min(entropy[-1]) > 0.9 > 0.6 > max(entropy[0])
