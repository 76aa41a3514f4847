"""Layer-major accumulation: the bits of micro-batch order, one sweep of the pages, failures that reach the caller."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from functools import partial

import pytest
import torch
from test_training import BASE, final_state, log
from tiny_models import FAMILIES, make_checkpoint
from torch import nn
from trained_models import paged_model, same_bits, tokens
from transformers import AutoModelForCausalLM
from usaf_ext import TrainConfig, UsafConfig, UsafError, expert_store, paged_layers, train
from usaf_ext.experts import PagedExperts, PagedLayer
from usaf_ext.layer_major import MicroBatchThreads
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = list(tokens(24, length=24, vocabulary=40))
SETTINGS = BASE | {"steps": 3, "batch_size": 2, "gradient_accumulation_steps": 3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: make_checkpoint(root / family, family, num_hidden_layers=3) for family in FAMILIES}


def run_both(checkpoint, tmp_path, dtype=torch.float32, change=lambda model: None, **settings):
    """final_state and log of a run in each order."""
    results = []
    for order in ("micro_batch", "layer"):
        model = paged_model(checkpoint, dtype)
        change(model)
        config = TrainConfig(**{**SETTINGS, **settings, "accumulation_order": order})
        train(model, DATA, config, tmp_path / order)
        results.append((final_state(model, tmp_path / order), log(tmp_path / order, "step")))
    return results


TOPK = {"router": "topk", "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("qwen3_moe", torch.float32, {"router": "topk", "aux_loss_coef": 0.1}),
        ("qwen3_moe", torch.bfloat16, {"gradient_checkpointing": True, "mode": "in_place"}),
        ("qwen2_moe", torch.float32, TOPK | {"router_warmup_steps": 1}),
        ("mixtral", torch.float32, TOPK | {"aux_loss_coef": 0.1, "gradient_accumulation_steps": 4}),
        ("mixtral", torch.float32, TOPK | {"router": "gumbel", "activation_threshold": 0.9}),
        ("deepseek_v3", torch.float32, TOPK | {"aux_loss_coef": 0.0}),
        ("gemma4", torch.float32, {"gradient_checkpointing": True}),
    ],
    ids=["qwen3_moe", "qwen3_moe-frozen", "qwen2_moe", "mixtral", "gumbel", "deepseek_v3", "gemma4"],
)
def test_the_bits_of_micro_batch_order(checkpoints, tmp_path, family, dtype, settings):
    one, many = run_both(checkpoints[family], tmp_path, dtype, **settings)
    assert same_bits(one[0], many[0])
    assert one[1] == many[1]
    assert len({record["loss"] for record in many[1]}) == 3  # it does train


@pytest.mark.parametrize("checkpointing", [False, True])
def test_random_numbers_are_those_of_micro_batch_order(checkpoints, tmp_path, checkpointing):
    """Mixtral's jitter multiplies what the router and the experts see by noise of torch's global generator."""

    def jitter(model):
        for module in model.modules():
            if hasattr(module, "jitter_noise"):
                module.jitter_noise = 0.3

    one, many = run_both(
        checkpoints["mixtral"], tmp_path, change=jitter, router="topk", gradient_checkpointing=checkpointing
    )
    assert same_bits(one[0], many[0])
    assert one[1] == many[1]
    calm, _ = run_both(checkpoints["mixtral"], tmp_path / "calm", router="topk")
    assert calm[1] != one[1]


def test_pages_move_once_for_all_micro_batches(checkpoints, tmp_path):
    misses = {}
    for order in ("micro_batch", "layer"):
        for micro_batches in (1, 4):
            smallest = ExpertMemory.smallest_budget(expert_store(paged_model(checkpoints["mixtral"])), torch.float32)
            model = AutoModelForCausalLM.from_pretrained(
                checkpoints["mixtral"], dtype=torch.float32, quantization_config=UsafConfig(device_budget=smallest)
            )
            settings = SETTINGS | {"gradient_accumulation_steps": micro_batches, "gradient_checkpointing": True}
            steps = []
            train(
                model,
                DATA,
                TrainConfig(**settings, accumulation_order=order),
                tmp_path / f"{order}{micro_batches}",
                callbacks=[steps.append],
            )
            misses[order, micro_batches] = sum(record["page_misses"] for record in steps)
    assert misses["micro_batch", 4] > 3.9 * misses["micro_batch", 1]
    assert misses["layer", 1] == misses["micro_batch", 1]
    pages_of_a_step = 2 * 3 * 6  # up and down
    assert misses["layer", 4] <= 3 * pages_of_a_step < misses["micro_batch", 4] / 3  # more tokens hit more experts


class Two(nn.Module):
    """Two expert layers; `odd` exchanges them."""

    def __init__(self):
        super().__init__()
        store = ExpertStore.create(["a", "b"], 4, 64, 8, "bf16")
        for layer in range(2):
            for expert in range(4):
                store.write_expert(layer, expert, *torch.randn(3, 8, 64)[:2], torch.randn(64, 8))
        store.seal()
        memory = ExpertMemory(store, "auto", torch.float32)
        self.experts = nn.ModuleList(PagedExperts(PagedLayer(memory, layer)) for layer in range(2))

    def forward(self, x, odd=False):
        index = torch.arange(len(x))[:, None] % 4
        for experts in self.experts[::-1] if odd else self.experts:
            x = x + experts(x, index, torch.ones_like(index, dtype=torch.float32))
        return x


def micro_batch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("micro-batch")]


def run_together(bodies, *hooks):
    """As one step of a run; no thread is left behind, whatever happens."""
    try:
        with MicroBatchThreads() as threads:
            return threads.run(bodies, torch.device("cpu"), *hooks)
    finally:
        assert micro_batch_threads() == []


def test_results_and_switches_come_in_order():
    model, seen, ended = Two(), [], []
    inputs = [torch.randn(5, 64, requires_grad=True) for _ in range(3)]

    @contextlib.contextmanager
    def note(number):
        seen.append(number)
        yield

    def body(x):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_num_threads() == 1  # as the fixture says, not as many as there are cores
        model(x).sum().backward()
        return x.grad

    with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
        results = run_together([partial(body, x) for x in inputs], note, ended.append)
    assert all(result is x.grad for result, x in zip(results, inputs))
    assert seen == [0, 1, 2] * 5  # two layers up, two down
    assert ended == [layer.native.handle for layer in reversed(paged_layers(model))]
    expected = [x.detach().clone().requires_grad_() for x in inputs]
    for x in expected:
        model(x).sum().backward()
    assert same_bits([x.grad for x in expected], results)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("where", ["forward", "backward", "experts", "end"])
def test_a_failure_reaches_the_caller_and_ends_all_threads(number, where):
    model = Two()

    def fail(*_):
        raise RuntimeError("mine")

    def body(mine):
        x = torch.randn(5, 64, requires_grad=True)
        if mine and where == "experts":
            x = x.double()
        hidden = model(x)
        if mine and where == "forward":
            fail()
        if mine and where == "backward":
            x.register_hook(fail)
        hidden.sum().backward()
        if mine and where == "end":
            fail()

    bodies = [partial(body, mine == number) for mine in range(3)]
    with MicroBatchThreads() as threads:
        for _ in range(2):
            with pytest.raises(Exception, match="expected Float" if where == "experts" else "mine"):
                threads.run(bodies, torch.device("cpu"))
        assert threads.run([partial(body, False)] * 2, torch.device("cpu")) == [None, None]
        assert len(micro_batch_threads()) == 3
    assert micro_batch_threads() == []


def test_an_interrupt_ends_all_threads():
    model = Two()

    def body(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)  # Python runs the handler in the main thread, which waits
        model(torch.randn(5, 64)).sum()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_together([partial(body, number) for number in range(3)])
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("order", [[True, False], [False, True]])
def test_micro_batches_that_part_are_refused(order):
    model = Two()
    bodies = [partial(model, torch.randn(5, 64), odd) for odd in order]
    with pytest.raises(UsafError, match="came to different expert layers"):
        run_together(bodies)
    with pytest.raises(UsafError, match="came to different expert layers"):
        run_together([bodies[0], lambda: None])
