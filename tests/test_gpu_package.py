"""The package around the expert layer on a GPU: memory, loader and command line.

Runs where there is a GPU that this build has kernels for, and in the emulated build (test_emulated_device.py).
"""

from __future__ import annotations

import json
import logging

import devices
import pytest
import torch
from device_waits import Waits
from expert_layers import EXPERTS, HIDDEN, INTERMEDIATE, routing, weights
from trained_models import paged_model, same_bits, tokens
from transformers import AutoModelForCausalLM
from usaf_ext import (
    RowBank,
    UsafConfig,
    cli,
    expert_memory,
    first_use,
    ops,
    registration,
    self_check,
)
from usaf_ext.devices import describe_device, gpus, resolve_device, send
from usaf_ext.errors import BudgetError, DeviceError
from usaf_ext.experts import PagedExperts
from usaf_ext.memory import ExpertMemory
from usaf_ext.rng import rng_states, seed_generators, set_rng_states
from usaf_ext.store import ExpertStore

GPU = devices.gpu()
if GPU is None:
    pytest.skip("no GPU that this build has kernels for", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def make_experts(**options):
    torch.manual_seed(3)
    return PagedExperts.from_weights(*weights(), **options)


# Devices


def test_names_of_the_gpu():
    assert gpus()[0] == GPU
    for name in (GPU.type, str(GPU), GPU, 0, "auto"):
        assert resolve_device(name) == GPU
    with pytest.raises(ValueError, match=f"device: there is no '{GPU.type}:99'; torch finds {GPU}"):
        resolve_device(f"{GPU.type}:99")
    assert describe_device(GPU).startswith(f"{GPU}: ")


def test_what_is_sent_may_change_at_once():
    tensor = torch.arange(1000)
    sent = send(tensor, GPU)
    tensor.zero_()
    assert sent.device == GPU
    assert torch.equal(sent.cpu(), torch.arange(1000))


def test_random_states_of_both_generators():
    seed_generators(5, GPU)
    states = rng_states(GPU)
    expected = [torch.rand(4), torch.rand(4, device=GPU)]
    torch.rand(7), torch.rand(7, device=GPU)
    set_rng_states(states, GPU)
    assert same_bits([torch.rand(4), torch.rand(4, device=GPU)], expected)
    before = torch.get_device_module(GPU.type).get_rng_state(GPU)
    set_rng_states({"cpu": states["cpu"]}, GPU)  # of a run on the CPU
    assert torch.equal(torch.get_device_module(GPU.type).get_rng_state(GPU), before)


# Memory


def test_encoding_reads_the_device_once():
    """Its check for finite values, whose two ends come together."""
    weight = torch.randn(8, 64, device=GPU)
    with torch.profiler.profile() as profile:
        ops.quantize_blocks(weight, "nf4")
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("aten::_local_scalar_dense", 0) + counts.get("aten::_to_copy", 0) == 1


def test_slots_and_scratch_lie_on_the_device():
    experts = make_experts(device=GPU)
    layer, memory = experts.layer, experts.layer.memory
    assert memory.device == layer.device == layer.anchor.device == GPU
    assert memory._slab.device == memory._scratch.device == GPU
    assert memory.num_slots == EXPERTS  # auto: all of them fit
    assert memory.device_bytes == memory.device_budget
    assert layer.begin_importance().device == GPU
    layer.end_importance()


def test_weights_on_the_device_give_experts_there():
    experts = PagedExperts.from_weights(*(w.to(GPU) for w in weights()))
    assert experts.layer.device == GPU
    assert PagedExperts.from_weights(*(w.to(GPU) for w in weights()), device="cpu").layer.device == CPU


def test_auto_leaves_room(monkeypatch):
    class Small:
        def memory_info(self):
            return self.free, 1000

    device, store = Small(), make_experts().layer.store
    monkeypatch.setattr("usaf_ext.memory.open_device", lambda _: device)
    page = store.layout.page_bytes
    device.free = 100 + 2 * (ExpertMemory.smallest_budget(store, torch.float32) + page)
    assert ExpertMemory.slots_for(store, "auto", torch.float32, GPU) == 3
    device.free -= 4 * page
    with pytest.raises(BudgetError, match=r"device_budget: \d+ bytes are too few"):
        ExpertMemory.slots_for(store, "auto", torch.float32, GPU)


@pytest.mark.parametrize("name", ["hidden", "top_k_index", "top_k_weights"])
def test_inputs_from_elsewhere_are_named(name):
    layer = make_experts(device=GPU).layer
    index, top_k_weights = routing(5, 2)
    inputs = {"hidden": torch.randn(5, HIDDEN), "top_k_index": index, "top_k_weights": top_k_weights}
    moved = {key: value if key == name else value.to(GPU) for key, value in inputs.items()}
    with pytest.raises(ValueError, match=f"{name}: expected on {GPU}, where this model's experts are, got one on cpu"):
        layer(moved["hidden"], moved["top_k_index"], moved["top_k_weights"])


def test_a_bank_from_elsewhere_is_refused():
    layer, one = make_experts(device=GPU).layer, torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"bank: expected one on {GPU}, where the layer is, got one on cpu"):
        layer.set_bank(RowBank.from_store(layer.store, 0, (one, one), mode="in_place"))
    assert layer.bank is None


def test_a_bank_knows_where_its_rows_go():
    layer = make_experts(device=GPU).layer
    expert, index = torch.tensor([[1, 1, 4], [0, 7, 39]], dtype=torch.int32)
    bank = RowBank.from_store(layer.store, 0, (expert, index), mode="in_place", device=GPU)
    expected = index.long()[:, None] + torch.tensor([0, INTERMEDIATE, 2 * INTERMEDIATE])
    assert torch.equal(bank.overlay_rows.cpu(), expected)
    assert bank.grad_squares.shape == (3, 3)
    held = [bank.codes, bank.absmax, bank.grad, bank.neuron_expert, bank.neuron_index, bank.overlay_rows]
    assert bank.device_bytes == sum(t.nbytes for t in [*held, bank.grad_squares])
    assert bank.host_bytes == bank.positions.nbytes + bank.expert_hit.nbytes
    bank.grad.fill_(2.0)
    bank.grad_squares.copy_(bank.grad.double().square().sum(2))
    bank.expert_hit[4] = 1
    with Waits() as waits:
        norm, active = bank.grad_norm(), bank.active_rows()
        bank.expert_hit.zero_()
    assert waits.found == []
    assert float(norm) == pytest.approx(2.0 * (3 * 3 * HIDDEN) ** 0.5)
    assert active.device == GPU
    assert active.cpu().tolist() == [[False] * 3, [False] * 3, [True] * 3]


def test_a_store_is_registered_once(monkeypatch, caplog):
    first_use.ensure_works(GPU)  # its checks register stores too, in whichever test uses the GPU first
    calls = []
    store = make_experts().layer.store

    class Native:
        def register_with(self, device):
            calls.append(device)
            return 4096, "ENOMEM, say"

    class Store:  # weakly referenced, as the real one
        native, bytes, tier = Native(), store.bytes, "memory"

    some = Store()
    with caplog.at_level(logging.INFO, logger="usaf_ext"):
        registration.register_store(some, GPU)
        registration.register_store(some, GPU)
    assert len(calls) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "stay pageable (ENOMEM, say)" in record.getMessage()
    assert "ulimit -l unlimited" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="usaf_ext"):
        ExpertMemory(store, device=GPU)
        ExpertMemory(store, device=GPU)
    assert sum(r.name == "usaf_ext.registration" for r in caplog.records) == 1
    assert all(r.levelno == logging.INFO for r in caplog.records)


def test_a_store_on_disk(tmp_path):
    experts = make_experts(device=GPU)
    experts.layer.store.save(tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", tier="disk")
    memory = ExpertMemory(store, device=GPU)
    assert memory.pager.registered_buffers is not None
    other = type(experts)(type(experts.layer)(memory, 0))
    x, (index, top_k_weights) = torch.randn(9, HIDDEN).to(GPU), (t.to(GPU) for t in routing(9, 2))
    assert torch.equal(other(x, index, top_k_weights), experts(x, index, top_k_weights))


# First use


def test_a_device_that_writes_nothing_is_found(monkeypatch):
    original = ops.glu
    monkeypatch.setattr(first_use, "_tested", set())

    def lazy(gate_up, activation):
        h = original(gate_up, activation)
        return torch.zeros_like(h) if h.device == GPU else h

    store = make_experts().layer.store
    with monkeypatch.context() as patch:
        patch.setattr(ops, "glu", lazy)
        for _ in range(2):  # again at the next try
            with pytest.raises(DeviceError, match=f"{GPU}: the self-test of 'glu silu' failed: off by"):
                ExpertMemory(store, device=GPU)
    ExpertMemory(store, device=GPU)
    monkeypatch.setattr(first_use, "run_check", None)
    ExpertMemory(store, device=GPU)  # once a process


def test_the_self_test_has_each_check():
    names = {check.name for check in self_check.checks()}
    assert set(first_use._CHECKS) <= names


# The loader


@pytest.mark.parametrize("way", ["config", "map", "auto"])
def test_a_model_goes_onto_the_device(tiny_checkpoint, way):
    device_map = {"config": None, "map": {"": 0}, "auto": "auto"}[way]
    if way != "config":
        pytest.importorskip("accelerate")
        device_map = {"": str(GPU)} if way == "map" else device_map
    config = UsafConfig(device=str(GPU) if way == "config" else None)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, quantization_config=config, device_map=device_map
    )
    assert {p.device for p in model.parameters()} == {GPU}
    assert {b.device for b in model.buffers()} <= {GPU}
    assert expert_memory(model).device == GPU
    ids = tokens(2)
    with torch.no_grad():
        logits, expected = model(ids.to(GPU)).logits.cpu(), paged_model(tiny_checkpoint)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_device_and_device_map_must_agree(tiny_checkpoint):
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=f"device: '{GPU}' and device_map .* are not the same"):
        AutoModelForCausalLM.from_pretrained(
            tiny_checkpoint, quantization_config=UsafConfig(device=str(GPU)), device_map="cpu"
        )


# The command line


def test_a_run_on_the_gpu_is_one_on_the_cpu(tiny_checkpoint, tmp_path, capsys):
    """To rounding; and it says where it ran, resumes on the other, and evaluates there."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    arguments = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--device"]
    flags = ["--data", str(text), "--seq-len", "32", "--batch-size", "2"]
    settings = ["--steps", "3", "--density", "10%", "--importance-batches", "1", "--learning-rate", "1e-3"]
    losses = {}
    for device in ("cpu", GPU.type):
        out = tmp_path / device
        assert cli.main(["train", *arguments, device, *flags, *settings, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"device {describe_device(resolve_device(device))}\n")
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert log[0]["device"] == describe_device(resolve_device(device))
        losses[device] = [record["loss"] for record in log if record["event"] == "step"]
        evaluated = cli.main(["eval", "--model", str(out), "--dtype", "float32", *flags, "--device", GPU.type])
        assert evaluated == 0
        losses[device].append(float(capsys.readouterr().out.split("loss ")[1].split()[0]))
    assert losses[GPU.type] == pytest.approx(losses["cpu"], rel=1e-4)


def test_info_names_the_gpu(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert describe_device(GPU) in printed
    assert "quantize_blocks" in printed
