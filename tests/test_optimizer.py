"""MaskedAdam against torch.optim.AdamW and clip_grad_norm_ on dense parameters."""

from __future__ import annotations

import io

import pytest
import torch
from trained_models import (
    bank_state,
    banked_model,
    dense_twin,
    every_nth,
    give_gradient,
    neuron_gradients,
    paged_model,
    same_bits,
    tokens,
)
from usaf_ext import UsafError, paged_layers
from usaf_ext.bank import share_gradients
from usaf_ext.loss import causal_lm_loss
from usaf_ext.optimizer import MAX_SKIPPED_STEPS, MaskedAdam
from usaf_ext.router import train_routers, trained_routers
from usaf_ext.selection import attach

pytestmark = pytest.mark.usefixtures("one_thread", "device")


def backward(model, ids, scale=1.0):
    total, count = causal_lm_loss(model, ids)
    (scale * total / count).backward()


def trained_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_on_the_masters(tiny_checkpoint, weight_decay):
    model = banked_model(tiny_checkpoint, master_dtype=torch.float32)
    layers = paged_layers(model)
    dense = [torch.nn.Parameter(layer.bank.master.double()) for layer in layers]
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    ours, theirs = MaskedAdam(model, **options), torch.optim.AdamW(dense, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    for _ in range(6):
        for layer, parameter in zip(layers, dense):
            gradient = torch.randn_like(layer.bank.grad)
            give_gradient(layer, gradient)
            parameter.grad = gradient.double()
        for optimizer, schedule in zip((ours, theirs), schedules):
            optimizer.step()
            schedule.step()
    for layer, parameter in zip(layers, dense):
        torch.testing.assert_close(layer.bank.master.double(), parameter.detach(), rtol=1e-5, atol=1e-6)
        assert set(ours.state[layer.anchor]["step"].unique().tolist()) == {6}
    ours.check_progress()


def test_routers_get_torchs_adamw_and_no_decay(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    train_routers(model)
    optimizer = MaskedAdam(model, lr=1e-2, router_lr=3e-3, weight_decay=0.5)
    weights = [router.weight for router in trained_routers(model).values()]
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    on_gpu = copies[0].device.type != "cpu"
    theirs = torch.optim.AdamW(copies, lr=3e-3, weight_decay=0.0, foreach=False, capturable=on_gpu)
    for seed in range(3):
        backward(model, tokens(2, seed=seed))
        for weight, parameter in zip(weights, copies):
            parameter.grad = weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        theirs.step()
    for weight, parameter in zip(weights, copies):
        assert torch.equal(weight, parameter)
    assert [group["name"] for group in optimizer.param_groups] == ["experts", "router"]
    banks = sum(layer.bank.num_parameters for layer in paged_layers(model))
    assert optimizer.num_parameters == banks + sum(w.numel() for w in weights)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_clipping_is_that_of_the_dense_gradients(tiny_checkpoint, micro_batches):
    model = banked_model(tiny_checkpoint)
    dense = dense_twin(tiny_checkpoint, model)
    train_routers(model)
    dense_routers = [dense.get_submodule(name).weight.requires_grad_(True) for name in trained_routers(model)]
    optimizer = MaskedAdam(model, lr=1e-3)
    for seed in range(micro_batches):
        ids = tokens(2, seed=seed)
        backward(model, ids, 1 / micro_batches)
        (dense(ids, labels=ids).loss / micro_batches).backward()
    rows = []
    for layer in paged_layers(model):
        at = layer.bank.neuron_expert.long(), layer.bank.neuron_index.long()
        rows.append(torch.nn.Parameter(torch.zeros_like(layer.bank.grad, dtype=torch.float64)))
        rows[-1].grad = neuron_gradients(dense, layer)[at]
        torch.testing.assert_close(layer.anchor.grad.double(), rows[-1].grad.norm().reshape(1), rtol=1e-4, atol=0)
    unclipped = torch.nn.utils.get_total_norm([p.grad for p in [*rows, *dense_routers]])
    limit = unclipped.item() / 3
    expected = torch.nn.utils.clip_grad_norm_([*rows, *dense_routers], limit)
    got = torch.nn.utils.clip_grad_norm_(trained_parameters(optimizer), limit)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    optimizer.step()
    for layer, row in zip(paged_layers(model), rows):
        moment = optimizer.state[layer.anchor]["exp_avg"].double() / 0.1  # of the first step: the clipped gradient
        torch.testing.assert_close(moment, row.grad, rtol=1e-3, atol=1e-4 * row.grad.abs().max().item())
    for router, parameter in zip(trained_routers(model).values(), dense_routers):
        torch.testing.assert_close(router.weight.grad.double(), parameter.grad, rtol=1e-3, atol=1e-6)


def test_rows_of_experts_without_tokens_keep_every_bit(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model, lr=1e-2, weight_decay=0.1)
    backward(model, tokens(4))
    optimizer.step()
    layer = paged_layers(model)[0]
    bank = layer.bank
    before, moment = bank_state(model)[0], optimizer.state[layer.anchor]["exp_avg"].clone()
    x, index, weights = torch.randn(8, 72), torch.tensor([[1, 4]] * 8), torch.rand(8, 2)
    layer(*(tensor.to(layer.device) for tensor in (x, index, weights))).square().sum().backward()
    optimizer.step()
    after, hit = bank_state(model)[0], torch.isin(bank.neuron_expert, torch.tensor([1, 4], device=bank.device))
    assert 0 < int(hit.sum()) < len(hit)
    for name in before:
        same = (before[name] == after[name]).flatten(1).all(1)
        assert bool(same[~hit].all()), name
        assert not bool(same[hit].any() if name == "master" else same[hit].all()), name
    state = optimizer.state[layer.anchor]
    assert torch.equal(state["exp_avg"][~hit], moment[~hit])
    assert state["step"][hit].unique().tolist() == [2]
    assert set(state["step"][~hit].unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("where", ["bank", "router"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_non_finite_gradients_change_no_bit(tiny_checkpoint, where, value, clip):
    model = banked_model(tiny_checkpoint)
    train_routers(model)
    optimizer = MaskedAdam(model, lr=1e-2)
    backward(model, tokens(2))
    optimizer.step()
    optimizer.zero_grad()
    weights = [router.weight for router in trained_routers(model).values()]
    before = [bank_state(model), [w.detach().clone() for w in weights]]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in trained_parameters(optimizer)]
    for _ in range(MAX_SKIPPED_STEPS):
        optimizer.check_progress()
        backward(model, tokens(2))
        if where == "bank":
            layer = paged_layers(model)[1]
            layer.bank.grad[0, 0, 0] = value
            layer.anchor.grad.fill_(value)
        else:
            weights[0].grad[0, 0] = value
        if clip:
            torch.nn.utils.clip_grad_norm_(trained_parameters(optimizer), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(before, [bank_state(model), [w.detach() for w in weights]])
    assert same_bits(states, [dict(optimizer.state[p]) for p in trained_parameters(optimizer)])
    with pytest.raises(UsafError, match="not finite"):
        optimizer.check_progress()
    backward(model, tokens(2))
    optimizer.step()
    optimizer.check_progress()
    assert not same_bits(before[0], bank_state(model))


def test_training_that_stands_still_is_an_error(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model, lr=1e-30)
    backward(model, tokens(2))
    optimizer.step()
    with pytest.raises(UsafError, match="changed no trained weight"):
        optimizer.check_progress()
    optimizer.check_progress()  # nothing new since
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model, tokens(2))
    optimizer.step()
    optimizer.check_progress()  # lr 0 is meant to stand still


def test_step_and_zero_grad_clear_the_banks(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model)
    for clear in (optimizer.step, optimizer.zero_grad):
        backward(model, tokens(2))
        assert all(layer.bank.grad.any() and layer.bank.expert_hit.any() for layer in paged_layers(model))
        clear()
        for layer in paged_layers(model):
            assert not layer.bank.grad.any()
            assert not layer.bank.expert_hit.any()
            assert layer.anchor.grad is None
    assert all(layer.anchor.item() == 0 for layer in paged_layers(model))


@pytest.mark.parametrize(
    ("mode", "moments", "placement"),
    [
        ("master", "fp32", "device"),
        ("in_place", "8bit", "device"),
        ("residual", "8bit", "host"),
        ("eco", "fp32", "host"),
    ],
)
def test_state_dict_continues_bit_for_bit(tiny_checkpoint, mode, moments, placement):
    def fresh():
        model = banked_model(tiny_checkpoint, mode=mode, placement=placement)
        train_routers(model)
        return model, MaskedAdam(model, lr=1e-2, seed=7, moments=moments)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            backward(model, tokens(2, seed=seed))
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    assert optimizer.state_dict()["state"] == {}
    steps(model, optimizer, [1, 2])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, other = fresh()
    for mine, theirs in zip(paged_layers(twin), paged_layers(model)):
        for name, rows in mine.bank.rows.items():
            rows.copy_(theirs.bank.rows[name])
        mine.bank.publish()
    for mine, theirs in zip(trained_routers(twin).values(), trained_routers(model).values()):
        mine.weight.data.copy_(theirs.weight)
    other.load_state_dict(saved)
    steps(model, optimizer, [3, 4])
    steps(twin, other, [3, 4])
    assert same_bits(bank_state(model), bank_state(twin))
    assert same_bits(optimizer.state_dict(), other.state_dict())


def test_in_place_noise_follows_the_seed(tiny_checkpoint):
    results = []
    for seed in (1, 1, 2):
        model = banked_model(tiny_checkpoint, mode="in_place")
        optimizer = MaskedAdam(model, lr=1e-3, seed=seed)
        backward(model, tokens(2))
        optimizer.step()
        optimizer.check_progress()
        results.append(bank_state(model))
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])


def test_in_place_noise_differs_between_layers(tiny_checkpoint):
    """Two layers with the same rows and the same gradient round apart."""
    model = banked_model(tiny_checkpoint, mode="in_place")
    first, second = (layer.bank for layer in paged_layers(model))
    rows = min(first.num_neurons, second.num_neurons)
    second.codes[:rows] = first.codes[:rows]
    second.absmax[:rows] = first.absmax[:rows]
    gradient = torch.randn_like(first.grad[:rows])
    optimizer = MaskedAdam(model, lr=1e-2)
    for layer in paged_layers(model):
        padded = torch.zeros_like(layer.bank.grad)
        padded[:rows] = gradient
        give_gradient(layer, padded)
    optimizer.step()
    assert not torch.equal(first.codes[:rows], second.codes[:rows])


@pytest.mark.parametrize("mode", ["master", "in_place"])
def test_stepping_layers_one_by_one_gives_the_bits_of_a_step(tiny_checkpoint, mode):
    """Gradient release: last layer first, in one shared buffer; the anchors get their gradients afterwards."""
    together, released = (banked_model(tiny_checkpoint, mode=mode) for _ in range(2))
    for model in (together, released):
        train_routers(model)
    one, many = (MaskedAdam(model, lr=1e-2, weight_decay=0.1) for model in (together, released))
    share_gradients(paged_layers(released))
    buffers = {layer.bank.grad.untyped_storage().data_ptr() for layer in paged_layers(released)}
    assert len(buffers) == 1
    gradients = [layer.bank.grad.nbytes for layer in paged_layers(released)]
    assert one.bank_bytes()["device"] - many.bank_bytes()["device"] == sum(gradients) - max(gradients)
    for seed in range(2):
        backward(together, tokens(2, seed=seed))
        gradients = [(layer.bank.grad.clone(), layer.bank.expert_hit.clone()) for layer in paged_layers(together)]
        for router, twin in zip(trained_routers(together).values(), trained_routers(released).values()):
            twin.weight.grad = router.weight.grad.clone()
        for layer, (gradient, hit) in reversed(list(zip(paged_layers(released), gradients))):
            assert not layer.bank.grad.any()
            give_gradient(layer, gradient)
            layer.bank.expert_hit.copy_(hit)
            many.step_layer(layer)
        for optimizer in (one, many):
            optimizer.step()
            optimizer.zero_grad()
            optimizer.check_progress()
    assert same_bits(bank_state(together), bank_state(released))
    assert same_bits(one.state_dict(), many.state_dict())


def test_a_released_layer_is_scaled_and_skipped_as_told(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    train_routers(model)
    optimizer = MaskedAdam(model, lr=1e-2)
    first, second = paged_layers(model)
    gradient = torch.randn_like(second.bank.grad)
    give_gradient(second, gradient)
    optimizer.step_layer(second, coefficient=0.5)
    torch.testing.assert_close(optimizer.state[second.anchor]["exp_avg"], 0.05 * gradient)
    before = [bank_state(model), [r.weight.detach().clone() for r in trained_routers(model).values()]]
    give_gradient(first, torch.full_like(first.bank.grad, float("inf")))
    optimizer.step_layer(first)
    for router in trained_routers(model).values():
        router.weight.grad = torch.ones_like(router.weight)
    optimizer.step()
    assert same_bits(before, [bank_state(model), [r.weight.detach() for r in trained_routers(model).values()]])
    give_gradient(first, torch.randn_like(first.bank.grad))
    optimizer.step_layer(first, found_inf=torch.ones(1, device=first.device))
    assert same_bits(before[0], bank_state(model))
    assert not first.bank.grad.any()


def test_bad_layers_to_step(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    layer = paged_layers(model)[0]
    optimizer = MaskedAdam(model)
    with pytest.raises(ValueError, match="layer: expected one of this optimizer"):
        optimizer.step_layer(paged_layers(banked_model(tiny_checkpoint))[0])
    optimizer.step_layer(layer)
    with pytest.raises(ValueError, match="stepped already"):
        optimizer.step_layer(layer)
    optimizer.step()
    optimizer.step_layer(layer)
    layer.set_bank(None)
    with pytest.raises(ValueError, match="bank in place"):
        optimizer.step_layer(layer)
    with pytest.raises(ValueError, match="none has a trainable bank"):
        share_gradients([layer])


def test_without_clipping_the_coefficient_is_exactly_one(tiny_checkpoint):
    """The anchor's gradient is a sum of rounded increments; the moments must not see that rounding."""
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model, betas=(0.5, 0.5))
    layer = paged_layers(model)[0]
    gradient = torch.randn_like(layer.bank.grad)
    give_gradient(layer, gradient)
    layer.anchor.grad *= 1 + 2.0**-20
    optimizer.step()
    assert torch.equal(optimizer.state[layer.anchor]["exp_avg"], 0.5 * gradient)


def test_bad_arguments(tiny_checkpoint):
    model = paged_model(tiny_checkpoint)
    with pytest.raises(ValueError, match="nothing to train: no layer has a trainable bank"):
        MaskedAdam(model)
    with pytest.raises(ValueError, match="paged experts"):
        MaskedAdam(torch.nn.Linear(2, 2))
    attach(model, every_nth(model), originals=model.usaf_originals)
    for arguments, message in [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"router_lr": float("inf")}, "router_lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"moments": "4bit"}, "moments"),
    ]:
        with pytest.raises(ValueError, match=message):
            MaskedAdam(model, **arguments)
    assert MaskedAdam(paged_layers(model)).num_parameters > 0
    with pytest.raises(ValueError, match=r"betas: mode 'eco'"):
        MaskedAdam(banked_model(tiny_checkpoint, mode="eco"), betas=(0.0, 0.9))


def test_state_of_another_selection_is_refused(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model)
    backward(model, tokens(2))
    optimizer.step()
    saved = optimizer.state_dict()
    attach(model, every_nth(model, 7), originals=model.usaf_originals)
    other = MaskedAdam(model)
    with pytest.raises(ValueError, match="another selection"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"expected \['exp_avg', 'exp_avg_absmax'"):
        MaskedAdam(model, moments="8bit").load_state_dict(saved)
    assert other.state_dict()["state"] == {}
