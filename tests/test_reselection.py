"""Re-selection: what is dropped and grown, and that nothing learnt is lost by it."""

from __future__ import annotations

import devices
import pytest
import torch
from tiny_models import all_tensors
from trained_models import (
    bank_state,
    banked_model,
    dense_twin,
    every_nth,
    neuron_gradients,
    paged_model,
    same_bits,
    tokens,
)
from usaf_ext import expert_store, paged_layers
from usaf_ext.bank import share_gradients
from usaf_ext.delta import apply_delta, delta_of, read_delta, write_delta
from usaf_ext.experts import trained_banks
from usaf_ext.export import export
from usaf_ext.loss import causal_lm_loss
from usaf_ext.optimizer import MaskedAdam
from usaf_ext.reselection import plan_exchange, reselect
from usaf_ext.selection import Selection, attach, compute_importance

pytestmark = pytest.mark.usefixtures("one_thread", "device")

SIZE = 6 * 24  # neurons of a layer


def train_steps(model, optimizer, seeds):
    for seed in seeds:
        total, count = causal_lm_loss(model, tokens(2, seed=seed))
        (total / count).backward()
        optimizer.step()


def logits(model):
    with torch.no_grad():
        return model(tokens(2, seed=9)).logits


def learnt_rows(model):
    """(layer, position) -> the bits of everything that was learnt there, trained or frozen."""
    return {
        (bank.layer, position): {name: tensor[i].clone() for name, tensor in bank.rows.items()}
        for bank in trained_banks(model)
        for i, position in enumerate(bank.positions.tolist())
    }


def moments_of(model, optimizer):
    return {
        (layer.index, position): {name: tensor[i].clone() for name, tensor in optimizer.state[layer.anchor].items()}
        for layer in paged_layers(model)
        if layer.bank is not None and optimizer.state[layer.anchor]
        for i, position in enumerate(layer.bank.positions.tolist())
    }


def trained_set(model):
    layers = [layer for layer in paged_layers(model) if layer.bank is not None]
    return {(layer.index, position) for layer in layers for position in layer.bank.positions.tolist()}


def importance_of(*grown, lowest=(), layers=2):
    """Importance 1 everywhere but high at `grown` and zero at `lowest`, (layer, position) each."""
    values = [torch.ones(SIZE) for _ in range(layers)]
    for rank, (layer, position) in enumerate(grown):
        values[layer][position] = 10.0 + rank
    for layer, position in lowest:
        values[layer][position] = 0.0
    return [part.reshape(6, 24) for part in values]


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_the_plan_is_that_of_plain_sorting(scope, fraction):
    generator = torch.Generator().manual_seed(3)
    importance = [torch.randint(0, 5, (6, 24), generator=generator).float() for _ in range(2)]  # many equals and zeros
    trained = [torch.randperm(SIZE, generator=generator)[:n].sort().values for n in (20, 31)]
    flat = {(i, p): float(values.reshape(-1)[p]) for i, values in enumerate(importance) for p in range(SIZE)}
    chosen = {(i, p) for i, positions in enumerate(trained) for p in positions.tolist()}
    expected_dropped, expected_grown = set(), set()
    for group in [[0, 1]] if scope == "model" else [[0], [1]]:
        mine = sorted((key for key in chosen if key[0] in group), key=lambda key: (flat[key], (-key[0], -key[1])))
        others = [key for key in flat if key[0] in group and key not in chosen and flat[key] > 0]
        others.sort(key=lambda key: (-flat[key], key))
        count = max(1, round(fraction * len(mine)))
        assert count < len(others)
        expected_dropped |= set(mine[:count])
        expected_grown |= set(others[:count])
    plan = plan_exchange(importance, trained, fraction, scope)
    assert {(i, p) for i, exchange in enumerate(plan) for p in exchange.dropped.tolist()} == expected_dropped
    assert {(i, p) for i, exchange in enumerate(plan) for p in exchange.grown.tolist()} == expected_grown
    for exchange in plan:
        for positions in (exchange.dropped, exchange.grown):
            assert torch.equal(positions, positions.sort().values)


def test_importance_is_that_of_the_model_as_it_is_now(tiny_checkpoint):
    """Over all neurons, with trained and frozen rows in place; no gradient is left behind."""
    model = banked_model(tiny_checkpoint, format="bf16")
    optimizer = MaskedAdam(model, lr=3e-2)
    train_steps(model, optimizer, range(2))
    reselect(model, optimizer, compute_importance(model, [tokens(2)], keep_banks=True), fraction=0.5)
    train_steps(model, optimizer, range(2, 4))
    dense = dense_twin(tiny_checkpoint, model)
    for layer in paged_layers(model):
        experts = dense.get_submodule(layer.name)
        gate, up = experts.gate_up_proj.data.chunk(2, dim=1)
        for bank in (layer.bank, layer.frozen_bank):
            e, j, rows = bank.neuron_expert.long(), bank.neuron_index.long(), bank.decode().double()
            gate[e, j], up[e, j] = rows[:, 0], rows[:, 1]
            experts.down_proj.data[e, :, j] = rows[:, 2]
    expected = [torch.zeros(6, 24, dtype=torch.float64, device=devices.current()) for _ in range(2)]
    for seed in range(2):
        ids = tokens(2, seed=seed)
        dense.zero_grad()
        dense(ids, labels=ids).loss.backward()
        for layer, values in zip(paged_layers(model), expected):
            values += neuron_gradients(dense, layer).square().sum((2, 3))
    got = compute_importance(model, [tokens(2, seed=seed) for seed in range(2)], keep_banks=True)
    for values, wanted in zip(got, expected):
        torch.testing.assert_close(values.double(), wanted, rtol=2e-3, atol=1e-6 * wanted.max().item())
    for layer in paged_layers(model):
        assert layer.bank is not None
        assert layer.frozen_bank is not None
        assert not layer.bank.grad.any()
        assert not layer.bank.expert_hit.any()
        assert layer.anchor.grad is None


@pytest.mark.parametrize(
    ("mode", "placement", "moments"),
    [
        ("master", "device", "fp32"),
        ("master", "host", "8bit"),
        ("residual", "host", "fp32"),
        ("residual", "device", "8bit"),
        ("in_place", "device", "fp32"),
        ("eco", "host", "fp32"),
    ],
)
def test_nothing_learnt_is_lost(tiny_checkpoint, mode, placement, moments):
    model = banked_model(tiny_checkpoint, mode=mode, placement=placement)
    optimizer = MaskedAdam(model, lr=1e-2, moments=moments)
    train_steps(model, optimizer, range(3))
    first, second = paged_layers(model)
    num_parameters = optimizer.num_parameters
    drop = [(0, first.bank.positions[3].item()), (1, second.bank.positions[0].item())]
    grow = [(0, 1), (1, 139)]  # not trained: every_nth takes 0, 5, .. and 1, 6, ..
    for round_, (dropped, grown, regrown) in enumerate([(drop, grow, 0), (grow, drop, 2)]):
        before = [logits(model), learnt_rows(model), moments_of(model, optimizer), trained_set(model)]
        done = reselect(model, optimizer, importance_of(*grown, lowest=dropped), fraction=2 / 58)
        assert (done.dropped, done.regrown, done.frozen) == (2, regrown, 2)
        after = [logits(model), learnt_rows(model), moments_of(model, optimizer), trained_set(model)]
        assert torch.equal(before[0], after[0])
        assert after[3] == before[3] - set(dropped) | set(grown)
        assert same_bits({key: after[1][key] for key in before[1]}, before[1])
        for key, entry in after[2].items():
            if key in before[2] and key not in grown:
                assert same_bits(entry, before[2][key])
            else:
                assert not any(tensor.any() for tensor in entry.values())
        assert after[2].keys() == after[3]
        train_steps(model, optimizer, range(3 + round_, 4 + round_))
        trained = learnt_rows(model)
        assert all(same_bits(trained[key], after[1][key]) for key in dropped)
        assert not all(same_bits(trained[key], after[1][key]) for key in grown)
        optimizer.check_progress()
    assert optimizer.num_parameters == num_parameters


def test_grown_masters_are_the_originals(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model)
    bank = paged_layers(model)[0].bank
    reselect(model, optimizer, importance_of((0, 27)), fraction=0.01, originals=model.usaf_originals)
    gate, up, down = model.usaf_originals.expert(0, 1)
    bank = paged_layers(model)[0].bank
    row = bank.master[(bank.positions == 27).nonzero().item()]
    assert same_bits(row, torch.stack([gate[3], up[3], down[:, 3]]))


def test_a_layer_may_lose_all_its_neurons_and_gain_them_again(tiny_checkpoint):
    model = paged_model(tiny_checkpoint)
    few = torch.tensor([2], dtype=torch.int32)
    attach(model, Selection((few, few[:0]), (few, few[:0]), 2 * SIZE), originals=model.usaf_originals)
    first, second = paged_layers(model)
    optimizer = MaskedAdam(model, lr=1e-2)
    share_gradients(paged_layers(model))
    train_steps(model, optimizer, range(2))
    for grown, holds in [((1, 30), second), ((0, 51), first)]:
        before = logits(model)
        reselect(model, optimizer, importance_of(grown), fraction=0.5)
        assert torch.equal(logits(model), before)
        assert [layer for layer in (first, second) if layer.bank is not None] == [holds]
        assert [p for group in optimizer.param_groups for p in group["params"]] == [holds.anchor]
        assert holds.bank.grad_buffer is not None
        train_steps(model, optimizer, range(2))
        optimizer.check_progress()
    assert first.frozen_bank.positions.tolist() == [2 * 24 + 2]
    assert second.frozen_bank.positions.tolist() == [30]


def test_a_shared_gradient_stays_shared(tiny_checkpoint):
    """All banks move to a larger buffer when one of them outgrows the old one."""
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model)
    share_gradients(paged_layers(model))
    old = paged_layers(model)[0].bank.grad_buffer
    reselect(model, optimizer, importance_of(*((0, p) for p in range(1, 30, 5))), fraction=6 / 58)
    buffers = [layer.bank.grad_buffer for layer in paged_layers(model)]
    assert buffers[0] is buffers[1]
    assert buffers[0] is not old
    assert len(buffers[0]) == max(layer.bank.num_parameters for layer in paged_layers(model))


def test_delta_and_export_give_the_model_that_was_evaluated(tiny_checkpoint, tmp_path):
    model = banked_model(tiny_checkpoint, master_dtype=torch.float32)
    optimizer = MaskedAdam(model, lr=1e-2)
    for seed in range(3):
        train_steps(model, optimizer, [seed])
        importance = compute_importance(model, [tokens(2, seed=seed)], keep_banks=True)
        reselect(model, optimizer, importance, fraction=0.3, originals=model.usaf_originals, master_dtype=torch.float32)
    assert all(layer.frozen_bank is not None for layer in paged_layers(model))
    write_delta(tmp_path / "d", delta_of(model))
    other = paged_model(tiny_checkpoint)
    apply_delta(other, read_delta(tmp_path / "d"))
    assert torch.equal(logits(other), logits(model))
    assert same_bits(learnt_rows(other), learnt_rows(model))
    assert same_bits(bank_state(other), bank_state(model))
    apply_delta(other, delta_of(banked_model(tiny_checkpoint)))
    assert all(layer.frozen_bank is None for layer in paged_layers(other))
    apply_delta(other, read_delta(tmp_path / "d"))
    attach(other, every_nth(other), originals=other.usaf_originals)
    assert all(layer.frozen_bank is None for layer in paged_layers(other))

    source, store = model.usaf_originals, expert_store(model)
    report = export(tmp_path / "out", source=source, store=store, banks=trained_banks(model), router={})
    learnt = learnt_rows(model)
    assert report.trained_weights == len(learnt) * 3 * 72
    assert len(learnt) > len(trained_set(model))
    original, written = all_tensors(tiny_checkpoint), all_tensors(tmp_path / "out")
    for (layer, position), rows in learnt.items():
        expert, neuron = divmod(position, 24)
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down"))
        master = rows["master"].bfloat16()
        original[gate][neuron], original[up][neuron], original[down][:, neuron] = master
    assert same_bits(original, written)


def test_bad_input(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    optimizer = MaskedAdam(model)
    train_steps(model, optimizer, [0])
    good = importance_of((0, 1))
    zero = [torch.zeros(6, 24)] * 2
    outside = [torch.zeros(SIZE), torch.zeros(SIZE)]
    for layer, values in zip(paged_layers(model), outside):
        values[layer.bank.positions] = 1.0
    before = [learnt_rows(model), moments_of(model, optimizer)]
    for importance, changes, message in [
        (good, {"fraction": 0.0}, r"fraction must lie in \(0, 1\)"),
        (good, {"fraction": 1.0}, "fraction"),
        (good, {"scope": "expert"}, "scope must be one of"),
        (good[:1], {}, "1 layers, trained 2"),
        ([good[0], torch.full((6, 24), float("nan"))], {}, "importance of layer 1 has negative or non-finite"),
        ([-good[0], good[1]], {}, "importance of layer 0 has negative"),
        (zero, {}, "zero for every neuron that is not trained"),
        ([values.reshape(6, 24) for values in outside], {}, "zero for every neuron that is not trained"),
        (good, {"master_dtype": torch.float16}, "master_dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            reselect(model, optimizer, importance, **({"fraction": 0.5} | changes))
    with pytest.raises(ValueError, match="trained is empty"):
        plan_exchange(good, [torch.empty(0, dtype=torch.int64)] * 2, 0.5)
    other = banked_model(tiny_checkpoint)
    with pytest.raises(ValueError, match="layer 0 does not belong"):
        optimizer.replace_banks([(paged_layers(other)[0], None)])
    assert same_bits(before, [learnt_rows(model), moments_of(model, optimizer)])
