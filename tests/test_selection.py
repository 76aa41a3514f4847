"""Importance against a dense float64 oracle; selection by the top, in proportion and at random, and its edges."""

from __future__ import annotations

import itertools
import logging
from collections import Counter

import pytest
import torch
from trained_models import banked_model, dense_twin, neuron_gradients, paged_model, tokens
from usaf_ext import paged_layers
from usaf_ext.loss import causal_lm_loss
from usaf_ext.selection import attach, compute_importance, select_neurons, select_random

pytestmark = pytest.mark.usefixtures("one_thread")


def neuron_weights(dense, layer):
    """Weights of a layer's neurons in the dense twin: [E, I, 3, H] in the order gate, up, down column."""
    experts = dense.get_submodule(layer.name)
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    return torch.stack([gate, up, experts.down_proj.detach().transpose(1, 2)], dim=2)


@pytest.mark.parametrize("metric", ["gradient", "gradient_weight"])
def test_importance_is_summed_over_weights_and_batches(tiny_checkpoint, metric):
    model = paged_model(tiny_checkpoint)
    batches = [tokens(2, seed=1), tokens(2, seed=2)]
    importance = compute_importance(model, batches, metric)
    dense = dense_twin(tiny_checkpoint, model)
    expected = [torch.zeros(6, 24, dtype=torch.float64) for _ in importance]
    for batch in batches:
        dense.zero_grad()
        dense(batch, labels=batch).loss.backward()
        for total, layer in zip(expected, paged_layers(model)):
            gradients = neuron_gradients(dense, layer)
            if metric == "gradient":
                total += gradients.square().sum((2, 3))
            else:
                total += (gradients * neuron_weights(dense, layer)).abs().sum((2, 3))
    for got, want in zip(importance, expected):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * want.max().item())


def test_two_batches_are_the_sum_of_each(tiny_checkpoint):
    model = paged_model(tiny_checkpoint)
    first, second = tokens(2, seed=1), tokens(2, seed=2)
    both = compute_importance(model, [first, second])
    apart = [a + b for a, b in zip(compute_importance(model, [first]), compute_importance(model, [second]))]
    for got, want in zip(both, apart):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert bool((want > 0).any())


@pytest.mark.parametrize("metric", ["gradient", "gradient_weight"])
def test_float16_scales_the_loss_and_halves_what_overflows(tiny_checkpoint, monkeypatch, metric):
    """With 2^40 the first batch overflows many times; also under checkpointing, where a graph runs back only once."""
    batches = [tokens(2, seed=1), tokens(2, seed=2)]
    exact = compute_importance(paged_model(tiny_checkpoint), batches, metric)
    model = paged_model(tiny_checkpoint, torch.float16)
    model.train()
    model.activation_checkpointing_enable()
    results = [compute_importance(model, batches, metric)]
    monkeypatch.setattr("usaf_ext.selection.FLOAT16_SCALE", 2.0**40)
    results.append(compute_importance(model, batches, metric))
    for importance in results:
        for got, want in zip(importance, exact):
            assert (got - want).norm() < 0.05 * want.norm()


def test_later_backwards_do_not_count(tiny_checkpoint):
    model = paged_model(tiny_checkpoint)
    importance = compute_importance(model, [tokens(2)])
    before = [values.clone() for values in importance]
    total, count = causal_lm_loss(model, tokens(2, seed=5))
    (total / count).backward()
    assert all(torch.equal(old, values) for old, values in zip(before, importance))


def test_importance_leaves_banks_and_gradients_as_they_were(tiny_checkpoint):
    model = banked_model(tiny_checkpoint)
    banks = [layer.bank for layer in paged_layers(model)]
    compute_importance(model, [tokens(2)])
    for layer, bank in zip(paged_layers(model), banks):
        assert layer.bank is bank
        assert not bank.grad.any()
        assert layer.anchor.grad is None
    with pytest.raises(ValueError, match="batches is empty"):
        compute_importance(model, [])
    with pytest.raises(ValueError, match=r"metric must be one of .*, got 'random'"):
        compute_importance(model, [tokens(2)], "random")
    with pytest.raises(ValueError, match="paged experts"):
        compute_importance(torch.nn.Linear(2, 2), [tokens(2)])
    assert [layer.bank for layer in paged_layers(model)] == banks


def chosen(selection):
    return [
        sorted(zip(experts.tolist(), indices.tolist()))
        for experts, indices in zip(selection.neuron_expert, selection.neuron_index)
    ]


def test_whole_model_scope_takes_the_largest_anywhere():
    a = torch.tensor([[1.0, 9.0, 2.0], [0.0, 8.0, 3.0]])
    b = torch.tensor([[7.0, 0.0, 0.5], [0.0, 0.0, 10.0]])
    selection = select_neurons([a, b], 4 / 12)
    assert chosen(selection) == [[(0, 1), (1, 1)], [(0, 0), (1, 2)]]
    assert (selection.num_neurons, selection.num_candidates) == (4, 12)
    assert selection.density == pytest.approx(1 / 3)
    assert all(t.dtype == torch.int32 for t in (*selection.neuron_expert, *selection.neuron_index))
    per_layer = select_neurons([a * 100, b], 2 / 6, scope="layer")
    assert chosen(per_layer) == [[(0, 1), (1, 1)], [(0, 0), (1, 2)]]
    assert chosen(select_neurons([a * 100, b], 2 / 12)) == [[(0, 1), (1, 1)], []]


def test_equals_go_to_the_lower_neuron():
    flat = torch.ones(3, 50)
    assert chosen(select_neurons([flat, flat], 0.25)) == [[(p // 50, p % 50) for p in range(75)], []]
    assert chosen(select_neurons([flat], 1e-9)) == [[(0, 0)]]
    assert select_neurons([flat], 1.0).num_neurons == 150


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density"):
        select_neurons([torch.ones(2, 2)], density)


def test_importance_that_says_nothing_is_an_error():
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match="all layers is zero everywhere"):
        select_neurons([ones * 0, ones * 0], 0.5)
    with pytest.raises(ValueError, match="layer 1 is zero everywhere"):
        select_neurons([ones, ones * 0], 0.5, scope="layer")
    for bad in (float("nan"), float("inf"), -1.0):
        broken = ones.clone()
        broken[1, 0] = bad
        with pytest.raises(ValueError, match="layer 1 has negative or non-finite"):
            select_neurons([ones, broken], 0.5)
    with pytest.raises(ValueError, match="scope"):
        select_neurons([ones], 0.5, scope="expert")
    with pytest.raises(ValueError, match="importance is empty"):
        select_neurons([], 0.5)


def test_a_sample_follows_importance():
    """Each pair as often as drawing one neuron after the other says."""
    weights, draws = torch.tensor([[1.0, 2.0], [0.0, 5.0]]), 8000
    found = Counter(
        tuple(chosen(select_neurons([weights], 0.5, sampling="proportional", seed=seed))[0]) for seed in range(draws)
    )
    places = {(0, 0): 1.0, (0, 1): 2.0, (1, 1): 5.0}
    total = sum(places.values())
    for pair in itertools.combinations(places, 2):
        a, b = (places[place] / total for place in pair)
        expected = a * b / (1 - a) + b * a / (1 - b)
        assert abs(found.pop(pair) / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5
    assert not found  # the neuron without importance is never drawn before one with


def test_a_sample_is_its_seeds():
    importance = [torch.rand(6, 40), torch.rand(6, 40)]
    for scope in ("model", "layer"):
        first, again, other = (select_neurons(importance, 0.2, scope, "proportional", seed) for seed in (3, 3, 4))
        assert chosen(first) == chosen(again)
        assert chosen(first) != chosen(other)
        assert chosen(first) != chosen(select_neurons(importance, 0.2, scope))
        assert first.num_neurons == 96
        if scope == "layer":
            assert [len(part) for part in first.neuron_expert] == [48, 48]
            assert chosen(first)[0] != chosen(first)[1]


def test_a_sample_larger_than_what_has_importance(caplog):
    sparse = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    with caplog.at_level(logging.WARNING, logger="usaf_ext"):
        selection = select_neurons([sparse], 0.5, sampling="proportional", seed=1)
    assert chosen(selection) == [[(0, 0), (0, 1)]]
    assert "1 of 2 chosen neurons had no gradient" in caplog.text


def test_a_random_choice_is_even_and_its_seeds():
    sizes, draws = [(2, 3), (2, 2)], 4000
    found = Counter()
    for seed in range(draws):
        selection = select_random(sizes, 0.3, seed=seed)
        assert selection.num_neurons == 3
        found.update((layer, place) for layer, places in enumerate(chosen(selection)) for place in places)
    assert len(found) == 10
    assert all(abs(count / draws - 0.3) < 4 * (0.3 * 0.7 / draws) ** 0.5 for count in found.values())
    assert chosen(select_random(sizes, 0.3, seed=5)) == chosen(select_random(sizes, 0.3, seed=5))
    per_layer = select_random([(3, 10), (3, 20)], 0.1, "layer")
    assert [len(part) for part in per_layer.neuron_expert] == [3, 6]
    assert per_layer.num_candidates == 90
    everything = select_random(sizes, 1.0)
    assert chosen(everything) == [[(e, i) for e in range(2) for i in range(n)] for n in (3, 2)]
    for part in per_layer.neuron_index:
        assert part.dtype == torch.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": [(2, 3), (0, 3)]}, "sizes of layer 1: expected at least one expert"),
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"scope": "expert"}, "scope must be one of"),
        ({"seed": -1}, "seed must be an int of at least 0"),
        ({"seed": 1.5}, "seed must be an int of at least 0"),
    ],
)
def test_bad_random_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_random(**{"sizes": [(2, 3)], "density": 0.5, **arguments})


def test_bad_samplings():
    with pytest.raises(ValueError, match=r"sampling must be one of .*, got 'random'"):
        select_neurons([torch.ones(2, 2)], 0.5, sampling="random")
    with pytest.raises(ValueError, match="seed must be an int of at least 0"):
        select_neurons([torch.ones(2, 2)], 0.5, sampling="proportional", seed=-1)
    with pytest.raises(ValueError, match="layer 0 is zero everywhere"):
        select_neurons([torch.zeros(2, 2)], 0.5, "layer", "proportional")


def test_neurons_without_gradient_are_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="usaf_ext"):
        select_neurons([torch.tensor([[1.0, 0.0], [0.0, 0.0]])], 0.5)
    assert "1 of 2 chosen neurons had no gradient" in caplog.text


def test_attach_sets_banks_where_neurons_were_chosen(tiny_checkpoint):
    model = paged_model(tiny_checkpoint)
    importance = [torch.zeros(6, 24), torch.zeros(6, 24)]
    importance[1][4, 7] = 1.0
    (bank,) = attach(model, select_neurons(importance, 1e-6), originals=model.usaf_originals, mode="in_place")
    first, second = paged_layers(model)
    assert first.bank is None
    assert second.bank is bank
    assert (bank.neuron_expert.tolist(), bank.neuron_index.tolist(), bank.mode) == ([4], [7], "in_place")
    with pytest.raises(ValueError, match="selection has 1 layers, the model 2"):
        attach(model, select_neurons(importance[1:], 0.5))
    assert second.bank is bank
