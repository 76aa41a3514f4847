"""The folder of an ExpertStore: exact, readable by others, refused when altered, safe from a kill."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from killed import dies_at
from random_stores import pages, random_store
from safetensors import safe_open
from tiny_models import LAYOUTS, all_tensors, make_checkpoint
from transformers import AutoConfig, AutoTokenizer
from usaf_ext import _C, store_files
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.errors import StoreError
from usaf_ext.store import ExpertStore, is_store

FORMATS = _C.FORMATS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store's folder of three experts files. Copy it before changing it."""
    store = random_store()
    path = tmp_path_factory.mktemp("saved") / "store"
    store.save(path, shard_bytes=2 * store.layout.page_bytes)
    return store, path


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved[1], tmp_path / "store"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", max_shard_size="60KB")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pages_per_file", [1, 4, 6, 100])
def test_opens_as_it_was_saved(tmp_path, format, pages_per_file):
    store = random_store(format=format)
    store.save(tmp_path / "new" / "store", shard_bytes=pages_per_file * store.layout.page_bytes)
    path = tmp_path / "new" / "store"
    assert is_store(path)
    assert not is_store(tmp_path)
    assert len(list(path.glob("experts-*.safetensors"))) == -(-6 // pages_per_file)
    for verify in (True, False):
        opened = ExpertStore.open(path, verify=verify)
        assert pages(opened) == pages(store)
        assert opened.sealed
        for name in ("layer_names", "num_layers", "num_experts", "hidden_size", "intermediate_size", "format", "bytes"):
            assert getattr(opened, name) == getattr(store, name)
        assert opened.source_path is opened.fingerprint is None


def test_the_files_need_nothing_of_ours(saved):
    store, path = saved
    index = json.loads((path / "usaf_store.json").read_text())
    found = {}
    for file in sorted(path.glob("experts-*.safetensors")):
        assert index["files"][file.name]["bytes"] == file.stat().st_size
        data_start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert data_start % 4096 == 0
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a mapping)
                found[key] = tensors.get_tensor(key).numpy().tobytes()
    assert list(found) == [f"layers.{layer}.experts.{expert}" for layer in range(2) for expert in range(3)]
    assert list(found.values()) == pages(store)
    assert {key: zlib.crc32(page) for key, page in found.items()} == index["page_crc32"]
    assert (index["format_version"], index["format"], index["page_bytes"]) == (1, "nf4", store.layout.page_bytes)
    assert [m["codes_offset"] for m in index["matrices"]] == store.layout.codes_offset
    assert [m["transposed"] for m in index["matrices"]] == [False, False, True]


@pytest.mark.parametrize("layout", [*LAYOUTS, "sharded"])
def test_a_checkpoints_other_parts_are_copied_byte_for_byte(tmp_path, checkpoint, layout):
    model = checkpoint if layout == "sharded" else make_checkpoint(tmp_path / "model", layout)
    (model / "README.md").write_text("not needed")
    source = ModelSource.open(model)
    store = ExpertStore.quantize(source)
    store.save(tmp_path / "store", source)
    opened = ExpertStore.open(tmp_path / "store")
    assert (opened.source_path, opened.fingerprint) == (str(model.resolve()), source.fingerprint)
    assert opened.layer_names == source.layer_names
    for layer, expert in ((0, 0), (1, 5)):
        for got, weight in zip(opened.read_expert(layer, expert), source.expert(layer, expert)):
            assert (got - weight.float()).abs().max() < 0.2 * weight.float().abs().max()  # coarse: the right one

    original, copied = all_tensors(model), all_tensors(tmp_path / "store")
    assert set(copied) == set(source.dense_keys())
    for key, tensor in copied.items():
        assert tensor.dtype == original[key].dtype
        assert torch.equal(tensor.view(torch.uint8), original[key].view(torch.uint8))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "store" / name).read_bytes() == (model / name).read_bytes()
    assert not (tmp_path / "store" / "README.md").exists()
    assert AutoConfig.from_pretrained(tmp_path / "store").num_experts_per_tok == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "store")("abc") == AutoTokenizer.from_pretrained(model)("abc")


def test_neither_saving_nor_opening_makes_a_second_copy(tmp_path):
    store = random_store(2, 64, 256, 64)
    assert store.bytes > 3 << 20
    for work in (lambda: store.save(tmp_path / "store"), lambda: ExpertStore.open(tmp_path / "store")):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < store.bytes / 8


# ---- refused ----


def refused(folder: Path, text: str, **arguments) -> None:
    with pytest.raises(StoreError, match=text) as caught:
        ExpertStore.open(folder, **arguments)
    assert folder.name in str(caught.value)


def test_refuses_a_bit_flipped_in_any_page(copied):
    for file in sorted(copied.glob("experts-*.safetensors")):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for offset in range(start, len(data), 1000):
            data[offset] ^= 4
            file.write_bytes(data)
            refused(copied, rf"{file.name}: page layers\.\d\.experts\.\d is damaged")
            data[offset] ^= 4
        file.write_bytes(data)
    ExpertStore.open(copied)


def test_refuses_truncated_and_missing_files(copied, checkpoint, tmp_path):
    source = ModelSource.open(checkpoint)
    whole = tmp_path / "whole"
    ExpertStore.quantize(source).save(whole, source)
    for folder in (copied, whole):
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            for size in (0, len(data) // 2, len(data) - 2):  # the index may lack its last newline
                file.write_bytes(data[:size])
                for verify in (True, False):
                    refused(folder, file.name, verify=verify)
            file.write_bytes(data + b" ")
            if file.name != store_files.STORE_INDEX_NAME:  # JSON may end in a space
                refused(folder, f"expected {len(data)} bytes, it has {len(data) + 1}")
            file.unlink()
            refused(folder, file.name)
            file.write_bytes(data)
        ExpertStore.open(folder)


def test_refuses_bits_flipped_elsewhere(checkpoint, tmp_path):
    source = ModelSource.open(checkpoint)
    ExpertStore.quantize(source).save(tmp_path / "store", source)
    for file in sorted((tmp_path / "store").iterdir()):
        if file.name.startswith("experts-"):
            continue
        data = bytearray(file.read_bytes())
        for offset in (1, len(data) // 3, len(data) // 2, len(data) - 3):
            data[offset] ^= 1
            file.write_bytes(data)
            refused(tmp_path / "store", file.name)
            data[offset] ^= 1
        file.write_bytes(data)
    ExpertStore.open(tmp_path / "store")


def test_refuses_a_damaged_header(copied):
    file = min(copied.glob("experts-*.safetensors"))
    data = file.read_bytes()
    for old, new in (
        (b'"U8"', b'"I8"'),
        (b"layers.0.experts.0", b"layers.0.experts.9"),
        (b"layers.0.experts.0", b"layers.0.experts.2"),
        (b"[0,4096]", b"[1,4096]"),
    ):
        assert old in data
        file.write_bytes(data.replace(old, new, 1))
        refused(copied, ".*", verify=False)
    file.write_bytes(data)
    ExpertStore.open(copied)


def write_index(folder: Path, change) -> None:
    """Change the index and give it a good checksum, as another program might."""
    path = folder / store_files.STORE_INDEX_NAME
    index = json.loads(path.read_text())
    change(index)
    index["crc32"] = store_files._index_crc(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index.update(format_version=3), "format_version 3; this usaf_ext reads 1 to 2"),
        (lambda index: index.update(format_version="1"), "format_version '1'"),
        (lambda index: index.update(format_version=0), "format_version 0"),
        (lambda index: index.update(kind="other"), "not the index of a usaf store"),
        (lambda index: index.update(format="int3"), "format 'int3'; this usaf_ext reads"),
        (lambda index: index.update(hidden_size=0), "not a store's index"),
        (lambda index: index.update(hidden_size=136), "page layout"),
        (lambda index: index["matrices"][1].update(block_axis="intermediate_size"), "page layout"),
        (lambda index: index["matrices"][2].update(block_axis="intermediate_size"), "multiples of 64"),
        (lambda index: index["matrices"][2].update(block_axis="rows"), "not a store's index"),
        (lambda index: index["matrices"].pop(), "not a store's index: IndexError"),
        (lambda index: index.update(num_experts=4), r"page \(0, 3\) is in none of its files|layers"),
        (lambda index: index.update(num_experts=2), "unexpected tensor"),
        (lambda index: index.pop("files"), "not a store's index: KeyError"),
        (lambda index: index.pop("page_crc32"), "not a store's index: KeyError"),
        (lambda index: index["page_crc32"].pop("layers.1.experts.0"), "layers.1.experts.0 is damaged"),
    ],
)
def test_refuses_a_foreign_or_newer_index(copied, change, text):
    write_index(copied, lambda index: None)
    ExpertStore.open(copied)
    write_index(copied, change)
    refused(copied, text)


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}'])
def test_refuses_what_is_no_index(copied, contents):
    (copied / store_files.STORE_INDEX_NAME).write_bytes(contents)
    refused(copied, store_files.STORE_INDEX_NAME)


def test_refuses_other_folders(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "empty", tmp_path / "absent", tmp_path / "file", checkpoint):
        refused(path, "not a store: it has no usaf_store.json|cannot be read")


def test_save_refuses_and_changes_nothing(tmp_path, checkpoint):
    source = ModelSource.open(checkpoint)
    unsealed = ExpertStore.create(["a"], 1, 64, 64, "nf4")
    with pytest.raises(StoreError, match="not sealed"):
        unsealed.save(tmp_path / "store")
    with pytest.raises(StoreError, match="not the checkpoint that this store was quantised from"):
        random_store().save(tmp_path / "store", source)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(FileExistsError, match="something that is no store stands there"):
        ExpertStore.quantize(source).save(checkpoint, source)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        random_store().save(tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_says_when_no_model_can_be_loaded_from_it(tmp_path, caplog):
    random_store().save(tmp_path / "store")
    assert "experts only, no config, tokenizer or dense part" in caplog.text


@pytest.mark.parametrize("first", [True, False])
def test_a_killed_save_leaves_the_old_or_the_new(tmp_path, checkpoint, first):
    """Killed at every page, file, sync and rename."""
    source = ModelSource.open(checkpoint)
    old, new = random_store(), ExpertStore.quantize(source)
    path, seen = tmp_path / "store", set()
    for call in range(500):
        shutil.rmtree(path, ignore_errors=True)
        if not first:
            old.save(path)
        killed = dies_at(
            call,
            lambda: new.save(path, source, shard_bytes=5 * new.layout.page_bytes),
            also=[(zlib, "crc32"), (ModelSource, "tensor_bytes")],
        )
        if path.exists():
            found = pages(ExpertStore.open(path))
            assert found == pages(new) or (found == pages(old) and not first)
            seen.add(found == pages(new))
        else:
            assert first
            seen.add(None)
        if not killed:
            break
    assert not killed
    assert call > 60
    assert seen == ({None, True} if first else {False, True})
    new.save(path, source)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
