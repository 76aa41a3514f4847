"""Checkpoints that bitsandbytes saved in NF4: the same codes and scales, the same weights, and a model that trains."""

from __future__ import annotations

import json
import re
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from bnb_checkpoints import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    STATE,
    decoded,
    dequantised,
    make_bnb_checkpoint,
    quantise,
    scales,
)
from safetensors.torch import load_file, save_file
from tiny_models import all_tensors, make_checkpoint
from transformers import AutoModelForCausalLM
from usaf_ext import UsafConfig, expert_store
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.errors import StoreError
from usaf_ext.expert_page import matrix_of
from usaf_ext.export import export
from usaf_ext.loading import load_model
from usaf_ext.store import ExpertStore

IDS = torch.arange(48).view(2, 24)
KEY = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
EXPERT = KEY.format(1, 2, "up")
DENSE = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """double quantisation or not -> (folder, packed weights)"""
    root = tmp_path_factory.mktemp("bnb")
    return {double: make_bnb_checkpoint(root / str(double), double=double) for double in (False, True)}


@pytest.fixture
def copy(checkpoints, tmp_path):
    return shutil.copytree(checkpoints[True][0], tmp_path / "copy")


@pytest.mark.parametrize("double", [False, True])
def test_pages_hold_bitsandbytes_codes_and_scales(checkpoints, double):
    folder, packed = checkpoints[double]
    store = ExpertStore.quantize(ModelSource.open(folder))
    assert (store.format, store.down_axis, store.layout.down_axis) == ("nf4", "intermediate", "intermediate")
    weights = dequantised(packed)
    for layer in range(2):
        for expert in range(EXPERTS):
            page = store._page(layer, expert)
            read = store.read_expert(layer, expert)
            for matrix, name in enumerate(("gate", "up", "down")):
                key = KEY.format(layer, expert, name)
                codes, absmax = matrix_of(store.layout, page, matrix)
                assert codes.tobytes() == packed[key][0].numpy().tobytes()
                assert absmax.tobytes() == scales(packed[key][1]).numpy().tobytes()
                assert torch.equal(read[matrix], weights[key])


@pytest.mark.parametrize("double", [False, True])
def test_the_source_looks_like_the_plain_checkpoint(checkpoints, tmp_path, double):
    folder, packed = checkpoints[double]
    source = ModelSource.open(folder)
    assert source.packed_experts
    assert source.packed.keys() == packed.keys()
    assert DENSE in packed  # so that dense weights are among them
    assert (source.hidden_size, source.intermediate_size, source.num_experts) == (HIDDEN, INTERMEDIATE, EXPERTS)
    plain = make_checkpoint(
        tmp_path / "plain", hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS
    )
    assert set(source.tensors) == set(all_tensors(plain))
    expected = all_tensors(plain) | dequantised(packed, torch.bfloat16)
    for key, tensor in expected.items():
        assert torch.equal(source.read_tensor(key), tensor)
        assert source.tensors[key].shape == tuple(tensor.shape)
        assert source.tensors[key].torch_dtype == tensor.dtype
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert b"".join(source.tensor_bytes(key, chunk_bytes=1000)) == raw
    in_fp32 = dequantised(packed)
    gate, up, down = (in_fp32[KEY.format(1, 3, name)] for name in ("gate", "up", "down"))
    picked = torch.tensor([INTERMEDIATE - 1, 0, 7])
    rows = torch.stack([gate[picked], up[picked], down[:, picked].T], dim=1)
    assert torch.equal(source.neurons(1, 3, picked), rows)
    assert torch.equal(source.expert(1, 3)[2], down.bfloat16())


@pytest.mark.parametrize(
    ("dtype", "storage", "shard"),
    [
        (torch.float16, torch.uint8, "60KB"),
        (torch.float32, torch.uint8, "5GB"),
        (torch.bfloat16, torch.bfloat16, "5GB"),
    ],
)
def test_other_dtypes_storages_and_shards(tmp_path, dtype, storage, shard):
    folder, packed = make_bnb_checkpoint(tmp_path / "m", dtype=dtype, storage=storage, max_shard_size=shard)
    source = ModelSource.open(folder)
    assert source.dtype == dtype
    for key, weight in dequantised(packed, dtype).items():
        assert torch.equal(source.read_tensor(key), weight)


@pytest.mark.parametrize("shape", [(7, 9), (3, 50), (1, 1), (65, 64)])
@pytest.mark.parametrize("double", [False, True])
def test_dense_weights_of_any_shape(tmp_path, shape, double):
    """Blocks that straddle rows, a short last block, an odd number of weights."""
    folder, _ = make_bnb_checkpoint(tmp_path / "m", wanted=lambda key: "experts" in key)
    path = folder / "model.safetensors"
    codes, state = bnb.quantize_4bit(torch.randn(shape), blocksize=64, quant_type="nf4", compress_statistics=double)
    parts = {f"extra.weight.{part}": tensor.clone() for part, tensor in state.as_dict(packed=True).items()}
    save_file({**load_file(path), "extra.weight": codes, **parts}, path)
    assert torch.equal(ModelSource.open(folder).read_tensor("extra.weight"), decoded(codes, state))


def test_plain_experts_beside_dense_weights_in_nf4(tmp_path):
    """As transformers 5 saves a model it loaded in 4 bits: fused experts are left alone. Any format will do."""
    sizes = {"hidden_size": 72, "moe_intermediate_size": 24}
    folder, packed = make_bnb_checkpoint(tmp_path / "m", sizes=sizes, wanted=lambda key: "experts" not in key)
    source = ModelSource.open(folder)
    assert not source.packed_experts
    assert set(packed) == set(source.packed)
    store = ExpertStore.quantize(source, "int8")
    assert (store.format, store.down_axis) == ("int8", "hidden")
    assert logits(load_model(folder, format="int8").model).isfinite().all()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("layout", ["qwen3_moe", "mixtral"])
def test_loading_equals_transformers_with_the_decoded_weights(tmp_path, layout):
    """From the checkpoint, from its store in either tier, and as a plain model that was exported from it."""
    if layout == "mixtral":
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": 24}
    else:
        sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": 24}
    folder, packed = make_bnb_checkpoint(tmp_path / "m", layout=layout, sizes=sizes)
    source = ModelSource.open(folder)
    ExpertStore.quantize_to(tmp_path / "store", source)
    config = json.loads((tmp_path / "store" / "config.json").read_text())
    assert config == {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k in config}
    assert "quantization_config" not in config
    dense = all_tensors(tmp_path / "store")
    assert set(dense) == set(source.dense_keys())
    for key, weight in dequantised(packed, torch.bfloat16).items():
        assert key not in dense or torch.equal(dense[key], weight)

    direct = load_model(folder, dtype=torch.float32)
    assert direct.originals.fingerprint == source.fingerprint
    assert not any(p.is_meta for p in direct.model.parameters())
    expected = logits(direct.model)
    for budget in (None, "384KiB"):
        loaded = load_model(tmp_path / "store", dtype=torch.float32, host_budget=budget)
        assert expert_store(loaded.model).tier == ("memory" if budget is None else "disk")
        assert torch.equal(logits(loaded.model), expected)
        assert loaded.originals.path == folder
    store = expert_store(direct.model)
    for base in ("dequantized", "original"):
        export(tmp_path / base, source=source, store=store, banks=[], router={}, base=base)
        assert "quantization_config" not in json.loads((tmp_path / base / "config.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / base, dtype=torch.float32)
        tolerance = 1e-4 if base == "dequantized" else 5e-2  # the original's weights were rounded to bf16
        assert (logits(plain) - expected).abs().max() < tolerance


# ---- the folder ----


def test_store_survives_saving_and_old_readers_refuse_it(checkpoints, tmp_path, monkeypatch):
    source = ModelSource.open(checkpoints[True][0])
    store = ExpertStore.quantize(source)
    store.save(tmp_path / "store", source)
    index = json.loads((tmp_path / "store" / "usaf_store.json").read_text())
    assert index["format_version"] == 2
    assert [matrix["block_axis"] for matrix in index["matrices"]] == ["hidden_size", "hidden_size", "intermediate_size"]
    assert [matrix["transposed"] for matrix in index["matrices"]] == [False] * 3
    for tier in ("memory", "disk"):
        opened = ExpertStore.open(tmp_path / "store", tier=tier)
        assert opened.down_axis == "intermediate"
        assert all(map(torch.equal, opened.read_expert(1, 2), store.read_expert(1, 2)))
        assert all(map(torch.equal, opened.rows(1, 2, IDS[0]), store.rows(1, 2, IDS[0])))
    monkeypatch.setattr("usaf_ext.store_files.FORMAT_VERSION", 1)
    with pytest.raises(StoreError, match="format_version 2; this usaf_ext reads 1 to 1"):
        ExpertStore.open(tmp_path / "store")


# ---- refused ----


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_state(key, **changes):
    def change(tensors):
        state = json.loads(bytes(tensors[f"{key}.{STATE}"].tolist())) | changes
        tensors[f"{key}.{STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize("key", [EXPERT, DENSE])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(f"{k}.absmax"), r"\.absmax is missing"),
        (lambda t, k: t.pop(f"{k}.quant_map"), r"\.quant_map is missing"),
        (lambda t, k: t.pop(f"{k}.nested_absmax"), r"\.nested_absmax is missing"),
        (lambda t, k: t.pop(f"{k}.nested_quant_map"), r"\.nested_quant_map is missing"),
        (lambda t, k: t.pop(f"{k}.{STATE}"), r": its quant_state\.bitsandbytes__nf4 is missing"),
        (lambda t, k: t.pop(k), "its codes are missing"),
        (lambda t, k: t.update({k: t[k][:-1].clone()}), "bytes of codes; its shape .* needs"),
        (lambda t, k: t.update({f"{k}.absmax": t[f"{k}.absmax"][1:].clone()}), r"\.absmax: U8 .*; expected U8"),
        (lambda t, k: t.update({f"{k}.absmax": t[f"{k}.absmax"].float()}), r"\.absmax: F32 .*; expected U8"),
        (lambda t, k: t.update({f"{k}.{STATE}": torch.tensor([1, 2], dtype=torch.uint8)}), "nf4: damaged"),
        (lambda t, k: set_state(k, blocksize=128)(t), "nf4 with blocks of 128; only nf4 with blocks of 64"),
        (lambda t, k: set_state(k, quant_type="fp4")(t), "fp4 with blocks of 64; only nf4"),
        (lambda t, k: set_state(k, dtype="int8")(t), "damaged.*int8"),
        (lambda t, k: set_state(k, shape=None)(t), "nf4: damaged"),
        (lambda t, k: set_state(k, shape=[-8, 8])(t), "nf4: damaged"),
        (lambda t, k: set_state(k, nested_blocksize=0)(t), "nf4: damaged"),
        (lambda t, k: set_state(k, nested_offset=float("nan"))(t), "nf4: damaged"),
        (lambda t, k: t.update({f"{k}.{STATE[:-3]}fp4": t.pop(f"{k}.{STATE}")}), "fp4; expected nf4"),
        (lambda t, k: t.update({f"{k[:-7]}.SCB": torch.zeros(4)}), r"SCB: bitsandbytes' 8-bit weights"),
    ],
)
def test_refuses_damaged_and_foreign_weights(copy, key, change, message):
    edit(copy, lambda tensors: change(tensors, key))
    with pytest.raises(StoreError, match=message) as caught:
        ModelSource.open(copy)
    assert str(copy) in str(caught.value)
    assert key.removesuffix(".weight") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({f"{EXPERT}.quant_map": torch.linspace(-1, 1, 16)}),
            "quant_map: expected the values of NF4",
        ),
        (lambda t: t.update({f"{EXPERT}.nested_absmax": torch.tensor([float("inf")])}), "absmax: scales .* not finite"),
    ],
)
def test_refuses_what_shows_when_it_is_read(copy, tmp_path, change, message):
    edit(copy, change)
    source = ModelSource.open(copy)
    for work in (
        lambda: ExpertStore.quantize(source),
        lambda: ExpertStore.quantize_to(tmp_path / "store", source),
        lambda: source.expert(1, 2),
        lambda: source.read_tensor(EXPERT),
    ):
        with pytest.raises(StoreError, match=f"{re.escape(str(copy))}: {EXPERT}.{message}"):
            work()
    assert not (tmp_path / "store").exists()


def test_refuses_other_checkpoints(tmp_path, copy, checkpoints):
    source = ModelSource.open(copy)
    with pytest.raises(ValueError, match=r"format: .*imported as they are: expected 'nf4', got 'int8'"):
        ExpertStore.quantize(source, "int8")
    with pytest.raises(ValueError, match=r"format: .*expected 'nf4', got 'bf16'"):
        load_model(copy, format="bf16")
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):  # transformers' own
        AutoModelForCausalLM.from_pretrained(copy, quantization_config=UsafConfig())
    for sizes in ({"hidden_size": 96}, {"moe_intermediate_size": 96}):
        folder, _ = make_bnb_checkpoint(
            tmp_path / next(iter(sizes)), sizes={"hidden_size": 64, "moe_intermediate_size": 64} | sizes
        )
        for work in (lambda: ExpertStore.quantize(ModelSource.open(folder)), lambda: load_model(folder)):  # noqa: B023
            with pytest.raises(StoreError, match=r"multiples of 64 \(a block would straddle rows\), got"):
                work()
    plain = make_checkpoint(tmp_path / "plain", hidden_size=64, moe_intermediate_size=64)
    shutil.copytree(plain, tmp_path / "partly")
    quantise(tmp_path / "partly", double=True, wanted=lambda key: "experts.0." in key)
    with pytest.raises(StoreError, match=r"some experts are in NF4, model\.layers\.0\.mlp\.experts\.1\.down_proj"):
        ModelSource.open(tmp_path / "partly")
    quantise(plain, double=True, wanted=lambda key: False)
    with pytest.raises(StoreError, match="but no weight in NF4"):
        ModelSource.open(plain)
    fp4 = make_checkpoint(tmp_path / "fp4")
    quantise(fp4, double=False, quant_type="fp4")
    with pytest.raises(StoreError, match="fp4; expected nf4"):
        ModelSource.open(fp4)
    wide = make_checkpoint(tmp_path / "wide")
    quantise(wide, double=False, blocksize=128)
    with pytest.raises(StoreError, match="nf4 with blocks of 128"):
        ModelSource.open(wide)


def test_create_and_write_refuse(checkpoints):
    with pytest.raises(ValueError, match="down_axis: expected one of 'hidden', 'intermediate', got 'rows'"):
        ExpertStore.create(["a"], 1, 64, 64, down_axis="rows")
    with pytest.raises(StoreError, match="down_axis 'intermediate': expected the format nf4, got int8"):
        ExpertStore.create(["a"], 1, 64, 64, "int8", down_axis="intermediate")
    for sizes in ((64, 72), (72, 64)):
        with pytest.raises(StoreError, match=r"multiples of 64 \(a block would straddle rows\), got"):
            ExpertStore.create(["a"], 1, *sizes, down_axis="intermediate")
    store = ExpertStore.create(["a"], 1, 64, 128, down_axis="intermediate")
    good = torch.full((128 * 32,), 0x7F, dtype=torch.uint8), torch.ones(128)
    store.write_encoded_expert(0, 0, good, good, good)
    before = bytes(store.native.page(0, 0))
    for bad, error, message in (
        ((good[0].int(), good[1]), TypeError, "codes of down of layer 0, expert 0: expected a tensor of torch.uint8"),
        (
            (good[0], good[1].half()),
            TypeError,
            "absmax of down .*expected a tensor of torch.float32, got torch.float16",
        ),
        ((good[0], None), TypeError, "absmax of down .*got NoneType"),
        ((good[0][1:], good[1]), ValueError, r"codes of down .*expected 64 x 64 values, got \(4095,\)"),
        ((good[0], good[1][1:]), ValueError, r"absmax of down .*expected 64 x 2 values"),
        ((good[0], good[1] * float("nan")), ValueError, "absmax of down of layer 0, expert 0: not finite"),
    ):
        with pytest.raises(error, match=message):
            store.write_encoded_expert(0, 0, good, good, bad)
    with pytest.raises(StoreError, match="no page for layer 0, expert 1"):
        store.write_encoded_expert(0, 1, good, good, good)
    assert bytes(store.native.page(0, 0)) == before
    store.seal()
    with pytest.raises(StoreError, match="sealed"):
        store.write_encoded_expert(0, 0, good, good, good)
