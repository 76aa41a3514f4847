from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import LAYOUTS, make_checkpoint, tiny_config
from transformers import AutoModel, AutoModelForCausalLM, GptOssConfig, Qwen3Config
from usaf_ext import UsafConfig, expert_memory, expert_store, paged_layers
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.errors import BudgetError, StoreError, UsafError
from usaf_ext.export import export
from usaf_ext.integrations.transformers import originals_of
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

IDS = torch.arange(48).view(2, 24)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    return {layout: make_checkpoint(root / layout, layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints["qwen3_moe"]


def load(path, dtype=torch.float32, **arguments):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=UsafConfig(**arguments), dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_bf16_store_gives_the_logits_of_transformers(checkpoints, layout, dtype, tolerance):
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoints[layout], quantization_config=UsafConfig(format="bf16"), dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[layout], dtype=dtype)
    assert (logits(model) - logits(plain)).abs().max() < tolerance
    assert [layer.name for layer in paged_layers(model)] == ModelSource.open(checkpoints[layout]).layer_names
    assert len({id(layer.memory) for layer in paged_layers(model)}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nf4_equals_transformers_with_the_dequantised_weights(checkpoints, layout, tmp_path):
    model = load(checkpoints[layout])
    assert expert_store(model).format == "nf4"
    source = ModelSource.open(checkpoints[layout])
    export(tmp_path / "out", source=source, store=expert_store(model), banks=[], router={}, base="dequantized")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(model) - logits(plain)).abs().max() < 1e-4
    original = AutoModelForCausalLM.from_pretrained(checkpoints[layout], dtype=torch.float32)
    assert (logits(model) - logits(original)).abs().max() > 1e-2  # quantising does change the model


def test_budget_does_not_change_a_bit(checkpoint):
    rich = load(checkpoint)
    smallest = ExpertMemory.smallest_budget(expert_store(rich), torch.float32)
    poor = load(checkpoint, device_budget=smallest)
    assert torch.equal(logits(rich), logits(poor))
    assert expert_memory(poor).device_bytes <= smallest
    assert expert_memory(load(checkpoint, device_budget="1MiB")).device_bytes <= 1 << 20


def test_store_folder_loads_the_same_model(checkpoint, tmp_path, caplog):
    moved = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    source = ModelSource.open(moved)
    ExpertStore.quantize(source).save(tmp_path / "store", source)
    expected = logits(load(checkpoint))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(load(tmp_path / "store", dtype)), logits(load(checkpoint, dtype)))
    assert originals_of(load(tmp_path / "store")).path == moved
    moved = moved.rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path / "store")
    assert "original weights are not at" in caplog.text
    assert originals_of(model) is None
    assert torch.equal(logits(model), expected)
    assert originals_of(load(tmp_path / "store", originals=moved)).path == moved
    change_config(moved, rms_norm_eps=1e-5)
    with pytest.raises(StoreError, match="not the checkpoint that the store was made of"):
        load(tmp_path / "store", originals=moved)
    with pytest.raises(StoreError, match="no such checkpoint folder"):
        load(tmp_path / "store", originals=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"format: .*a store of nf4, not of bf16"):
        load(tmp_path / "store", format="bf16")


def test_only_anchors_are_trainable_and_they_stay_fp32(checkpoint):
    model = load(checkpoint, torch.bfloat16)
    names = [f"model.layers.{n}.mlp.experts.usaf_anchor" for n in range(2)]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names
    assert not model.training
    for cast in (model.to(torch.float32), model.to(torch.bfloat16), model.to("cpu")):
        anchors = [cast.get_parameter(name) for name in names]
        assert all(anchor.dtype == torch.float32 for anchor in anchors)
        assert [layer.anchor for layer in paged_layers(model)] == anchors
    model = load(checkpoint)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in names)


def test_greedy_generation_is_that_of_transformers(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    arguments = {"inputs": IDS[:1, :8], "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(load(checkpoint, format="bf16").generate(**arguments), plain.generate(**arguments))


def test_base_model_without_head(checkpoint):
    model = AutoModel.from_pretrained(checkpoint, quantization_config=UsafConfig(format="bf16"), dtype=torch.float32)
    plain = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        difference = model(IDS).last_hidden_state - plain(IDS).last_hidden_state
    assert difference.abs().max() < 1e-5


def test_config_as_a_dict_and_no_trace_of_it_afterwards(checkpoint):
    arguments = {"quant_method": "usaf", "format": "bf16", "device_budget": "1MiB"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=arguments, dtype=torch.float32)
    assert expert_store(model).format == "bf16"
    assert "quantization_config" not in model.config.to_dict()


def test_saving_and_copying_are_refused(checkpoint, tmp_path):
    model = load(checkpoint)
    with pytest.raises(UsafError, match=r"without its experts: use usaf_ext\.export"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "int3"}, ValueError, "format: expected one of"),
        ({"device_budget": 1.5}, TypeError, "device_budget: expected an int or a text"),
        ({"device_budget": True}, TypeError, "device_budget: expected an int or a text"),
        ({"device_budget": None}, TypeError, "device_budget: expected an int or a text"),
        ({"device_budget": "much"}, ValueError, "device_budget: expected a size"),
        ({"device_budget": -1}, ValueError, "device_budget: expected a positive size"),
        ({"originals": 3}, TypeError, "originals: expected a path"),
        ({"budget": 3}, TypeError, "budget"),
    ],
)
def test_bad_config(arguments, error, message):
    with pytest.raises(error, match=message):
        UsafConfig(**arguments)


def test_refusals_come_before_any_weight_is_loaded(checkpoint, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were loaded")

    for loader in ("_load_pretrained_model", "_finalize_model_loading"):
        monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel." + loader, never)
    monkeypatch.setattr(ExpertStore, "quantize", never)

    def variant(name, **changes):
        return change_config(shutil.copytree(checkpoint, tmp_path / name), **changes)

    with pytest.raises(BudgetError, match=r"device_budget: 5000 bytes are too few; the smallest that works .* is \d+"):
        load(checkpoint, device_budget=5000)
    with pytest.raises(TypeError, match=r"dtype: expected one of .*torch\.float16\), got torch\.float64"):
        load(checkpoint, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"originals: .*is itself an original checkpoint"):
        load(checkpoint, originals=checkpoint)
    with pytest.raises(ValueError, match="activation 'relu' is not supported"):
        load(variant("relu", hidden_act="relu"))
    with pytest.raises(ValueError, match=r"no module for layers\.1\.mlp\.experts"):
        load(variant("short", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.2\.mlp\.experts"):
        load(variant("long", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"gate_up_proj: the model expects \(6, 64, 72\)"):
        load(variant("wide", moe_intermediate_size=32))
    with pytest.raises(StoreError, match=r"already quantised \(never_heard_of\)"):
        load(variant("strange", quantization_config={"quant_method": "never_heard_of"}))
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config but you are passing a UsafConfig"):
        load(variant("fp8", quantization_config={"quant_method": "fp8"}))


def test_gelu_tanh_is_taken_over(checkpoint, tmp_path):
    folder = change_config(shutil.copytree(checkpoint, tmp_path / "gelu"), hidden_act="gelu_pytorch_tanh")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (logits(load(folder, format="bf16")) - logits(plain)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        (GptOssConfig, {"num_local_experts": 4}, "GptOssExperts.* has biases: this family is not supported yet"),
        (Qwen3Config, {}, "Qwen3ForCausalLM has no experts"),
    ],
)
def test_families_that_cannot_be_paged(tmp_path, family, sizes, message):
    shared = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "pad_token_id")
    tiny = {name: value for name, value in tiny_config().to_dict().items() if name in shared}
    config = family(num_hidden_layers=1, intermediate_size=32, **tiny, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


def test_non_finite_expert_is_named(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.4.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match=r"model\.layers\.1\.mlp\.experts\.4\.down_proj\.weight has non-finite"):
        load(folder)


# --- peak memory ------------------------------------------------------------------------------------------------------

_LAYERS, _EXPERTS, _HIDDEN, _INTERMEDIATE = 4, 32, 512, 512  # 201 MB of bf16 experts, 57 MB in nf4

_MEASURE = """
import gc, sys, threading, time
import torch, transformers, usaf_ext
from transformers import AutoModelForCausalLM
transformers.utils.logging.disable_progress_bar()
path = sys.argv[1]

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def peak_of(load):
    gc.collect()
    before, peak, done = anonymous(), [0], threading.Event()
    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=sample)
    thread.start()
    model = load()
    done.set()
    thread.join()
    return max(peak[0], anonymous()) - before, model

config = usaf_ext.UsafConfig(device_budget="4MiB")
paged, model = peak_of(lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config))
store = usaf_ext.expert_store(model).bytes
dense = sum(p.nbytes for p in model.parameters())
plain, _ = peak_of(lambda: AutoModelForCausalLM.from_pretrained(path))
print(paged, plain, store, dense)
"""


def _write_big_checkpoint(folder: Path) -> int:
    """A checkpoint whose experts dwarf the rest, streamed to disk; returns the bytes of its experts."""
    from usaf_ext.safetensors_io import write_safetensors

    make_checkpoint(
        folder,
        hidden_size=_HIDDEN,
        moe_intermediate_size=_INTERMEDIATE,
        num_experts=1,
        num_experts_per_tok=1,
        num_hidden_layers=_LAYERS,
    )
    source = ModelSource.open(folder)
    tensors = {key: ("BF16", source.tensors[key].shape) for key in source.dense_keys()}
    pieces = {key: b"".join(source.tensor_bytes(key)) for key in tensors}
    one = torch.randn(_INTERMEDIATE, _HIDDEN).bfloat16().view(torch.uint8).numpy().tobytes()
    for layer in range(_LAYERS):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        tensors[gate] = ("BF16", (_EXPERTS, _HIDDEN))
        pieces[gate] = pieces[gate] * _EXPERTS
        for expert in range(_EXPERTS):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                tensors[key], pieces[key] = ("BF16", (_INTERMEDIATE, _HIDDEN)), one
    with (folder / "model.safetensors").open("wb") as file:
        write_safetensors(file, tensors, pieces.values(), {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    changes = {key: _EXPERTS for key in config if re.fullmatch("num(_local)?_experts", key)}
    change_config(folder, **changes)
    return _LAYERS * _EXPERTS * 3 * len(one)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_dense_part_the_store_and_a_slice(tmp_path):
    experts = _write_big_checkpoint(tmp_path)
    result = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    paged, plain, store, dense = map(int, result.stdout.split())
    one_expert = experts // (_LAYERS * _EXPERTS)
    slack = 32 << 20  # the budget's 4 MiB, allocator, tables
    assert paged <= dense + store + one_expert + slack
    assert plain > experts  # the measurement does see experts that are read whole
    assert dense + store + one_expert + slack < experts / 1.5
