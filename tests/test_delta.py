"""Delta files: round trip, and every kind of damage refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint
from trained_models import bank_state, banked_model, paged_model, same_bits, tokens
from usaf_ext import StoreError, expert_store, paged_layers
from usaf_ext.delta import apply_delta, delta_of, read_delta, write_delta
from usaf_ext.loss import causal_lm_loss
from usaf_ext.optimizer import MaskedAdam
from usaf_ext.router import train_routers, trained_routers

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(checkpoint, router=True, **options):
    model = banked_model(checkpoint, **options)
    if router:
        train_routers(model)
    optimizer = MaskedAdam(model, lr=1e-2)
    total, count = causal_lm_loss(model, tokens(2))
    (total / count).backward()
    optimizer.step()
    return model


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return trained(tiny_checkpoint)


@pytest.fixture
def path(model, tmp_path):
    write_delta(tmp_path / "delta.safetensors", delta_of(model))
    return tmp_path / "delta.safetensors"


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("nf4", {}),
        ("nf4", {"mode": "in_place"}),
        ("nf4", {"router": False, "master_dtype": torch.float32}),
        ("bf16", {}),
    ],
)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.usefixtures("device")
def test_round_trip(tiny_checkpoint, tmp_path, format, options, trainable):
    model = trained(tiny_checkpoint, format=format, **options)
    write_delta(tmp_path / "d", delta_of(model))
    other = paged_model(tiny_checkpoint, format=format)
    with torch.no_grad():
        expected, untrained = model(tokens(2)).logits, other(tokens(2)).logits
        apply_delta(other, read_delta(tmp_path / "d"), trainable=trainable)
        assert torch.equal(other(tokens(2)).logits, expected)
        assert not torch.equal(untrained, expected)
    assert same_bits(bank_state(model), bank_state(other))
    assert trained_routers(other).keys() == trained_routers(model).keys()
    assert all((layer.bank.grad is not None) == trainable for layer in paged_layers(other))
    write_delta(tmp_path / "again", delta_of(other))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes()


def test_readable_with_safetensors_alone(model, path):
    tensors = load_file(path)
    layer = paged_layers(model)[0]
    assert torch.equal(tensors[f"{layer.name}.master"], layer.bank.master)
    assert torch.equal(tensors["model.layers.0.mlp.gate.weight"], model.model.layers[0].mlp.gate.weight)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["usaf"])
    assert (header["format_version"], header["kind"], header["format"], header["mode"]) == (
        2,
        "usaf_delta",
        "nf4",
        "master",
    )
    assert header["fingerprint"] == expert_store(model).fingerprint


def test_truncated(path):
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"delta\.safetensors"):
            read_delta(path)
    path.write_bytes(whole)
    read_delta(path)


def test_any_flipped_bit(path):
    whole = bytearray(path.read_bytes())
    for position in [*range(0, len(whole), 397), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(StoreError):
            read_delta(path)


def change_header(path, **changes):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["usaf"])
    save_file(tensors, path, metadata={"usaf": json.dumps(header | changes)})


def test_foreign_and_newer(path, tmp_path):
    with pytest.raises(StoreError, match="no such file"):
        read_delta(tmp_path / "nothing")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(StoreError, match="not a usaf_delta file"):
        read_delta(tmp_path / "plain")
    (tmp_path / "text").write_text("hello, this is no tensor file at all")
    with pytest.raises(StoreError, match="damaged"):
        read_delta(tmp_path / "text")
    change_header(path, format_version=3)
    with pytest.raises(StoreError, match="format version 3; this usaf_ext reads up to 2"):
        read_delta(path)
    change_header(path, format_version=1, mode="in_place")
    with pytest.raises(StoreError, match="sha256"):
        read_delta(path)
    change_header(path, kind="usaf_store")
    with pytest.raises(StoreError, match="not a usaf_delta file"):
        read_delta(path)


def test_a_writer_that_dies_leaves_the_old_one(model, path, monkeypatch):
    from usaf_ext import delta as module

    before = path.read_bytes()

    def half(tensors, file, metadata):
        file.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        write_delta(path, delta_of(model))
    assert path.read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        write_delta(path.with_name("new"), delta_of(model))
    assert not path.with_name("new").exists()
    read_delta(path)


def test_another_base_model_is_refused(path, tmp_path, tiny_checkpoint):
    delta = read_delta(path)
    other = paged_model(make_checkpoint(tmp_path / "other", dtype=torch.float32))
    with pytest.raises(StoreError, match="another base model"):
        apply_delta(other, delta)
    with pytest.raises(StoreError, match="format nf4, the store bf16"):
        apply_delta(paged_model(tiny_checkpoint, format="bf16"), delta)
    assert all(layer.bank is None for layer in paged_layers(other))


def test_rows_that_do_not_fit_change_nothing(path, tiny_checkpoint):
    delta = read_delta(path)
    model = paged_model(tiny_checkpoint)
    last = list(delta.banks.values())[-1]
    last["neuron_index"] = last["neuron_index"] + 100
    with pytest.raises(StoreError, match=r"model\.layers\.1.*neuron_index must lie in"):
        apply_delta(model, delta)
    del delta.banks["model.layers.1.mlp.experts"]
    delta.banks["model.layers.7.mlp.experts"] = last
    with pytest.raises(StoreError, match=r"layers that the model lacks: model\.layers\.7"):
        apply_delta(model, delta)
    del delta.banks["model.layers.7.mlp.experts"]
    delta.routers.popitem()
    with pytest.raises(StoreError, match="only some"):
        apply_delta(model, delta)
    assert all(layer.bank is None for layer in paged_layers(model))
    assert not trained_routers(model)


def test_nothing_trained(tiny_checkpoint):
    with pytest.raises(ValueError, match="nothing was trained"):
        delta_of(paged_model(tiny_checkpoint))
