"""Loss scaling, and gradient release: a layer's rows updated inside backward."""

from __future__ import annotations

import math

import devices
import pytest
import torch
from test_training import BASE, DATA, StopAfter, final_state, log
from trained_models import bank_state, banked_model, paged_model, same_bits, tokens
from usaf_ext import MaskedAdam, TrainConfig, UsafError, paged_layers, train
from usaf_ext.layer_major import MicroBatchThreads
from usaf_ext.loss import causal_lm_loss
from usaf_ext.router import train_routers
from usaf_ext.step import run_micro_batches
from usaf_ext.update import Update

pytestmark = pytest.mark.usefixtures("one_thread", "device")

LAYER = {"accumulation_order": "layer", "gradient_accumulation_steps": 2, "batch_size": 2}
RELEASE = LAYER | {"gradient_release": True}


def config(**changes):
    return TrainConfig(**{**BASE, **changes})


def scaler_from(scale, monkeypatch):
    """Let runs begin with this loss scale."""
    original = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **options: original(*args, init_scale=scale, **options))


# Loss scaling


def test_float16_trains_in_both_orders_and_resumes(tiny_checkpoint, tmp_path):
    settings = config(router="topk", gradient_accumulation_steps=2, batch_size=2, router_warmup_steps=1)
    states = []
    for order in ("micro_batch", "layer"):
        model = paged_model(tiny_checkpoint, torch.float16)
        changed = TrainConfig(**settings.to_json() | {"accumulation_order": order})
        result = train(model, DATA, changed, tmp_path / order, eval_datasets={"new": DATA})
        states.append(final_state(model, tmp_path / order))
        assert result.evaluations["new"][6] < result.evaluations["new"][0] - 0.1
    assert same_bits(*states)
    steps = log(tmp_path / "layer", "step")
    assert all(record["loss_scale"] == 65536 and not record["skipped"] for record in steps)
    assert steps == log(tmp_path / "micro_batch", "step")
    exact = paged_model(tiny_checkpoint, torch.float32)
    train(exact, DATA, settings, tmp_path / "exact")
    expected = log(tmp_path / "exact", "step")
    assert all("loss_scale" not in record for record in expected)
    for record, wanted in zip(steps[:2], expected):  # later ones follow other roundings
        assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.05)

    parts = paged_model(tiny_checkpoint, torch.float16)
    with pytest.raises(KeyboardInterrupt):
        train(parts, DATA, settings, tmp_path / "parts", callbacks=[StopAfter(3)])
    resumed = paged_model(tiny_checkpoint, torch.float16)
    train(resumed, DATA, settings, tmp_path / "parts", resume=True)
    assert same_bits(final_state(resumed, tmp_path / "parts"), states[0])


def test_a_step_that_overflows_changes_no_bit_and_halves_the_scale(tiny_checkpoint, tmp_path, monkeypatch):
    """And the scale is part of a checkpoint: the resumed run goes on at a quarter of what it would begin with."""
    scaler_from(2.0**40, monkeypatch)
    states = []

    def keep(record):
        states.append((record, bank_state(model)))
        if record["step"] == 2:
            StopAfter(2)(record)

    model = paged_model(tiny_checkpoint, torch.float16)
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, config(steps=4), tmp_path / "run", callbacks=[keep])
    model = paged_model(tiny_checkpoint, torch.float16)
    train(model, DATA, config(steps=4), tmp_path / "run", resume=True, callbacks=[keep])
    assert [record["loss_scale"] for record, _ in states] == [2.0**40, 2.0**39, 2.0**38, 2.0**37]
    for record, banks in states:
        assert record["skipped"]
        assert record["grad_norm"] is None
        assert same_bits(banks, states[0][1])


@pytest.mark.parametrize("release", [False, True])
def test_skipping_every_step_is_an_error(tiny_checkpoint, tmp_path, monkeypatch, release):
    scaler_from(2.0**100, monkeypatch)
    model = paged_model(tiny_checkpoint, torch.float16)
    settings = config(steps=12, **(RELEASE if release else {}))
    with pytest.raises(UsafError, match="the last 10 steps were skipped: their gradients were not finite"):
        train(model, DATA, settings, tmp_path / "run")
    assert not any(math.isfinite(record["grad_norm"] or math.inf) for record in log(tmp_path / "run", "step"))


@pytest.mark.parametrize("unscale", [False, True])
def test_masked_adam_under_a_grad_scaler(tiny_checkpoint, unscale):
    """As any trainer uses it; the scale of 1024 leaves no trace."""
    masters = []
    for scaler in (None, torch.amp.GradScaler(devices.current().type, init_scale=1024.0)):
        model = banked_model(tiny_checkpoint, master_dtype=torch.float32)
        routers = train_routers(model)
        optimizer = MaskedAdam(model, lr=1e-2)
        for seed in range(3):
            loss = causal_lm_loss(model, tokens(2, seed=seed))[0]
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        rows = [layer.bank.master for layer in paged_layers(model)]
        masters.append([*rows, *(router.weight.detach() for router in routers.values())])
    for first, second in zip(*masters):
        assert (first - second).abs().max() < 1e-4  # three steps of 1e-2


@pytest.mark.parametrize("where", ["here", "on another rank"])
def test_masked_adam_skips_what_a_grad_scaler_found(tiny_checkpoint, where):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model, lr=1e-2)
    scaler = torch.amp.GradScaler(devices.current().type, init_scale=1024.0)
    before = bank_state(model)
    scaler.scale(causal_lm_loss(model, tokens(2))[0]).backward()
    if where == "here":
        paged_layers(model)[0].anchor.grad.fill_(math.inf)
    scaler.unscale_(optimizer)
    if where == "on another rank":  # as FSDP's scaler reduces it; the gradients here are finite
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        found[paged_layers(model)[0].device].fill_(1)
    scaler.step(optimizer)
    scaler.update()
    assert same_bits(bank_state(model), before)
    assert scaler.get_scale() == 512


# Gradient release


def gradient_bytes(model):
    storages = {bank.grad.untyped_storage().data_ptr(): bank.grad.untyped_storage().nbytes() for bank in banks(model)}
    return sum(storages.values())


def banks(model):
    return [layer.bank for layer in paged_layers(model)]


@pytest.mark.parametrize("changes", [{}, {"mode": "in_place"}, {"router": "topk", "router_warmup_steps": 2}])
def test_release_without_clipping_has_the_same_bits_and_one_gradient(tiny_checkpoint, tmp_path, changes):
    states, held = [], []
    for settings in (LAYER, RELEASE):
        model = paged_model(tiny_checkpoint)
        out_dir = tmp_path / str(len(held))
        train(model, DATA, config(max_grad_norm=None, **settings, **changes), out_dir)
        states.append((final_state(model, out_dir), log(out_dir, "step")))
        held.append(gradient_bytes(model))
    assert same_bits(*(state for state, _ in states))
    assert states[0][1] == states[1][1]
    sizes = [bank.num_parameters * 4 for bank in banks(model)]
    assert held == [sum(sizes), max(sizes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_release_resumes_bit_for_bit(tiny_checkpoint, tmp_path, dtype):
    settings = config(**RELEASE, router="topk", max_grad_norm=0.1)
    whole, parts = paged_model(tiny_checkpoint, dtype), paged_model(tiny_checkpoint, dtype)
    result = train(whole, DATA, settings, tmp_path / "whole", eval_datasets={"new": DATA})
    assert result.evaluations["new"][6] < result.evaluations["new"][0] - 0.1
    with pytest.raises(KeyboardInterrupt):
        train(parts, DATA, settings, tmp_path / "parts", callbacks=[StopAfter(3)])
    resumed = paged_model(tiny_checkpoint, dtype)
    train(resumed, DATA, settings, tmp_path / "parts", resume=True)
    assert same_bits(final_state(whole, tmp_path / "whole"), final_state(resumed, tmp_path / "parts"))


class Coefficients:
    """In the place of an optimiser's step_layer: what it is called with, before it runs."""

    def __init__(self, optimizer, before=lambda layer: None):
        self.run, self.before, self.seen = optimizer.step_layer, before, {}
        optimizer.step_layer = self

    def __call__(self, layer, coefficient, found_inf=None):
        self.before(layer)
        self.seen[layer.index] = (float(layer.bank.grad.double().norm()), float(coefficient))
        self.run(layer, coefficient, found_inf)


def one_step(model, update):
    layers = paged_layers(model)
    batches = [tokens(2, seed=seed) for seed in (1, 2)]
    with MicroBatchThreads() as threads:
        hooks = {"scale": update.scale, "after_backward": update.after_backward}
        losses = run_micro_batches(model, batches, layers, {}, 0.0, (), threads=threads, **hooks)
    return update.step(losses)


def test_each_layer_is_clipped_by_its_own_norm(tiny_checkpoint):
    norms = {}
    for limit in (None, 1e-3):
        model = banked_model(tiny_checkpoint)
        update = Update(model, paged_layers(model), config(**RELEASE, max_grad_norm=limit))
        coefficients = Coefficients(update.optimizer)
        record = one_step(model, update)
        assert record["grad_norm"] == pytest.approx(math.hypot(*(norm for norm, _ in coefficients.seen.values())))
        for norm, coefficient in coefficients.seen.values():
            assert norm > 1e-3
            assert coefficient == pytest.approx(1.0 if limit is None else limit / norm, rel=2e-3)
        norms[limit] = [norm for norm, _ in coefficients.seen.values()]
    assert norms[None] == norms[1e-3]


def test_a_layer_that_is_not_finite_keeps_its_bits_alone(tiny_checkpoint):
    """And the step is reported: the routers and later layers of it are judged by MaskedAdam.step."""
    model = banked_model(tiny_checkpoint)
    routers = train_routers(model)
    update = Update(model, paged_layers(model), config(**RELEASE))

    def spoil(layer):
        if layer.index == 1:
            layer.bank.grad[0, 0, 0] = math.inf
            layer.bank.grad_squares[0] = math.inf
            layer.anchor.grad = torch.full_like(layer.anchor, math.inf)

    Coefficients(update.optimizer, spoil)
    before, weights = bank_state(model), [router.weight.clone() for router in routers.values()]
    record = one_step(model, update)
    assert record["skipped"]
    after = bank_state(model)
    assert [same_bits(*pair) for pair in zip(before, after)] == [False, True]
    assert same_bits(weights, [router.weight.detach() for router in routers.values()])
    del update.optimizer.step_layer  # the class's own again
    assert not one_step(model, update)["skipped"]
    assert not same_bits(after[1], bank_state(model)[1])


def test_a_rerouted_layer_is_not_updated(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    update = Update(model, paged_layers(model), config(**RELEASE))
    before = bank_state(model)
    layer = paged_layers(model)[1]
    Coefficients(update.optimizer)
    layer.note_route(*(torch.tensor(route, device=layer.device) for route in ([0, 1], [0, 2])))
    with pytest.raises(UsafError, match=rf"the recompute of {layer.name} sent tokens to other experts"):
        one_step(model, update)
    assert same_bits(bank_state(model)[1], before[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gradient_release": True}, ValueError, "gradient_release: .*only with accumulation_order 'layer'"),
        ({"gradient_release": 1}, TypeError, "gradient_release: expected a bool, got 1"),
        ({"gradient_checkpointing": "yes"}, TypeError, "gradient_checkpointing: expected a bool"),
        (RELEASE | {"optimizer": None}, ValueError, "gradient_release: with optimizer None nothing is updated"),
        ({"accumulation_order": "page"}, ValueError, "accumulation_order: expected one of"),
        ({"accumulation_order": None}, ValueError, "accumulation_order: expected one of"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        config(**changes)
