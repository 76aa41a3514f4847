"""Gumbel routing: choices, weights and gradients of each family against float64 formulas; when there is no noise."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from tiny_models import tiny_config
from trained_models import bank_state, paged_model, same_bits, tokens
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
)
from usaf_ext import TrainConfig, UsafError, train
from usaf_ext.gumbel import GumbelNoise, gumbel_top_k, train_gumbel_routers
from usaf_ext.loss import causal_lm_loss
from usaf_ext.router import find_routers, train_routers, trained_routers

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "num_experts_per_tok": 3,
}
GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# Family -> (config, whether its weights are a softmax over the chosen experts rather than over all)
FAMILIES = {
    "qwen3_moe": (lambda: tiny_config(num_experts_per_tok=3), True),
    "qwen3_moe_plain": (lambda: tiny_config(num_experts_per_tok=3, norm_topk_prob=False), False),
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(
            **COMMON, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=16, norm_topk_prob=False
        ),
        False,
    ),
    "olmoe": (lambda: OlmoeConfig(**COMMON, num_experts=6, norm_topk_prob=False), False),
    "mixtral": (lambda: tiny_config("mixtral", num_experts_per_tok=3), True),
    "granitemoe": (lambda: GraniteMoeConfig(**COMMON, num_local_experts=6), True),
    "gpt_oss": (lambda: GptOssConfig(**COMMON, num_local_experts=6, head_dim=16), True),
}
REFUSED = {
    "deepseek_v3": (
        lambda: DeepseekV3Config(**{**COMMON, "num_key_value_heads": 2}, **GROUPED, **LATENT, moe_intermediate_size=16),
        r"mlp\.gate \(DeepseekV3TopkRouter\) is not a softmax over a plain top k",
    ),
    "glm4_moe": (
        lambda: Glm4MoeConfig(**COMMON, **GROUPED, moe_intermediate_size=16, head_dim=16),
        r"\(Glm4MoeTopkRouter\) is not a softmax",
    ),
    "top 1": (lambda: tiny_config(num_experts_per_tok=1), r"\(Qwen3MoeTopKRouter\) chooses one expert a token"),
}


def make(config, dtype=torch.float32):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        for router in find_routers(model).values():
            router.weight.normal_(std=0.3)
            if hasattr(router, "bias"):
                router.bias.normal_()
    return model


def noisy(model, seed=11, step=4, tau=0.7):
    noise = GumbelNoise(seed)
    noise.begin_step(step, tau)
    return noise, train_gumbel_routers(model, noise)


def oracle_noise(num_tokens, num_experts, seed, step, micro_batch, layer):
    groups = -(-num_experts // 4)
    words = oracles.philox_words(np.arange(num_tokens * groups, dtype=np.uint64), layer, step, micro_batch + 1, seed)
    uniform = ((words.reshape(num_tokens, -1)[:, :num_experts] >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23
    return torch.from_numpy(-np.log(-np.log(uniform)))


def oracle(logits, noise, top_k, tau, renormalise, grad_weights):
    """Weights, experts and the logits' gradient, token by token in float64, from the formulas of usaf_ext.gumbel."""
    weights, index, grad = [], [], torch.zeros_like(logits)
    for t, z in enumerate(logits):
        chosen = sorted(range(len(z)), key=lambda e: -float(z[e] + noise[t, e]))[:top_k]
        exps = z[chosen].exp()
        w = exps / (exps.sum() if renormalise else z.exp().sum())
        p = ((z[chosen] + noise[t, chosen]) / tau).exp()
        p = p / p.sum()
        v = grad_weights[t]
        grad[t, chosen] = float(w.sum()) * p * (v - (p * v).sum()) / tau
        weights.append(w)
        index.append(torch.tensor(chosen))
    return torch.stack(weights), torch.stack(index), grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_choice_weights_and_gradient(family, micro_batch):
    config, renormalise = FAMILIES[family]
    noise, routers = noisy(make(config))
    noise.micro_batch = micro_batch
    for layer, router in enumerate(routers.values()):
        router.train()
        hidden = torch.randn(30, router.weight.shape[1])
        logits, weights, index = router(hidden)
        exact = hidden.double() @ router.weight.detach().double().T
        if getattr(router, "bias", None) is not None:
            exact = exact + router.bias.double()
        g = oracle_noise(30, len(router.weight), 11, 4, micro_batch, layer)
        grad_weights = torch.randn(weights.shape)
        want_weights, want_index, want_grad = oracle(exact, g, 3, 0.7, renormalise, grad_weights.double())
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(index, want_index)
        torch.testing.assert_close(weights.double(), want_weights, rtol=1e-4, atol=1e-6)
        (weights * grad_weights).sum().backward()
        want = want_grad.T @ hidden.double()
        torch.testing.assert_close(router.weight.grad.double(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_has_no_noise(family):
    model = make(FAMILIES[family][0])
    plain = copy.deepcopy(model)
    train_routers(plain)
    _, routers = noisy(model)
    for name, router in trained_routers(plain).items():
        hidden = torch.randn(20, router.weight.shape[1])
        with_noise = routers[name].train()(hidden)[2]
        for got, want in zip(routers[name].eval()(hidden), router.eval()(hidden)):
            assert torch.equal(got, want)
        assert not torch.equal(with_noise, router(hidden)[2])
        assert isinstance(routers[name], type(find_routers(make(FAMILIES[family][0]))[name]))


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_one_expert_is_chosen_as_often_as_softmax_says(temperature):
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0, -0.3])
    draws = 20000
    noise = GumbelNoise(5)
    noise.begin_step(0, temperature)
    many = logits.expand(draws, 5)
    _, index = gumbel_top_k(many, noise.draw(0, many), 1, temperature, True)
    expected = torch.softmax(logits.double(), 0)
    frequency = torch.bincount(index.flatten(), minlength=5).double() / draws
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert bool(((frequency - expected).abs() < 4 * sigma).all())


def test_two_experts_are_drawn_without_replacement():
    logits, draws = torch.tensor([0.5, -1.0, 1.5, 0.0]), 20000
    noise = GumbelNoise(6)
    noise.begin_step(1, 1.0)
    many = logits.expand(draws, 4)
    _, index = gumbel_top_k(many, noise.draw(2, many), 2, 1.0, False)
    p = torch.softmax(logits.double(), 0)
    for first in range(4):
        for second in range(4):
            expected = 0.0 if first == second else float(p[first] * p[second] / (1 - p[first]))
            found = int(((index[:, 0] == first) & (index[:, 1] == second)).sum()) / draws
            assert abs(found - expected) <= 4 * (expected * (1 - expected) / draws) ** 0.5


def test_the_gradient_without_noise_at_tau_1_is_the_familys():
    logits = torch.randn(40, 6, dtype=torch.float32, requires_grad=True)
    grad_weights = torch.randn(40, 3)
    weights, index = gumbel_top_k(logits, torch.zeros(40, 6), 3, 1.0, True)
    chosen = torch.softmax(logits, -1).gather(-1, index)
    family = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, family)
    torch.testing.assert_close(
        *(torch.autograd.grad((w * grad_weights).sum(), logits, retain_graph=True)[0] for w in (weights, family)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_noise_is_a_function_of_its_keys():
    noise = GumbelNoise(1)
    like = torch.empty(8, 6)
    noise.begin_step(3, 1.0)
    first = noise.draw(0, like)
    assert torch.equal(noise.draw(0, like), first)
    assert not torch.equal(noise.draw(1, like), first)
    noise.micro_batch = 1
    assert not torch.equal(noise.draw(0, like), first)
    noise.begin_step(4, 1.0)
    assert noise.micro_batch == 0
    assert not torch.equal(noise.draw(0, like), first)
    noise.begin_step(3, 0.5)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    assert torch.equal(noise.draw(0, like), first)
    assert torch.equal(torch.get_rng_state(), state)


def keep(calls, module, args, output):
    calls.append([tensor.detach() for tensor in output])


def test_a_recompute_under_checkpointing_routes_the_same(tiny_checkpoint):
    gradients, outputs = [], []
    for checkpointing in (False, True):
        model = paged_model(tiny_checkpoint).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        noise, routers = noisy(model)
        noise.micro_batch = 1
        calls: list = []
        for router in routers.values():
            router.register_forward_hook(partial(keep, calls))
        total, count = causal_lm_loss(model, tokens(2))
        (total / count).backward()
        gradients.append([router.weight.grad for router in routers.values()])
        outputs.append(calls)
    forward, recomputed = outputs[1][:2], outputs[1][2:]
    assert len(recomputed) == 2
    for first, second, whole in zip(forward, reversed(recomputed), outputs[0]):
        for a, b, c in zip(first, second, whole):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    for a, b in zip(*gradients):
        assert bool(a.any())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture
def drawn(monkeypatch):
    """(step, micro-batch, layer) of every draw, in order."""
    keys = []
    draw = GumbelNoise.draw

    def keep_keys(noise, layer, like):
        keys.append((noise.step, noise.micro_batch, layer))
        return draw(noise, layer, like)

    monkeypatch.setattr(GumbelNoise, "draw", keep_keys)
    return keys


def test_both_accumulation_orders_draw_the_same_noise(tiny_checkpoint, tmp_path, drawn):
    data, states, keys = list(tokens(8, vocabulary=40)), [], []
    for order in ("micro_batch", "layer"):
        model = paged_model(tiny_checkpoint)
        settings = TrainConfig(
            steps=2,
            batch_size=2,
            seq_len=24,
            gradient_accumulation_steps=2,
            density=0.1,
            selection_metric="random",
            activation_threshold=0.9,
            router="gumbel",
            accumulation_order=order,
        )
        train(model, data, settings, tmp_path / order, eval_datasets={"seen": data})
        routers = {name: router.weight.detach() for name, router in trained_routers(model).items()}
        states.append([bank_state(model), routers])
        keys.append(list(drawn))
        drawn.clear()
    expected = [(step, number, layer) for step in range(2) for number in range(2) for layer in range(2)]
    assert keys[0] == expected  # and none in evaluation
    assert sorted(keys[1]) == expected != keys[1]
    assert same_bits(*states)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_are_left_alone(family):
    config, message = REFUSED[family]
    model = make(config)
    kinds = [type(router) for router in find_routers(model).values()]
    with pytest.raises(ValueError, match=message):
        noisy(model)
    assert [type(router) for router in find_routers(model).values()] == kinds
    assert not trained_routers(model)
    train_routers(model)
    with pytest.raises(ValueError, match=message):  # the family is named, not our subclass
        noisy(model)


class _Unlike(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 8))

    def forward(self, hidden):
        return hidden @ self.weight.T


def test_a_router_that_returns_something_else_is_refused():
    block = torch.nn.Module()
    block.experts, block.gate = torch.nn.Identity(), _Unlike()
    with pytest.raises(ValueError, match=r"gate \(_Unlike\) does not return \(logits, weights, experts\)"):
        noisy(block)


def test_bf16_models_and_doing_it_again():
    model = make(FAMILIES["gpt_oss"][0], torch.bfloat16)
    _, routers = noisy(model)
    kinds = [type(router) for router in routers.values()]
    later, again = noisy(model, step=9)
    assert [type(router) for router in again.values()] == kinds
    assert all(router.gumbel_noise is later for router in again.values())
    router = next(iter(again.values()))
    logits, weights, _ = router.train()(torch.randn(5, 32, dtype=torch.bfloat16))
    assert router.weight.dtype == logits.dtype == weights.dtype == torch.float32


def test_bad_input():
    with pytest.raises(TypeError, match="seed: expected an int"):
        GumbelNoise(1.5)
    with pytest.raises(ValueError, match="seed: expected a 64-bit int"):
        GumbelNoise(1 << 63)
    noise = GumbelNoise(0)
    with pytest.raises(UsafError, match="begin_step was never called"):
        noise.draw(0, torch.empty(2, 3))
    with pytest.raises(TypeError, match="step: expected an int"):
        noise.begin_step(1.0, 1.0)
    with pytest.raises(ValueError, match="step: expected at least 0"):
        noise.begin_step(-1, 1.0)
    for tau in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="tau: expected a finite number > 0"):
            noise.begin_step(0, tau)
        with pytest.raises(ValueError, match="tau: expected a finite number > 0"):
            gumbel_top_k(torch.zeros(2, 3), torch.zeros(2, 3), 1, tau, True)
    with pytest.raises(ValueError, match="logits and noise must be"):
        gumbel_top_k(torch.zeros(2, 3), torch.zeros(2, 4), 1, 1.0, True)
    for top_k in (0, 4):
        with pytest.raises(ValueError, match="top_k: expected 1 to 3"):
            gumbel_top_k(torch.zeros(2, 3), torch.zeros(2, 3), top_k, 1.0, True)
    assert noise.step is None
    with pytest.raises(ValueError, match="no router"):
        train_gumbel_routers(torch.nn.Linear(2, 2), noise)
