from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS, all_tensors, make_checkpoint, reference_experts
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.errors import StoreError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {layout: make_checkpoint(root / layout, layout) for layout in LAYOUTS}


@pytest.fixture
def copy(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "copy")


def edit(folder, change):
    """Apply `change` to the dict of the folder's tensors and write it back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_equal_what_transformers_loads(checkpoints, layout):
    source = ModelSource.open(checkpoints[layout])
    expected = reference_experts(checkpoints[layout])
    assert source.layer_names == list(expected) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert (source.num_experts, source.hidden_size, source.intermediate_size) == (6, 72, 24)
    assert source.dtype == torch.bfloat16
    for layer, (gate_up, down) in enumerate(expected.values()):
        for expert in range(source.num_experts):
            gate, up, got_down = source.expert(layer, expert)
            assert torch.equal(torch.cat([gate, up]), gate_up[expert])
            assert torch.equal(got_down, down[expert])
            picked = torch.tensor([23, 0, 7], dtype=torch.int32)
            rows = source.neurons(layer, expert, picked)
            index = picked.long()
            assert torch.equal(rows, torch.stack([gate[index], up[index], down[expert][:, index].T], dim=1))
    assert source.neurons(0, 0, torch.empty(0, dtype=torch.int64)).shape == (0, 3, 72)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_split_into_experts_and_dense(checkpoints, layout):
    source = ModelSource.open(checkpoints[layout])
    tensors = all_tensors(checkpoints[layout])
    dense = source.dense_keys()
    experts = {key for layer in range(2) for e in range(6) for key in source.expert_keys(layer, e)}
    assert set(dense) == {key for key in tensors if ".experts." not in key}
    assert experts == set(tensors) - set(dense)
    assert all(source.is_expert_key(key) for key in experts)
    assert not any(source.is_expert_key(key) for key in dense)
    for key in dense:
        raw = tensors[key].contiguous().view(torch.uint8).numpy().tobytes()
        assert b"".join(source.tensor_bytes(key, chunk_bytes=1000)) == raw
        assert torch.equal(source.read_tensor(key), tensors[key])


def test_sharded_checkpoint_reads_the_same(checkpoints, tmp_path):
    sharded = make_checkpoint(tmp_path / "sharded", max_shard_size="60KB")
    source, single = ModelSource.open(sharded), ModelSource.open(checkpoints["qwen3_moe"])
    assert len(source.shards) > 3
    assert {key for keys in source.shards.values() for key in keys} == set(single.tensors)
    for layer in range(2):
        for expert in range(6):
            for a, b in zip(source.expert(layer, expert), single.expert(layer, expert)):
                assert torch.equal(a, b)


def test_layers_are_sorted_by_number(tmp_path):
    folder = make_checkpoint(tmp_path / "deep", num_hidden_layers=12, mlp_only_layers=[1], num_experts=2)
    names = ModelSource.open(folder).layer_names
    assert names == [f"model.layers.{n}.mlp.experts" for n in range(12) if n != 1]


def test_fingerprint_follows_config_and_headers_and_no_path(checkpoints, copy):
    first = ModelSource.open(checkpoints["qwen3_moe"]).fingerprint
    assert len(first) == 64
    assert ModelSource.open(copy).fingerprint == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    second = ModelSource.open(copy).fingerprint
    assert second != first
    edit(copy, lambda tensors: tensors.update(extra=torch.zeros(3)))
    assert ModelSource.open(copy).fingerprint not in (first, second)


def test_reads_after_close(checkpoints):
    source = ModelSource.open(checkpoints["fused"])
    before = source.expert(1, 2)
    source.close()
    assert all(torch.equal(a, b) for a, b in zip(before, source.expert(1, 2)))


def test_support_files(checkpoints):
    names = {path.name for path in ModelSource.open(checkpoints["qwen3_moe"]).support_files()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not any(name.endswith(".safetensors") for name in names)


EXPERT = "model.layers.1.mlp.experts.5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.up_proj.weight"), "expert 5, up_proj of model.layers.1.mlp.experts is missing"),
        (lambda t: [t.pop(f"{EXPERT}.{m}_proj.weight") for m in ("gate", "up", "down")], "expert 5, gate_proj"),
        (lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(24, 71).bfloat16()}), r"up_proj.*\[24, 71\]"),
        (lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(24, 72)}), "up_proj.*F32.*expected BF16"),
        (lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.zeros(24)}), "expected 2 axes"),
        (lambda t: t.update({f"{EXPERT}.up_proj.bias": torch.zeros(24)}), "up_proj.bias.*not in a known expert layout"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(6, 48, 72)}),
            "not in a known expert layout",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if ".experts.5." in k],
            r"5 experts, but config\.json has num_\w+ = 6",
        ),
        (lambda t: [t.pop(k) for k in list(t) if ".experts." in k], "no expert weights"),
    ],
)
def test_foreign_experts_are_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(StoreError, match=message):
        ModelSource.open(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("matrix", ["gate_proj", "down_proj"])
def test_non_finite_weights_are_refused_by_key(copy, value, matrix):
    key = f"{EXPERT}.{matrix}.weight"
    edit(copy, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    source = ModelSource.open(copy)
    source.expert(1, 4)
    with pytest.raises(StoreError, match=f"{key} has non-finite"):
        source.expert(1, 5)


def test_fused_with_transposed_experts_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["fused"], tmp_path / "transposed")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    edit(folder, lambda t: t.update({key: t[key].transpose(1, 2).contiguous()}))
    with pytest.raises(StoreError, match=r"gate_up_proj.*\[6, 72, 48\].*expected BF16 \[6, 48, 72\]"):
        ModelSource.open(folder)


def test_damaged_files_are_refused(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        whole + b"x",
        whole[:100],
        b"",
        b"PK\x03\x04" + whole[4:],
        whole[:20] + b"\0" + whole[21:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"model\.safetensors"):
            ModelSource.open(copy)


def test_folders_that_are_no_checkpoint(copy, tmp_path):
    with pytest.raises(StoreError, match="no such checkpoint folder"):
        ModelSource.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"no config\.json"):
        ModelSource.open(tmp_path / "empty")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(StoreError, match="only pickled weights"):
        ModelSource.open(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(StoreError, match=r"neither model\.safetensors"):
        ModelSource.open(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(StoreError, match=r"config\.json"):
        ModelSource.open(copy)


def test_quantised_checkpoint_and_store_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(StoreError, match=r"already quantised \(fp8\)"):
        ModelSource.open(copy)
    (copy / "usaf_store.json").write_text("{}")
    with pytest.raises(StoreError, match="a usaf store"):
        ModelSource.open(copy)


def test_missing_shard_and_key_and_escaping_shard_name(tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="60KB")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    key, shard = next(iter(index["weight_map"].items()))
    for broken, message in (
        (index["weight_map"] | {"nowhere.weight": shard}, "'nowhere.weight' is missing"),
        (index["weight_map"] | {key: "../x.safetensors"}, "leads out of the folder"),
        (index["weight_map"] | {key: "absent.safetensors"}, r"absent\.safetensors is missing"),
        ("text", "damaged index"),
    ):
        index_path.write_text(json.dumps({"weight_map": broken}))
        with pytest.raises(StoreError, match=message):
            ModelSource.open(folder)


def test_hub_id_offline_names_the_reason(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repo_id, allow_patterns):
        assert repo_id == "some-org/some-model"
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        raise LocalEntryNotFoundError("outgoing traffic is disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(StoreError, match=r"some-org/some-model.*not available from the hub.*outgoing traffic"):
        ModelSource.open("some-org/some-model")


def test_bad_indices(checkpoints):
    source = ModelSource.open(checkpoints["qwen3_moe"])
    for layer, expert in ((2, 0), (-1, 0), (0, 6), (0, -1)):
        with pytest.raises(IndexError, match="expected a value in"):
            source.expert(layer, expert)
    with pytest.raises(IndexError, match="neurons"):
        source.neurons(0, 0, torch.tensor([24]))
    with pytest.raises(TypeError, match="neurons"):
        source.neurons(0, 0, torch.tensor([1.0]))
    with pytest.raises(KeyError):
        source.read_tensor("absent")
