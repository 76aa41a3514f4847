"""The activation threshold over a run: which counts decide, what is left out, and what the log says."""

from __future__ import annotations

import json

import pytest
import torch
from trained_models import banked_model, paged_model, tokens
from usaf_ext import TrainConfig, paged_layers, train
from usaf_ext.loss import causal_lm_loss
from usaf_ext.run_folder import RunFolder
from usaf_ext.threshold import ActivationThreshold

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = list(tokens(16, length=24, vocabulary=40))


def backward(model, seed):
    total, count = causal_lm_loss(model, tokens(2, seed=seed, vocabulary=40))
    (total / count).backward()
    return torch.stack([layer.token_counts for layer in paged_layers(model)]).long()


def under(counts, alpha):
    return counts < alpha * counts.double().mean(1, keepdim=True)


def hits(model):
    """Experts whose rows got a gradient since the last call."""
    found = torch.stack([layer.bank.expert_hit.bool() for layer in paged_layers(model)])
    for layer in paged_layers(model):
        assert not layer.bank.grad[~layer.bank.expert_hit.bool()[layer.bank.neuron_expert.long()]].any()
        layer.bank.zero_grad()
    return found


def test_forward_scope_judges_each_micro_batch(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    threshold = ActivationThreshold(paged_layers(model), 0.9, "forward")
    expected = torch.zeros(2, 6, dtype=torch.bool)
    masked, total = 0, torch.zeros(2, 6, dtype=torch.int64)
    for seed in (1, 2, 3):
        counts = backward(model, seed)
        expected |= (counts > 0) & ~under(counts, 0.9)
        masked += int(((counts > 0) & under(counts, 0.9)).sum())
        total += counts
    assert masked > 0
    assert torch.equal(hits(model), expected)
    assert threshold.end_step(total) == masked
    assert threshold.end_step(total) == 0


def test_step_scope_judges_by_the_previous_step(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    threshold = ActivationThreshold(paged_layers(model), 0.9, "step")
    first = backward(model, 1) + backward(model, 2)
    assert torch.equal(hits(model), first > 0)
    assert threshold.end_step(first) == 0
    left_out = under(first, 0.9)
    parts = [backward(model, 3), backward(model, 4)]
    assert left_out.any()
    assert torch.equal(hits(model), (sum(parts) > 0) & ~left_out)
    assert threshold.end_step(sum(parts)) == sum(int(((part > 0) & left_out).sum()) for part in parts)
    assert torch.equal(threshold.counts, sum(parts))


def test_zero_is_off_and_a_model_without_banks_counts_nothing(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    ActivationThreshold(paged_layers(model), 0.9, "forward")
    threshold = ActivationThreshold(paged_layers(model), 0.0, "forward")
    counts = backward(model, 1)
    assert torch.equal(hits(model), counts > 0)
    assert threshold.end_step(counts) == 0
    plain = paged_model(tiny_checkpoint)
    threshold = ActivationThreshold(paged_layers(plain), 0.9, "forward")
    counts = backward(plain, 1)
    assert under(counts, 0.9).any()
    assert threshold.end_step(counts) == 0


def test_bad_arguments(tiny_checkpoint):
    layers = paged_layers(paged_model(tiny_checkpoint))
    with pytest.raises(ValueError, match="scope: expected one of"):
        ActivationThreshold(layers, 0.1, "batch")
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        ActivationThreshold(layers, -0.1, "step")


def trained(checkpoint, out, **changes):
    settings = {
        "steps": 3,
        "batch_size": 8,
        "seq_len": 24,
        "density": 1.0,
        "learning_rate": 1e-3,
        "importance_batches": 1,
        "selection_metric": "random",
        "activation_threshold": 0.95,
        **changes,
    }
    train(paged_model(checkpoint), DATA, TrainConfig(**settings), out)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state = RunFolder.open(out).latest_checkpoint().optimizer["state"]
    return [r["masked_experts"] for r in records if r["event"] == "step"], [entry["step"] for entry in state.values()]


def test_in_step_scope_a_run_does_not_depend_on_how_a_step_is_cut(tiny_checkpoint, tmp_path):
    cut = {"batch_size": 2, "gradient_accumulation_steps": 4}
    masked, whole = trained(tiny_checkpoint, tmp_path / "whole")
    _, parts = trained(tiny_checkpoint, tmp_path / "parts", **cut)
    assert masked[0] == 0
    assert masked[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    forward = {"threshold_scope": "forward"}
    masked, whole = trained(tiny_checkpoint, tmp_path / "whole-forward", **forward)
    _, parts = trained(tiny_checkpoint, tmp_path / "parts-forward", **forward, **cut)
    assert masked[0] > 0
    assert not all(torch.equal(a, b) for a, b in zip(whole, parts))
    masked, steps = trained(tiny_checkpoint, tmp_path / "off", activation_threshold=0.0)
    assert masked == [0, 0, 0]
    assert all(bool((step == 3).all()) for step in steps)
