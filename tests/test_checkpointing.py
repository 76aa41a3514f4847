"""Gradient checkpointing of models with paged experts: one expert forward, the same gradients, and reroutes refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tiny_models import FAMILIES, make_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from trained_models import banked_model, paged_model, same_bits, tokens
from transformers import Trainer, TrainingArguments
from usaf_ext import MaskedAdam, UsafError, paged_layers
from usaf_ext.checkpointing import save_expert_outputs
from usaf_ext.loss import causal_lm_loss
from usaf_ext.router import load_balancing_loss, record_routers, train_routers

pytestmark = pytest.mark.usefixtures("one_thread")

BALANCED = ("qwen3_moe", "qwen2_moe", "mixtral")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: make_checkpoint(root / family, family, num_hidden_layers=3) for family in FAMILIES}


class CountExperts(TorchDispatchMode):
    """Calls of the expert ops while it is entered, forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.forwards = self.backwards = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forwards += func is torch.ops.usaf.experts_forward.default
        self.backwards += func is torch.ops.usaf.experts_backward.default
        return func(*args, **(kwargs or {}))


def step(model, family):
    """Two micro-batches; the counts, and every gradient there is."""
    balanced = family in BALANCED
    routers = {} if family == "gemma4" else train_routers(model)  # gemma4's router has no weight of its own
    model.train()
    with CountExperts() as counts:
        for seed in (1, 2):
            with record_routers(routers if balanced else {}) as routed:
                loss, _ = causal_lm_loss(model, tokens(2, seed=seed))
            if balanced:
                loss = loss + load_balancing_loss(routed.logits, routed.index)
            loss.backward()
    gradients = [[layer.anchor.grad, layer.bank.grad, layer.bank.expert_hit] for layer in paged_layers(model)]
    return counts, [*gradients, *(router.weight.grad for router in routers.values())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [None, True])
def test_one_forward_and_the_same_gradients(checkpoints, family, reentrant):
    plain = banked_model(checkpoints[family])
    counts, expected = step(plain, family)
    num_layers = len(paged_layers(plain))
    assert (counts.forwards, counts.backwards) == (2 * num_layers, 2 * num_layers)
    assert all(gradient.abs().max() > 0 for gradient in expected[num_layers:])

    model = banked_model(checkpoints[family])
    model.activation_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    counts, gradients = step(model, family)
    assert (counts.forwards, counts.backwards) == (2 * num_layers, 2 * num_layers)
    assert same_bits(gradients, expected)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


def test_a_plain_checkpoint_runs_the_experts_twice(checkpoints):
    """What the counts above would be without the saving: the counter can tell the two apart."""
    model = banked_model(checkpoints["qwen3_moe"])
    model.activation_checkpointing_enable()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
    counts, _ = step(model, "deepseek_v3")
    assert counts.forwards == 2 * counts.backwards


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_in_the_trainer_of_transformers(checkpoints, tmp_path, reentrant):
    pytest.importorskip("accelerate")
    anchors = []
    for checkpointing in (False, True):
        model = banked_model(checkpoints["mixtral"])
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        json.loads(arguments.to_json_string())
        data = [{"input_ids": row, "labels": row} for row in tokens(4)]
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(MaskedAdam(model), None))
        with CountExperts() as counts:
            trainer.train()
        assert (counts.forwards, counts.backwards) == (6, 6)
        anchors.append([layer.bank.codes for layer in paged_layers(model)])
    assert same_bits(*anchors)


class NoisyRouting:
    """A hook that adds noise of a generator of its own to what a router sees: a recompute sees other noise."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, module, args):
        (hidden, *rest) = args
        return (hidden + 10 * torch.randn(hidden.shape, generator=self.generator), *rest)


@pytest.mark.parametrize("saving", [True, False])
def test_a_recompute_that_routes_otherwise_is_an_error_at_the_step(checkpoints, saving):
    """Also under a checkpoint that is not ours."""
    model = banked_model(checkpoints["qwen3_moe"])
    routers = train_routers(model)
    optimizer = MaskedAdam(model)
    model.train()
    model.activation_checkpointing_enable()
    if not saving:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
    before = [layer.bank.codes.clone() for layer in paged_layers(model)]
    causal_lm_loss(model, tokens(2))[0].backward()
    optimizer.step()  # the same routes: fine
    optimizer.zero_grad()
    after = [layer.bank.codes.clone() for layer in paged_layers(model)]
    assert not same_bits(before, after)
    name, router = list(routers.items())[1]
    hook = router.register_forward_pre_hook(NoisyRouting())
    causal_lm_loss(model, tokens(2))[0].backward()
    with pytest.raises(UsafError, match=rf"the recompute of {name.rpartition('.')[0]}\.experts sent tokens"):
        optimizer.step()
    assert same_bits(after, [layer.bank.codes for layer in paged_layers(model)])
    hook.remove()
    optimizer.zero_grad()
    causal_lm_loss(model, tokens(2))[0].backward()
    optimizer.step()  # the error is not repeated


def test_a_context_of_the_users_is_refused(checkpoints, caplog):
    model = paged_model(checkpoints["qwen3_moe"])
    with pytest.raises(ValueError, match="context_fn: paged experts bring their own"):
        model.activation_checkpointing_enable({"context_fn": lambda: None})
    with caplog.at_level(logging.WARNING):
        model.activation_checkpointing_enable({"use_reentrant": True})
    assert "use_reentrant=True would drop" in caplog.text
    x = torch.randn(3, requires_grad=True)
    save_expert_outputs(checkpoint)(torch.sin, x).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
