from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import usaf_ext.export as export_module
from tiny_models import LAYOUTS, all_tensors, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from usaf_ext.bank import RowBank
from usaf_ext.checkpoint_folder import CheckpointFolder
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.errors import StoreError
from usaf_ext.export import export
from usaf_ext.store import ExpertStore

NEURONS = {0: [(0, 0), (0, 23), (3, 7)], 1: [(5, 1), (5, 2), (5, 3)]}  # layer -> (expert, neuron)
PARAMETER = "model.layers.{}.mlp.gate.weight"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """layout -> (source, store in nf4)"""
    root = tmp_path_factory.mktemp("export")
    result = {}
    for layout in LAYOUTS:
        sizes = {"max_shard_size": "60KB"} if layout == "mixtral" else {}
        source = ModelSource.open(make_checkpoint(root / layout, layout, **sizes))
        result[layout] = (source, ExpertStore.quantize(source, "nf4"))
    return result


def make_banks(source, store, mode="master", master_dtype=torch.float32):
    """Banks whose neurons were moved by "training": masters and codes both changed, differently."""
    banks = []
    for layer, neurons in NEURONS.items():
        index = tuple(torch.tensor(column, dtype=torch.int32) for column in zip(*neurons))
        bank = RowBank.from_store(store, layer, index, originals=source, mode=mode, master_dtype=master_dtype)
        if bank.master is not None:
            bank.master.add_(torch.randn(bank.master.shape) * 0.01)
        bank.codes.copy_(bank.codes.flip(-1))
        bank.absmax.mul_(1.5)
        banks.append(bank)
    return banks


def make_router(source, step=0.01):
    return {
        PARAMETER.format(layer): source.read_tensor(key).float() + step * torch.randn(6, 72)
        for layer in range(2)
        for key in source.tensors
        if key.endswith(f"layers.{layer}.mlp.gate.weight")
        or key.endswith(f"layers.{layer}.block_sparse_moe.gate.weight")
    }


def expected_experts(base_expert, rows_of, dtype):
    """(layer, expert) -> (gate, up, down) by plain indexing."""
    result = {}
    for layer in range(2):
        for expert in range(6):
            result[layer, expert] = [weight.clone().to(dtype) for weight in base_expert(layer, expert)]
        for (expert, neuron), row in zip(NEURONS[layer], rows_of(layer)):
            gate, up, down = result[layer, expert]
            gate[neuron], up[neuron], down[:, neuron] = row.to(dtype)
    return result


def assert_experts(folder, expected):
    written = ModelSource.open(folder)
    for (layer, expert), weights in expected.items():
        for read, meant in zip(written.expert(layer, expert), weights):
            assert read.dtype == meant.dtype
            assert torch.equal(read, meant)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["master", "in_place"])
def test_original_base_changes_the_trained_rows_and_nothing_else(setup, tmp_path, layout, mode):
    source, store = setup[layout]
    banks, router = make_banks(source, store, mode), make_router(source)
    report = export(tmp_path / "out", source=source, store=store, banks=banks, router=router)
    rows = [bank.master if mode == "master" else bank.decode(torch.float32) for bank in banks]
    assert_experts(tmp_path / "out", expected_experts(source.expert, lambda layer: rows[layer], torch.bfloat16))
    before, after = all_tensors(source.path), all_tensors(tmp_path / "out")
    assert {key: (t.dtype, t.shape) for key, t in before.items()} == {
        key: (t.dtype, t.shape) for key, t in after.items()
    }
    assert ModelSource.open(tmp_path / "out").shards == source.shards
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    trained_keys = {key for n, found in NEURONS.items() for e, _ in found for key in source.expert_keys(n, e)}
    routers = {key for key in before if key.endswith("gate.weight")}
    assert changed == trained_keys | routers
    for name, weight in router.items():
        key = name.replace(".mlp.", ".block_sparse_moe.") if layout == "mixtral" else name
        assert torch.equal(after[key], weight.bfloat16())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.path / name).read_bytes()
    assert report.trained_weights == 6 * 3 * 72
    assert report.untrained_weights == 2 * 6 * 3 * 24 * 72 - report.trained_weights
    assert (report.router_tensors, report.base, report.dtype) == (2, "original", torch.bfloat16)
    assert report.dense_tensors + report.router_tensors == len(source.dense_keys())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_nothing_trained_is_the_same_checkpoint(setup, tmp_path):
    source, store = setup["qwen3_moe"]
    report = export(tmp_path / "out", source=source, store=store, banks=[], router={})
    before, after = all_tensors(source.path), all_tensors(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (report.trained_weights, report.router_change_surviving) == (0, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantized_base_is_what_the_model_computed_with(setup, tmp_path, layout, dtype):
    source, store = setup[layout]
    banks, router = make_banks(source, store), make_router(source)
    report = export(
        tmp_path / "out", source=source, store=store, banks=banks, router=router, base="dequantized", dtype=dtype
    )
    written = dtype or torch.float32
    rows = [bank.decode(torch.float32) for bank in banks]
    assert_experts(tmp_path / "out", expected_experts(store.read_expert, lambda layer: rows[layer], written))
    before, after = all_tensors(source.path), all_tensors(tmp_path / "out")
    for key in source.dense_keys():
        if not key.endswith("gate.weight"):
            assert torch.equal(after[key], before[key].to(written))
    routers = [after[key] for key in sorted(after) if key.endswith("gate.weight")]
    assert all(torch.equal(a, b) for a, b in zip(routers, router.values()))
    assert all(weight.dtype == torch.float32 for weight in routers)
    assert report.router_change_surviving == pytest.approx(1)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == written
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<eos>"


@pytest.mark.parametrize("layout", ["qwen3_moe", "mixtral"])
def test_dequantized_from_the_stores_folder_alone(setup, tmp_path, layout):
    source, store = setup[layout]
    store.save(tmp_path / "store", source)
    banks, router = make_banks(source, store), make_router(source)
    arguments = {"store": store, "banks": banks, "router": router, "base": "dequantized"}
    export(tmp_path / "with", source=source, **arguments)
    folder = CheckpointFolder.open(tmp_path / "store")
    export(tmp_path / "without", source=folder, **arguments)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("with", "without"))
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)
    with pytest.raises(ValueError, match="base 'original' needs the original checkpoint"):
        export(tmp_path / "no", source=folder, store=store, banks=banks, router={})
    assert not (tmp_path / "no").exists()


def test_surviving_share_of_the_routers_change(setup, tmp_path):
    source, store = setup["qwen3_moe"]
    shares = {}
    for step in (1e-7, 1e-1):
        out = tmp_path / f"{step}"
        router = make_router(source, step)
        report = export(out, source=source, store=store, banks=[], router=router)
        shares[step] = report.router_change_surviving
        original = torch.cat([source.read_tensor(key) for key in router]).double()
        trained = torch.cat(list(router.values())).double()
        written = torch.cat([ModelSource.open(out).read_tensor(key) for key in router]).double()
        change = trained - original
        assert shares[step] == pytest.approx(float(((written - original) * change).sum() / change.square().sum()))
    assert shares[1e-7] < 0.1  # far below a bf16 step: hardly anything is left
    assert shares[1e-1] > 0.95


@pytest.mark.parametrize("kind", ["expert", "dense", "router", "trained"])
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_flipped_bit_on_disk_is_found_and_leaves_nothing(setup, tmp_path, monkeypatch, kind, base):
    source, store = setup["qwen3_moe"]
    key, offset = {
        "expert": ("model.layers.0.mlp.experts.1.up_proj.weight", 100),
        "dense": ("lm_head.weight", 5000),
        "router": (PARAMETER.format(0), 8),
        "trained": ("model.layers.0.mlp.experts.0.gate_proj.weight", 0),  # row 0 is trained
    }[kind]
    write = export_module.write_safetensors

    def damaging(file, tensors, chunks, metadata):
        write(file, tensors, chunks, metadata)
        file.flush()
        raw = Path(file.name).read_bytes()
        header = int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8 : 8 + header])[key]
        position = 8 + header + entry["data_offsets"][0] + offset
        with open(file.name, "r+b") as again:
            again.seek(position)
            byte = again.read(1)[0]
            again.seek(position)
            again.write(bytes([byte ^ 1]))

    monkeypatch.setattr(export_module, "write_safetensors", damaging)
    with pytest.raises(StoreError, match=r"differs|other bits"):
        export(
            tmp_path / "out",
            source=source,
            store=store,
            banks=make_banks(source, store),
            router=make_router(source),
            base=base,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(setup, tmp_path, monkeypatch):
    source, store = setup["qwen3_moe"]

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_safetensors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "out", source=source, store=store, banks=[], router={})
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_write_nothing(setup, tmp_path):
    source, store = setup["qwen3_moe"]
    other, other_store = setup["fused"]
    banks = make_banks(source, store)
    name = PARAMETER.format(0)
    poisoned = make_banks(source, store)
    poisoned[1].master[0, 0, 0] = float("nan")
    poisoned[1].absmax[0, 0, 0] = float("nan")
    bf16 = ExpertStore.quantize(source, "bf16")
    cases = [
        ({"base": "merged"}, ValueError, "base: expected one of"),
        ({"dtype": torch.float32}, ValueError, "keeps the checkpoint's"),
        ({"base": "dequantized", "dtype": torch.float16}, ValueError, "dtype: expected one of"),
        ({"source": other}, StoreError, "not the checkpoint that the store"),
        ({"store": other_store}, StoreError, "not the checkpoint that the store"),
        ({"banks": [banks[0], banks[0]]}, ValueError, "a neuron of layer 0 is given twice"),
        ({"store": bf16}, ValueError, "in nf4, the store in bf16"),
        ({"banks": poisoned}, StoreError, "layer 1 has trained weights that are not finite"),
        ({"banks": poisoned, "base": "dequantized"}, StoreError, "layer 1 has trained weights that are not finite"),
        ({"router": {"model.layers.7.mlp.gate.weight": torch.zeros(6, 72)}}, StoreError, "no tensor for the parameter"),
        ({"router": {name: torch.zeros(6, 71)}}, ValueError, r"router: .*expected float32 \(6, 72\)"),
        ({"router": {name: torch.zeros(6, 72).bfloat16()}}, ValueError, "expected float32"),
        ({"router": {name: torch.full((6, 72), float("inf"))}}, StoreError, "router: .*not finite"),
    ]
    for change, error, message in cases:
        arguments = {"source": source, "store": store, "banks": banks, "router": {}} | change
        with pytest.raises(error, match=message):
            export(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_kept(setup, tmp_path):
    source, store = setup["qwen3_moe"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for target in (tmp_path / "taken", tmp_path / "taken" / "file", source.path):
        with pytest.raises(FileExistsError):
            export(target, source=source, store=store, banks=[], router={})
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", source=source, store=store, banks=[], router={})
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_torch_dtype_spelling_of_old_configs(setup, tmp_path):
    old = shutil.copytree(setup["qwen3_moe"][0].path, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    source = ModelSource.open(old)
    export(tmp_path / "out", source=source, store=ExpertStore.quantize(source), banks=[], router={}, base="dequantized")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
