"""A store on disk: the same as one in memory for every reader and for training; host budgets; failures."""

from __future__ import annotations

import json
import logging
import mmap
import subprocess
import sys

import pytest
import torch
from killed import dies_at
from random_stores import random_store
from tiny_models import make_checkpoint
from trained_models import bank_state, same_bits, tokens
from transformers import AutoModelForCausalLM
from usaf_ext import TrainConfig, UsafConfig, expert_memory, expert_store, train
from usaf_ext.bank import RowBank
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.errors import BudgetError, StoreError
from usaf_ext.memory import ExpertMemory
from usaf_ext.router import trained_routers
from usaf_ext.store import ExpertStore

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = 64


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A checkpoint of two layers of 64 experts, and its store in nf4 written straight to disk. Never write to them."""
    folder = tmp_path_factory.mktemp("disk")
    checkpoint = make_checkpoint(folder / "checkpoint", num_experts=EXPERTS, num_experts_per_tok=4)
    ExpertStore.quantize_to(folder / "store", ModelSource.open(checkpoint))
    return folder


@pytest.fixture
def on_disk(tmp_path):
    """A random store in memory, the same on disk in three files, and its folder."""
    store = random_store()
    store.save(tmp_path / "store", shard_bytes=2 * store.layout.page_bytes)
    return store, ExpertStore.open(tmp_path / "store", tier="disk"), tmp_path / "store"


def budget_for(store: ExpertStore, num_buffers: int) -> int:
    """The smallest host budget for a store on disk that gives `num_buffers` host buffers."""
    smallest = ExpertMemory.smallest_host_budget(store)
    return smallest + (num_buffers - 2) * (smallest - ExpertMemory._host_overhead(store)) // 2


def load(path, num_buffers=None, **arguments):
    if num_buffers is not None:
        arguments["host_budget"] = budget_for(ExpertStore.open(path, tier="disk"), num_buffers)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=UsafConfig(**{"device_budget": "256KiB", **arguments})
    )


# ---- readers ----


@pytest.mark.parametrize("format", ["nf4", "bf16"])
def test_reads_what_the_memory_tier_reads(tmp_path, format):
    store = random_store(format=format)
    store.save(tmp_path / "store", shard_bytes=2 * store.layout.page_bytes)
    disk = ExpertStore.open(tmp_path / "store", tier="disk")
    assert (store.tier, disk.tier, disk.sealed) == ("memory", "disk", True)
    assert disk.bytes == store.bytes
    for layer in range(2):
        for expert in range(3):
            picked = torch.tensor([0, 7, 23, 7])
            assert same_bits(disk.rows(layer, expert, picked), store.rows(layer, expert, picked))
            assert same_bits(disk.read_expert(layer, expert), store.read_expert(layer, expert))
    neurons = (torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([3, 5, 1], dtype=torch.int32))
    banks = [RowBank.from_store(each, 1, neurons) for each in (store, disk)]
    assert same_bits(banks[0].codes, banks[1].codes)
    assert same_bits(banks[0].master, banks[1].master)
    disk.save(tmp_path / "again", shard_bytes=2 * store.layout.page_bytes)
    for file in (tmp_path / "store").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_quantises_to_disk_what_it_quantises_in_memory(tiny_checkpoint, tmp_path):
    source = ModelSource.open(tiny_checkpoint)
    stored = ExpertStore.quantize_to(tmp_path / "straight", source, "nf4", shard_bytes=1 << 14)
    assert stored.tier == "disk"
    ExpertStore.quantize(source, "nf4").save(tmp_path / "saved", source, shard_bytes=1 << 14)
    names = sorted(file.name for file in (tmp_path / "saved").iterdir())
    assert sorted(file.name for file in (tmp_path / "straight").iterdir()) == names
    assert len([name for name in names if name.startswith("experts-")]) > 1
    for name in names:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    with pytest.raises(FileExistsError, match="something that is no store"):
        ExpertStore.quantize_to(tiny_checkpoint, source)


@pytest.mark.parametrize("call", [3, 8])
def test_quantising_to_disk_is_all_or_nothing(tiny_checkpoint, tmp_path, call):
    source = ModelSource.open(tiny_checkpoint)
    assert dies_at(call, lambda: ExpertStore.quantize_to(tmp_path / "store", source))
    assert not (tmp_path / "store").exists()


def test_refuses_what_a_store_on_disk_cannot_do(on_disk, tmp_path):
    store, disk, path = on_disk
    with pytest.raises(ValueError, match=r"tier: expected one of \('memory', 'disk'\), got 'tape'"):
        ExpertStore.open(path, tier="tape")
    with pytest.raises(StoreError, match="sealed"):
        disk.write_expert(0, 0, *store.read_expert(0, 0))
    with pytest.raises(StoreError, match="the store is on disk"):
        disk.native.page(0, 0)
    with pytest.raises(StoreError, match="the store is in memory"):
        store.native.read_page(0, 0, mmap.mmap(-1, 4096))
    for layer, expert in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(StoreError, match=f"no page for layer {layer}, expert {expert}"):
            disk.read_expert(layer, expert)
    with pytest.raises(ValueError, match="buffer: expected 4096 bytes aligned to 4096"):
        disk.native.read_page(0, 0, memoryview(bytearray(3 * 4096))[1:4097])


def test_a_damaged_page_is_found_when_the_store_is_opened(on_disk):
    _, _, path = on_disk
    file = min(path.glob("experts-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{file.name}: page layers.0.experts.1 is damaged"):
        ExpertStore.open(path, tier="disk")
    ExpertStore.open(path, tier="disk", verify=False)


# ---- training ----


def trained(model, out):
    config = TrainConfig(
        steps=3,
        batch_size=4,
        seq_len=24,
        density=0.1,
        importance_batches=1,
        learning_rate=1e-2,
        router="topk",
        router_learning_rate=1e-3,
        gradient_accumulation_steps=2,
    )
    result = train(model, list(tokens(24)), config, out, eval_datasets={"held out": list(tokens(4, seed=1))})
    routers = {name: router.weight.detach().clone() for name, router in trained_routers(model).items()}
    return [bank_state(model), routers, result.evaluations]


@pytest.mark.parametrize("num_buffers", [2, 3, EXPERTS])
def test_training_gives_the_same_bits_from_disk(stores, tmp_path, num_buffers):
    in_memory, from_disk = load(stores / "store"), load(stores / "store", num_buffers)
    assert expert_store(in_memory).tier == "memory"
    assert expert_store(from_disk).tier == "disk"
    memory = expert_memory(from_disk)
    assert memory.pager.num_buffers == num_buffers
    assert memory.num_slots < EXPERTS
    assert same_bits(trained(in_memory, tmp_path / "memory"), trained(from_disk, tmp_path / "disk"))
    stats = memory.stats()
    assert 0 < stats["bytes_read"] <= stats["bytes_in"]
    assert stats["read_stall_seconds"] <= stats["stall_seconds"]
    assert expert_memory(in_memory).stats()["bytes_read"] == 0


def test_half_the_store_in_buffers_saves_reads(stores):
    read = {}
    for num_buffers in (8, EXPERTS):
        model = load(stores / "store", num_buffers, device_budget="64KiB")
        for _ in range(2):
            expert_memory(model).reset_stats()
            model(input_ids=tokens(16), labels=tokens(16)).loss.backward()
        read[num_buffers] = expert_memory(model).stats()["bytes_read"]
    assert read[EXPERTS] < 0.7 * read[8]


# ---- failures under a running job ----


def test_a_file_cut_off_under_a_running_job(stores, tmp_path):
    store = ExpertStore.open(stores / "store")
    store.save(tmp_path / "store", ModelSource.open(stores / "checkpoint"))
    model = load(tmp_path / "store", 3)
    whole = model(input_ids=tokens(8)).logits
    (file,) = (tmp_path / "store").glob("experts-*")
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes(data[:middle])
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"layer \d, expert \d+: .*{file.name}: cannot be read"):
            model(input_ids=tokens(8))
    with pytest.raises(StoreError, match=rf"layer 1, expert 5: .*{file.name}: cannot be read"):
        expert_store(model).read_expert(1, 5)
    with pytest.raises(StoreError, match=file.name):
        train(model, list(tokens(4)), TrainConfig(steps=1, batch_size=4, seq_len=24), tmp_path / "run")
    file.write_bytes(data)
    assert torch.equal(model(input_ids=tokens(8)).logits, whole)
    file.unlink()  # it is still open
    assert torch.equal(model(input_ids=tokens(8)).logits, whole)


# ---- the host budget ----


def test_the_budget_decides_the_tier(stores, caplog):
    store = ExpertStore.open(stores / "store", tier="disk")
    smallest = ExpertMemory.smallest_host_budget(store)
    with caplog.at_level(logging.INFO, "usaf_ext.memory"):
        for host_budget, tier in ((None, "memory"), (store.bytes, "memory"), (store.bytes - 1, "disk")):
            model = load(stores / "store", host_budget=host_budget)
            assert expert_store(model).tier == tier
            assert host_budget is None or expert_memory(model).host_bytes <= host_budget
    assert "of experts in memory: 512.0 KiB of host memory" in caplog.text
    assert "of experts on disk, " in caplog.text
    memory = expert_memory(load(stores / "store", host_budget=smallest))
    assert memory.pager.num_buffers == 2
    assert memory.host_bytes == smallest
    message = rf"host_budget: {smallest - 1} bytes are too few; the smallest that works .* is {smallest} \("
    with pytest.raises(BudgetError, match=message):
        load(stores / "store", host_budget=smallest - 1)


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_way_out(stores, monkeypatch):
    def never(*_, **__):
        raise AssertionError("experts were quantised")

    size = ExpertStore.open(stores / "store", tier="disk").bytes
    assert expert_store(load(stores / "checkpoint", host_budget=size)).tier == "memory"
    monkeypatch.setattr(ExpertStore, "quantize", never)
    message = (
        rf"host_budget: {size - 1} bytes are too few; .* in memory is {size} .*usaf-ext quantize .*checkpoint STORE"
    )
    with pytest.raises(BudgetError, match=message):
        load(stores / "checkpoint", host_budget=size - 1)


def test_reservations_take_host_buffers(stores):
    store = ExpertStore.open(stores / "store", tier="disk")
    budget = budget_for(store, 40)
    memory = ExpertMemory(store, "256KiB", host_budget=budget)
    smallest = ExpertMemory.smallest_host_budget(store)
    for _ in range(2):
        memory.reserve_host(budget - smallest)
        assert memory.pager.num_buffers == 2
        assert memory.host_bytes == budget
        with pytest.raises(BudgetError, match=rf"is {budget + 1} .*, {budget + 1 - smallest} of them reserved"):
            memory.reserve_host(budget - smallest + 1)
        assert memory.host_bytes == budget
        memory.reserve_host(0)
        assert memory.pager.num_buffers == 40
    with pytest.raises(ValueError, match="num_bytes: expected at least 0, got -1"):
        memory.reserve_host(-1)

    in_memory = ExpertMemory(ExpertStore.open(stores / "store"), "256KiB", host_budget=store.bytes + 100)
    in_memory.reserve_host(100)
    with pytest.raises(BudgetError, match=rf"is {store.bytes + 101} "):
        in_memory.reserve_host(101)
    unlimited = ExpertMemory(store, "256KiB")
    unlimited.reserve_host(1 << 40)
    assert unlimited.pager.num_buffers == 16


def test_banks_in_host_memory_count(stores, tmp_path):
    config = TrainConfig(steps=2, batch_size=4, seq_len=24, density=0.02, importance_batches=1, placement="host")
    model = load(stores / "store", 64)
    memory = expert_memory(model)
    train(model, list(tokens(8)), config, tmp_path / "run")
    assert memory.pager.num_buffers < 64
    assert memory.host_bytes <= memory.host_budget
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (host,) = (record["bank_bytes"]["host"] for record in logged if record["event"] == "selection")
    assert memory._reserved_host == host > 0
    for num_buffers in (3, 64 - memory.pager.num_buffers):  # too few for the banks; and for the moments on top
        poor = load(stores / "store", num_buffers)
        with pytest.raises(BudgetError, match=r"host_budget: \d+ bytes are too few; .* reserved for banks"):
            train(poor, list(tokens(8)), config, tmp_path / f"poor {num_buffers}")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (True, TypeError, "host_budget: expected an int, a text or None, got bool"),
        (1.5, TypeError, "host_budget: expected an int, a text or None, got float"),
        ("much", ValueError, "host_budget: expected a size"),
        (0, ValueError, "host_budget: expected a positive size"),
        ("-1GiB", ValueError, "host_budget: expected a size"),
    ],
)
def test_refuses_what_is_no_budget(value, error, text):
    with pytest.raises(error, match=text):
        UsafConfig(host_budget=value)


_MEASURE = """
import sys
import torch
from usaf_ext import experts
from usaf_ext.bank import RowBank
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

warm, path, host_budget, device_budget = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)

def kib(field, file="/proc/self/status"):
    return next(int(line.split()[1]) for line in open(file) if line.startswith(field + ":"))

def steps(store, **budgets):
    memory = ExpertMemory(store, **budgets)
    layers = [experts.PagedLayer(memory, index) for index in range(store.num_layers)]
    picked = torch.arange(store.num_experts, dtype=torch.int32)
    for layer in layers:
        layer.set_bank(RowBank.from_store(store, layer.index, (picked, torch.zeros_like(picked)), mode="in_place"))
    x = torch.randn(256, store.hidden_size, generator=torch.Generator().manual_seed(0))
    index = torch.arange(256 * 4).reshape(256, 4) % store.num_experts
    for _ in range(3):
        hidden = x.clone().requires_grad_()
        for layer in layers:
            hidden = layer(hidden, index, torch.full(index.shape, 0.25))
        hidden.sum().backward()
    return memory, layers

kept = steps(ExpertStore.open(warm))  # what torch sets up once
before = kib("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
memory, layers = steps(ExpertStore.open_within(path, host_budget), host_budget=host_budget, device_budget=device_budget)
print((kib("VmHWM") - before) * 1024, memory.store.tier, memory.device_bytes, memory.stats()["bytes_read"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_process_stays_under_its_budget(tmp_path, share):
    """Opened with all checks, then trained: what the process grows by, beside the device's memory (here the host's)."""
    big = random_store(num_layers=4, num_experts=48, hidden_size=512, intermediate_size=256)
    big.save(tmp_path / "big")
    random_store(num_layers=4, num_experts=8, hidden_size=512, intermediate_size=256).save(tmp_path / "small")
    device_budget = 4 << 20
    host_budget = int(share * big.bytes)
    arguments = [str(tmp_path / "small"), str(tmp_path / "big"), str(host_budget), str(device_budget)]
    result = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True)
    grown, tier, device_bytes, bytes_read = result.stdout.split()
    assert tier == ("disk" if share < 1 else "memory")
    assert int(device_bytes) <= device_budget
    activations = 6 << 20  # of 256 tokens, four layers, and their banks; and what malloc keeps
    assert int(grown) <= host_budget + device_budget + activations
    if share < 1:
        assert int(bytes_read) >= 3 * (big.bytes - host_budget)
        assert host_budget + device_budget + activations < big.bytes / 2
    else:
        assert int(grown) > 0.9 * big.bytes  # the measurement does see the pages
