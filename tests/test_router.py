"""Trained routers keep their family's choices; the load-balancing loss; load entropy and collapse."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_config
from trained_models import tokens
from transformers import AutoModelForCausalLM, DeepseekV3Config, GraniteMoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter, load_balancing_loss_func
from usaf_ext.router import (
    CollapsedLayer,
    LoadTracker,
    check_balanceable,
    find_routers,
    load_balancing_loss,
    record_routers,
    train_routers,
    trained_routers,
)

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "qwen3_moe": lambda: tiny_config(),
    "qwen3_moe_plain": lambda: tiny_config(norm_topk_prob=False),
    "mixtral": lambda: tiny_config("mixtral"),
    "granitemoe": lambda: GraniteMoeConfig(
        **COMMON, intermediate_size=16, num_key_value_heads=1, num_local_experts=6, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON,
        intermediate_size=16,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


def make(family, dtype=torch.float32):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("family", CONFIGS)
def test_trained_router_gives_what_the_family_gives(family):
    model = make(family)
    before = copy.deepcopy(find_routers(model))
    routers = train_routers(model)
    assert len(routers) == 2
    assert trained_routers(model).keys() == routers.keys() == before.keys()
    for name, router in routers.items():
        old = before[name]
        assert isinstance(router, type(old))
        hidden = torch.randn(20, old.weight.shape[1])
        for got, want in zip(router(hidden), old(hidden)):
            assert torch.equal(got, want)
        assert [p for p, value in router.named_parameters() if value.requires_grad] == ["weight"]


@pytest.mark.parametrize("family", CONFIGS)
def test_router_stays_fp32_in_a_bf16_model(family):
    model = make(family, torch.bfloat16)
    train_routers(model)
    for router in trained_routers(model).values():
        weight = router.get_parameter("weight")
        weight.data.add_(2.0**-20)  # bf16 cannot hold this
    kept = {name: router.weight.clone() for name, router in trained_routers(model).items()}
    model.to(torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    for name, router in trained_routers(model).items():
        assert router.weight.dtype == torch.float32
        assert torch.equal(router.weight, kept[name])
        logits, weights, _ = router(torch.randn(5, router.weight.shape[1], dtype=torch.bfloat16))
        assert logits.dtype == weights.dtype == torch.float32
    model(tokens(1, 8, vocabulary=60)).logits.float().sum().backward()
    assert all(router.weight.grad.any() for router in trained_routers(model).values())


@pytest.mark.parametrize("family", CONFIGS)
def test_router_computes_in_fp32_under_autocast(family):
    model = make(family)
    for router in train_routers(model).values():
        hidden = torch.randn(5, router.weight.shape[1])
        expected = router(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(torch.equal(got, want) for got, want in zip(router(hidden), expected))


def test_training_twice_changes_nothing_and_deepcopy_works():
    model = make("qwen3_moe")
    first = train_routers(model)
    kinds, parameters = [type(r) for r in first.values()], [r.weight for r in first.values()]
    again = train_routers(model)
    assert [type(r) for r in again.values()] == kinds
    assert all(r.weight is p for r, p in zip(again.values(), parameters))
    assert len(trained_routers(copy.deepcopy(model))) == 2


def test_transformers_still_finds_the_router_logits():
    model = make("qwen3_moe")
    train_routers(model)
    out = model(tokens(2), output_router_logits=True)
    assert len(out.router_logits) == 2
    assert out.router_logits[0].requires_grad


def test_model_without_routers():
    with pytest.raises(ValueError, match="no router"):
        find_routers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


class _Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.gate = torch.nn.Identity(), torch.nn.Identity()


def test_router_without_a_weight():
    with pytest.raises(ValueError, match=r"router gate \(Identity\) has no weight"):
        find_routers(_Block())


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_load_balancing_loss_is_transformers(top_k):
    logits = [torch.randn(30, 6, requires_grad=True) for _ in range(3)]
    index = [layer.softmax(-1).topk(top_k).indices for layer in logits]
    loss = load_balancing_loss(logits, index)
    expected = load_balancing_loss_func(tuple(logits), 6, top_k)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)):
        torch.testing.assert_close(got, want)


def test_load_balancing_loss_ranges_from_top_k_to_num_experts():
    index = torch.arange(12).reshape(6, 2) % 6
    assert float(load_balancing_loss([torch.zeros(6, 6)], [index])) == pytest.approx(2.0)
    swamped = torch.full((6, 6), -100.0)
    swamped[:, 4] = 100.0
    assert float(load_balancing_loss([swamped], [torch.full((6, 1), 4)])) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="not empty"):
        load_balancing_loss([], [])
    with pytest.raises(ValueError, match="differ in their number of experts"):
        load_balancing_loss([torch.zeros(2, 6), torch.zeros(2, 5)], [index[:2], index[:2]])


def test_recording_sees_the_forward_inside_and_nothing_after():
    model = make("qwen3_moe")
    routers = train_routers(model)
    with record_routers(routers) as record:
        model(tokens(2))
    model(tokens(1))
    assert [tuple(t.shape) for t in record.logits] == [(48, 6)] * 2
    assert [tuple(t.shape) for t in record.index] == [(48, 2)] * 2
    for logits, index, router in zip(record.logits, record.index, routers.values()):
        assert isinstance(router, Qwen3MoeTopKRouter)
        assert torch.equal(logits.softmax(-1).topk(2).indices, index)


def test_routers_balanced_by_a_bias_refuse_the_loss():
    with pytest.raises(ValueError, match="aux_loss_coef to 0"):
        check_balanceable(find_routers(make("deepseek_v3")))
    check_balanceable(find_routers(make("qwen3_moe")))


def test_entropy_and_collapse():
    tracker = LoadTracker(3, 4)
    assert tracker.entropy() == [0.0, 0.0, 0.0]
    assert tracker.collapsed() == []
    uniform, swamped, dead = [50, 50, 50, 50], [96, 40, 34, 30], [100, 60, 40, 0]
    for _ in range(2):
        tracker.add([torch.tensor(c, dtype=torch.int32) for c in (uniform, swamped, dead)], num_tokens=100)
    assert tracker.counts.tolist() == [[2 * c for c in counts] for counts in (uniform, swamped, dead)]
    entropy = tracker.entropy()
    share = torch.tensor(swamped).double() / 200
    assert entropy[0] == pytest.approx(1.0)
    assert entropy[1] == pytest.approx(float(-(share * share.log()).sum() / torch.tensor(4.0).double().log()))
    assert tracker.collapsed() == [CollapsedLayer(1, (), (0,)), CollapsedLayer(2, (3,), (0,))]
    torch.testing.assert_close(tracker.share().sum(1), torch.ones(3, dtype=torch.float64))
