"""What a training step on a GPU waits for, and what crosses to the CPU and back in placement "host".

Runs where there is a GPU that this build has kernels for, and in the emulated build (test_emulated_device.py).
"""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace

import devices
import pytest
import stream_races
import torch
import usaf_ext
from device_waits import Waits
from stream_races import Races
from trained_models import banked_model, give_gradient, paged_model, same_bits, tokens
from usaf_ext import (
    MaskedAdam,
    TrainConfig,
    paged_layers,
    train,
)
from usaf_ext.bank import share_gradients
from usaf_ext.host_updates import HostUpdates
from usaf_ext.loss import causal_lm_loss
from usaf_ext.router import train_routers

GPU = devices.gpu()
if GPU is None:
    pytest.skip("no GPU that this build has kernels for", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


# What a step waits for


def backward(model):
    total, count = causal_lm_loss(model, tokens(2))
    (total / count).backward()


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_step_waits_for_nothing(tiny_checkpoint, on_gpu, moments):
    model = banked_model(tiny_checkpoint)
    train_routers(model)
    optimizer = MaskedAdam(model, lr=1e-2, moments=moments)
    for _ in range(2):  # the first makes the state
        backward(model)
        with Waits() as waits:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert waits.found == []
    optimizer.check_progress()


def test_the_waits_are_seen(tiny_checkpoint):
    flag = torch.ones((), device=GPU)
    with Waits() as waits:
        bool(flag)
        flag.cpu()
        torch.zeros(1).to(GPU)
        torch.zeros((), pin_memory=True).copy_(flag, non_blocking=True)
    assert waits.found == ["aten::_local_scalar_dense", "aten::_to_copy", "aten::_to_copy"]


def test_a_training_step_reads_the_device_once(tiny_checkpoint, tmp_path, on_gpu):
    """Loss, gradient norm and the rest in one go; the layers' own waits, one each, are in test_gpu_layer.py."""
    model = paged_model(tiny_checkpoint)
    config = TrainConfig(
        steps=3, batch_size=2, seq_len=24, density=0.1, importance_batches=1, gradient_accumulation_steps=2
    )
    found = []
    waits = Waits()

    def count(record):
        found.append(list(waits.found))
        waits.found.clear()

    with waits:
        data = list(tokens(8).cpu())
        train(model, data, config, tmp_path / "run", callbacks=[count])
    # The one at a step's end; before, transformers itself asks in each forward whether several texts share a sequence.
    # Step 1 has the selection's waits too, step 3 the checkpoint's.
    assert found[1] == ["aten::_local_scalar_dense", "aten::_local_scalar_dense", "aten::_to_copy"]


# Placement "host"


@pytest.mark.parametrize("release", [False, True])
def test_the_cpu_updates_while_the_caller_goes_on(tiny_checkpoint, on_gpu, monkeypatch, release):
    """The next gradient is sent before an update has run, each update sees its own, and none is lost."""
    model = banked_model(tiny_checkpoint, placement="host", mode="master", master_dtype=torch.float32)
    twin = banked_model(tiny_checkpoint, placement="device", mode="master", master_dtype=torch.float32)
    optimizer, other = MaskedAdam(model, lr=1e-2), MaskedAdam(twin, lr=1e-2)
    if release:
        share_gradients(paged_layers(model))
    first, second = (1, 0) if release else (0, 1)
    updated, second_sent = [], threading.Event()
    submit, run = HostUpdates.submit, HostUpdates._run

    def submitted(self, bank, *arguments):
        submit(self, bank, *arguments)
        if bank.layer == second:
            second_sent.set()

    def updating(self, bank, *arguments):
        if bank.layer == first:
            assert second_sent.wait(timeout=10)
        run(self, bank, *arguments)
        updated.append(bank.layer)

    monkeypatch.setattr(HostUpdates, "submit", submitted)
    monkeypatch.setattr(HostUpdates, "_run", updating)
    for _ in range(3):
        second_sent.clear()
        layers = list(zip(paged_layers(model), paged_layers(twin)))
        for mine, theirs in reversed(layers) if release else layers:
            gradient = torch.randn_like(theirs.bank.grad)
            if GPU.type == "cuda":
                torch.cuda._sleep(20_000_000)  # what does not wait for the gradient reads an old one
            give_gradient(mine, gradient)
            give_gradient(theirs, gradient)
            if release:
                optimizer.step_layer(mine)
                assert not mine.bank.grad.any()
        optimizer.step()
        other.step()
    assert updated == 3 * [first, second]
    for mine, theirs in zip(paged_layers(model), paged_layers(twin)):
        assert mine.bank.master.device == CPU
        assert same_bits(mine.bank.master, theirs.bank.master.cpu())
        assert same_bits([mine.bank.codes, mine.bank.absmax], [theirs.bank.codes, theirs.bank.absmax])
        assert torch.equal(mine.bank.state_codes, mine.bank.codes.cpu())
    optimizer.check_progress()


def test_an_update_that_fails_in_its_thread_fails_the_step(tiny_checkpoint, on_gpu, monkeypatch):
    model = banked_model(tiny_checkpoint, placement="host", mode="in_place")
    optimizer = MaskedAdam(model, lr=1e-2)

    def failing(*_, **__):
        raise RuntimeError("no update")

    monkeypatch.setattr(usaf_ext.ops, "masked_adam_", failing)
    for layer in paged_layers(model):
        give_gradient(layer, torch.ones_like(layer.bank.grad))
    with pytest.raises(RuntimeError, match="no update"):
        optimizer.step()


class LateThread:
    """In place of the updates' thread: each update runs when somebody waits for it, as late as it may."""

    def __init__(self, **_):
        pass

    def submit(self, function, *arguments):
        return SimpleNamespace(result=functools.partial(function, *arguments))


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("left_out", [None, "wait_stream", "wait_event", "synchronize"])
def test_all_that_crosses_is_ordered(tiny_checkpoint, on_gpu, monkeypatch, release, left_out):
    """Gradients before they are cleared, codes before the next forward, staging before it is used again."""
    model = banked_model(tiny_checkpoint, placement="host", mode="in_place")
    optimizer = MaskedAdam(model, lr=1e-2)
    if release:
        share_gradients(paged_layers(model))
    layers = paged_layers(model)
    monkeypatch.setattr(usaf_ext.host_updates, "ThreadPoolExecutor", LateThread)
    races = Races(GPU, monkeypatch)
    if left_out is not None:
        for kind in (stream_races._Stream, stream_races._Event):
            monkeypatch.setattr(kind, left_out, lambda *_: None, raising=False)
    with races:
        for _ in range(3):
            for layer in reversed(layers) if release else layers:
                layer.bank.decode()  # as a forward and a backward do
                give_gradient(layer, torch.ones_like(layer.bank.grad))
                if release:
                    optimizer.step_layer(layer)
            optimizer.step()
    # Without release nothing is cleared before the step ends, which waits for all copies.
    needed = left_out is not None and (release or left_out != "wait_event")
    assert bool(races.found) == needed, races.found
