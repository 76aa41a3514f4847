"""ExpertStore in memory: exact pages, rows of neurons, refusals, the seal."""

from __future__ import annotations

import os
import signal

import codec_oracles
import pytest
import torch
from random_stores import pages, random_expert, random_store
from usaf_ext import _C
from usaf_ext.errors import StoreError
from usaf_ext.store import ExpertStore

FORMATS = codec_oracles.FORMATS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(64, 1), (72, 24), (1, 3), (129, 70)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_page_holds_the_encoded_expert(format, hidden_size, intermediate_size, dtype):
    store = ExpertStore.create(["a", "b"], 2, hidden_size, intermediate_size, format)
    weights = random_expert(hidden_size, intermediate_size, dtype)
    store.write_expert(1, 0, *weights)
    rows = [w.float().flatten().clone().view(-1, hidden_size) for w in (weights[0], weights[1], weights[2].T)]
    page, layout, end = bytes(store.native.page(1, 0)), store.layout, 0
    decoded, parts = [], []
    for matrix, weight in enumerate(rows):
        codes, absmax = codec_oracles.encode(weight, format)
        decoded.append(codec_oracles.decode(codes, absmax, hidden_size, format))
        parts.append((layout.codes_offset[matrix], codes.contiguous().numpy().tobytes()))
        parts.append((layout.absmax_offset[matrix], absmax.contiguous().numpy().tobytes()))
    assert layout.absmax_offset[0] % 64 == 0
    for start, part in sorted(parts):
        assert not any(page[end:start])  # gaps are zeros
        assert page[start : start + len(part)] == part
        end = start + len(part)
    codes_bytes, absmax_bytes = (len(part) for _, part in parts[:2])
    for matrix in range(3):  # as one matrix of 3 * intermediate_size rows
        assert layout.codes_offset[matrix] == matrix * codes_bytes
        assert layout.absmax_offset[matrix] == layout.absmax_offset[0] + matrix * absmax_bytes
    assert not any(page[end:])
    assert len(page) == layout.page_bytes
    assert layout.page_bytes % 4096 == 0
    assert not any(bytes(store.native.page(0, 0)) + bytes(store.native.page(1, 1)))
    gate, up, down = store.read_expert(1, 0)
    for got, expected in zip((gate, up, down.T), decoded):
        assert torch.equal(got, expected)
    assert [w.dtype for w in store.read_expert(1, 0, torch.bfloat16)] == [torch.bfloat16] * 3
    assert torch.equal(store.read_expert(1, 0, torch.bfloat16)[2], down.bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_the_neurons(format):
    store = random_store(format=format)
    for neurons in ([], [5], [23, 0, 5, 5]):
        picked = torch.tensor(neurons, dtype=torch.int64)
        codes, absmax = store.rows(1, 2, picked)
        assert codes.shape == (len(neurons), 3, _C.code_bytes(format, 72))
        assert absmax.shape == (len(neurons), 3, _C.num_blocks(format, 72))
        gate, up, down = store.read_expert(1, 2)
        for i, neuron in enumerate(neurons):
            for matrix, row in enumerate((gate[neuron], up[neuron], down[:, neuron])):
                part = codes[i, matrix : matrix + 1], absmax[i, matrix : matrix + 1]
                got = codec_oracles.decode(*part, 72, format)
                assert torch.equal(got.float()[0], row)
        codes.fill_(0)
        assert torch.equal(store.read_expert(1, 2)[0], gate)  # a copy


@pytest.mark.parametrize(
    ("neurons", "error"),
    [
        (torch.tensor([24]), ValueError),
        (torch.tensor([-1]), ValueError),
        (torch.tensor([1.0]), TypeError),
        (torch.tensor([[1]]), TypeError),
        ([1], TypeError),
    ],
)
def test_rows_refuses(neurons, error):
    with pytest.raises(error, match="neurons: expected"):
        random_store(1, 1).rows(0, 0, neurons)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("matrix", [0, 1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_refuses_weights_that_are_not_finite(format, matrix, value):
    store = ExpertStore.create(["a"], 2, 72, 24, format)
    store.write_expert(0, 1, *random_expert(72, 24))
    before = pages(store)
    weights = [w.double() for w in random_expert(72, 24)]
    weights[matrix][3, 7] = value
    with pytest.raises(ValueError, match=f"^{('gate', 'up', 'down')[matrix]} of layer 0, expert 1: "):
        store.write_expert(0, 1, *weights)
    assert pages(store) == before


def test_refuses_bad_experts():
    store = ExpertStore.create(["a"], 2, 72, 24, "nf4")
    gate, up, down = random_expert(72, 24)
    with pytest.raises(ValueError, match=r"down of layer 0, expert 1: expected shape \(72, 24\), got \(24, 72\)"):
        store.write_expert(0, 1, gate, up, down.T)
    with pytest.raises(TypeError, match=r"up of layer 0, expert 1: expected a tensor .* got torch.int32"):
        store.write_expert(0, 1, gate, up.int(), down)
    with pytest.raises(TypeError, match=r"gate of layer 0, expert 1: expected a tensor .* got list"):
        store.write_expert(0, 1, gate.tolist(), up, down)
    for layer, expert in ((1, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(StoreError, match=f"no page for layer {layer}, expert {expert}: .* 1 layers of 2"):
            store.write_expert(layer, expert, gate, up, down)
        with pytest.raises(StoreError, match="no page for"):
            store.read_expert(layer, expert)
    assert not any(b"".join(pages(store)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([], 1, 64, 64, "nf4"), ValueError, "layer_names"),
        ((["a", "a"], 1, 64, 64, "nf4"), ValueError, "layer_names"),
        (("abc", 1, 64, 64, "nf4"), TypeError, "layer_names"),
        ((["a"], 0, 64, 64, "nf4"), ValueError, "num_experts"),
        ((["a"], 1, 0, 64, "nf4"), ValueError, "hidden_size"),
        ((["a"], 1, 64, -1, "nf4"), ValueError, "intermediate_size"),
        ((["a"], 1, 64, 64, "q4"), ValueError, "format: expected one of 'bf16', 'nf4', .*, got 'q4'"),
        ((["a"], 1 << 40, 1 << 20, 1 << 20, "nf4"), StoreError, "2\\^63 bytes"),
        ((["a"], 1 << 20, 1 << 20, 1 << 10, "nf4"), StoreError, "cannot map [0-9]+ bytes"),
    ],
)
def test_create_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        ExpertStore.create(*arguments)


def test_a_sealed_store_is_read_only():
    store = ExpertStore.create(["a"], 2, 72, 24, "nf4")
    view = store.native.page(0, 1)
    view[0] = 7
    store.seal()
    store.seal()
    assert store.sealed
    assert store.native.page(0, 1).readonly
    with pytest.raises(StoreError, match="sealed"):
        store.write_expert(0, 1, *random_expert(72, 24))
    child = os.fork()
    if child == 0:  # a stray write through an older view faults
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        view[0] = 8
        os._exit(0)
    assert os.waitpid(child, 0)[1] & 0x7F == signal.SIGSEGV
    assert view[0] == 7


def test_a_page_keeps_its_store_alive():
    view = random_store().native.page(1, 2)
    assert len(bytes(view)) == 4096 * (len(view) // 4096) > 0
