"""Runs that train the router and no expert: no bank, no importance; delta, resume, evaluation and export."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny_models import all_tensors, make_checkpoint
from trained_models import paged_model, tokens
from transformers import AutoModelForCausalLM
from usaf_ext import ModelSource, TrainConfig, UsafError, expert_store, paged_layers, train
from usaf_ext.delta import apply_delta
from usaf_ext.evaluation import evaluate
from usaf_ext.export import export
from usaf_ext.router import find_routers, trained_routers
from usaf_ext.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = list(tokens(16, length=24, vocabulary=40))
BASE = {
    "steps": 8,
    "batch_size": 4,
    "seq_len": 24,
    "density": 0.0,
    "router": "topk",
    "router_learning_rate": 3e-2,
    "aux_loss_coef": 0.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("router_only") / "checkpoint", dtype=torch.float32)


@pytest.mark.parametrize("router", ["topk", "gumbel"])
def test_a_router_only_run(checkpoint, tmp_path, router):
    model = paged_model(checkpoint)
    before = {name: module.weight.detach().clone() for name, module in find_routers(model).items()}
    run = tmp_path / "run"
    result = train(model, DATA, TrainConfig(**{**BASE, "router": router}), run, eval_datasets={"seen": DATA})
    assert all(layer.bank is None for layer in paged_layers(model))
    assert (result.density, result.trained_parameters) == (0.0, sum(w.numel() for w in before.values()))
    losses = result.evaluations["seen"]
    assert losses[8] < losses[0]
    assert all(not torch.equal(module.weight, before[name]) for name, module in trained_routers(model).items())
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert "selection" not in [record["event"] for record in records]
    steps = [record for record in records if record["event"] == "step"]
    assert all(record["learning_rate"] == 0 < record["router_learning_rate"] for record in steps)
    assert all(record["masked_experts"] == 0 < record["grad_norm"] for record in steps)
    tau = [record.get("gumbel_tau") for record in steps]
    if router == "gumbel":
        assert (tau[0], tau[-1]) == pytest.approx((1.0, 0.5))
        assert all(0 < later < earlier for earlier, later in itertools.pairwise(tau))
    else:
        assert not any(tau)

    saved = RunFolder.open(run).latest_checkpoint()
    assert not saved.delta.banks
    assert saved.delta.routers.keys() == before.keys()
    fresh = paged_model(checkpoint)
    apply_delta(fresh, saved.delta)
    assert evaluate(fresh, DATA, 4) == losses[8]

    source = ModelSource.open(checkpoint)
    weights = {f"{name}.weight": module.weight.detach() for name, module in trained_routers(model).items()}
    plain = tmp_path / "plain"
    export(plain, source=source, store=expert_store(model), banks=[], router=weights, base="original")
    original, exported = all_tensors(checkpoint), all_tensors(plain)
    assert {key for key in original if not torch.equal(original[key], exported[key])} == weights.keys()
    assert all(torch.equal(exported[key], weight) for key, weight in weights.items())
    folder = tmp_path / "dequantized"
    export(folder, source=source, store=expert_store(model), banks=[], router=weights, base="dequantized")
    assert evaluate(AutoModelForCausalLM.from_pretrained(folder), DATA, 4) == pytest.approx(losses[8], abs=1e-4)


def test_no_importance_is_measured(checkpoint, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("importance was measured")

    monkeypatch.setattr("usaf_ext.training.compute_importance", refuse)
    train(paged_model(checkpoint), DATA, TrainConfig(**{**BASE, "steps": 1}), tmp_path / "run")
    random = TrainConfig(**{**BASE, "steps": 1, "density": 0.1, "selection_metric": "random"})
    train(paged_model(checkpoint), DATA, random, tmp_path / "random")
    with pytest.raises(AssertionError, match="importance was measured"):
        train(paged_model(checkpoint), DATA, TrainConfig(**{**BASE, "density": 0.1}), tmp_path / "third")


def test_gumbel_refuses_before_anything_is_written(tmp_path):
    folder = make_checkpoint(tmp_path / "one", num_experts_per_tok=1)
    model = paged_model(folder)
    with pytest.raises(ValueError, match="chooses one expert a token"):
        train(model, DATA, TrainConfig(**{**BASE, "router": "gumbel"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not trained_routers(model)


def test_a_run_whose_gradients_are_all_zero_is_an_error(checkpoint, tmp_path):
    """The one chosen neuron sits in an expert that no token reaches."""
    model = paged_model(checkpoint)
    with torch.no_grad():
        for router in find_routers(model).values():
            router.weight.zero_()  # of equal logits, top-k takes the first experts
    settings = TrainConfig(steps=2, batch_size=4, seq_len=24, density=1e-6, selection_metric="random", seed=3)
    with pytest.raises(UsafError, match="step 2: nothing is trained, every gradient of the latest steps was zero"):
        train(model, DATA, settings, tmp_path / "run")
    (bank,) = [layer.bank for layer in paged_layers(model) if layer.bank is not None]
    assert bank.num_neurons == 1
