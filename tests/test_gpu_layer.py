"""The expert layer and its pager on a GPU: against the CPU's, which tests/test_experts.py compares with float64.

Runs where there is a GPU that this build has kernels for, and in the emulated build (test_emulated_device.py).
"""

from __future__ import annotations

import ctypes
import gc
import logging

import devices
import pytest
import torch
from bnb_checkpoints import bnb_expert
from child_processes import check_child
from expert_layers import DTYPES, EXPERTS, FORMATS, HIDDEN, INTERMEDIATE, relative_error, routing, selection, weights
from usaf_ext import _C
from usaf_ext.bank import RowBank
from usaf_ext.devices import open_device
from usaf_ext.errors import DeviceError
from usaf_ext.experts import PagedLayer
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

GPU = devices.gpu()
if GPU is None:
    pytest.skip("no GPU that this build has kernels for: the layer is tested on the CPU", allow_module_level=True)
emulated_only = pytest.mark.skipif(not devices.is_emulated(), reason="asks the emulated CUDA or HIP runtime")

# Relative error of the whole tensor between two ways of rounding to the compute dtype.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def make_store(format="nf4", num_layers=2):
    store = ExpertStore.create([f"layers.{i}" for i in range(num_layers)], EXPERTS, HIDDEN, INTERMEDIATE, format)
    for layer in range(num_layers):
        for expert, parts in enumerate(zip(*weights())):
            store.write_expert(layer, expert, *parts)
    store.seal()
    return store


def make_layers(store, device, dtype=torch.float32, budget="auto", grad_dtype=torch.float32):
    memory = ExpertMemory(store, budget, dtype, device=device)
    layers = [PagedLayer(memory, index) for index in range(store.num_layers)]
    for layer in layers:
        torch.manual_seed(11)
        bank = RowBank.from_store(store, layer.index, selection(), device=device, grad_dtype=grad_dtype)
        # What the banks hold is not what the pages hold, or an overlay that is left out would not show.
        other = torch.randn(bank.num_neurons, 3, HIDDEN) * 0.1
        codes, absmax = devices.usaf_ext.ops.quantize_blocks(other, store.format)
        bank.codes.copy_(codes.to(device))
        bank.absmax.copy_(absmax.to(device))
        layer.set_bank(bank)
    return layers


def case(num_tokens=23, top_k=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    index, router = routing(num_tokens, top_k)
    index[::5, 0] = EXPERTS  # "not here"
    return torch.randn(num_tokens, HIDDEN).to(dtype), index, router, torch.randn(num_tokens, HIDDEN).to(dtype)


def run_layer(layer, hidden, index, router, grad):
    """Outputs and gradients on the CPU, and the bank's."""
    device = layer.device
    hidden, router = (tensor.to(device).requires_grad_() for tensor in (hidden, router))
    layer.anchor.grad = None
    out = layer(hidden, index.to(device), router)
    out.backward(grad.to(device))
    bank = layer.bank
    results = [out, hidden.grad, router.grad, bank.grad, layer.anchor.grad, bank.grad_norm()]
    return [tensor.detach().cpu().clone() for tensor in results] + [bank.expert_hit.clone(), layer.token_counts.clone()]


def assert_close(actual, expected, dtype):
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            assert relative_error(a, b) < TOLERANCE[dtype], number
        else:
            assert torch.equal(a, b), number


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_it_computes_what_the_cpu_does(format, dtype):
    store = make_store(format, 1)
    (on_cpu,), (on_gpu,) = make_layers(store, "cpu", dtype), make_layers(store, GPU, dtype)
    for seed in range(2):  # gradients add up
        arguments = case(dtype=dtype, seed=seed)
        assert_close(run_layer(on_gpu, *arguments), run_layer(on_cpu, *arguments), dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 300])  # 300: all experts are queued before the routing is known
def test_numbers_of_tokens(num_tokens):
    store = make_store(num_layers=1)
    (on_cpu,), (on_gpu,) = make_layers(store, "cpu"), make_layers(store, GPU)
    arguments = case(num_tokens)
    assert_close(run_layer(on_gpu, *arguments), run_layer(on_cpu, *arguments), torch.float32)


def test_the_same_bits_with_every_budget():
    store = make_store(num_layers=2)
    smallest = ExpertMemory.smallest_budget(store, torch.float32)
    results = []
    for budget in (smallest, smallest + 2 * store.layout.page_bytes, "auto"):
        layers = make_layers(store, GPU, budget=budget)
        results.append([run_layer(layer, *case(seed=seed)) for seed in range(2) for layer in layers])
    for other in results[1:]:
        for expected, actual in zip(results[0], other):
            assert all(devices.same_bits(a, b) for a, b in zip(expected, actual))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_micro_batches_give_the_bits_of_single_calls(grad_dtype):
    store = make_store(num_layers=1)
    cases = [case(num_tokens, seed=seed) for seed, num_tokens in enumerate((23, 0, 40))]
    (single,) = make_layers(store, GPU, grad_dtype=grad_dtype)
    expected = [run_layer(single, *arguments) for arguments in cases]
    (many,) = make_layers(store, GPU, grad_dtype=grad_dtype)
    hidden, index, router, grad = ([tensor.to(GPU) for tensor in column] for column in zip(*cases))
    handle = many.native.handle
    out = torch.ops.usaf.experts_forward_many(hidden, index, router, handle, True)
    grad_x, grad_router, grad_anchor = torch.ops.usaf.experts_backward_many(grad, hidden, index, router, handle)
    for number, results in enumerate(expected):
        for tensor, one in zip((out[number], grad_x[number], grad_router[number]), results):
            assert devices.same_bits(tensor.cpu(), one)
    assert devices.same_bits(many.bank.grad, single.bank.grad)
    assert devices.same_bits(many.bank.grad_squares, single.bank.grad_squares)
    total = torch.zeros(1)
    for results in expected:
        total += results[4]
    assert devices.same_bits(grad_anchor.cpu(), total)


@pytest.mark.parametrize("num_tokens", [3, 300])
def test_one_host_wait_a_forward_and_none_a_backward(num_tokens):
    layers = make_layers(make_store(num_layers=3), GPU)
    device = open_device(GPU)
    hidden, index, router, grad = (tensor.to(GPU) for tensor in case(num_tokens))
    for _ in range(2):
        hidden.requires_grad_()
        out, before = hidden, device.host_waits
        for layer in layers:
            out = layer(out, index.clone(), router)
        assert device.host_waits - before == len(layers)
        out.backward(grad)
        assert device.host_waits - before == len(layers)


@pytest.mark.parametrize("strided", [False, True])
def test_a_backward_finds_its_routing_by_the_tensor_of_its_forward(strided):
    (layer,) = make_layers(make_store(num_layers=1), GPU)
    hidden, index, router, grad = (tensor.to(GPU) for tensor in case())
    if strided:
        index = index.t().contiguous().t()
        assert not index.is_contiguous()
    out = layer(hidden.requires_grad_(), index, router)
    before = open_device(GPU).host_waits
    out.backward(grad)
    assert open_device(GPU).host_waits == before


def test_an_expert_with_more_rows_than_a_chunk_holds():
    """2,500 rows in each of three micro-batches: a chunk for each."""
    store = make_store(num_layers=1)
    cases = [case(2500, 1, seed=seed) for seed in range(3)]
    for _, index, router, _ in cases:
        index.fill_(1)
        router.fill_(1.0)
    (single,), (many,) = make_layers(store, GPU), make_layers(store, GPU)
    expected = [run_layer(single, *arguments) for arguments in cases]
    hidden, index, router, grad = ([tensor.to(GPU) for tensor in column] for column in zip(*cases))
    out = torch.ops.usaf.experts_forward_many(hidden, index, router, many.native.handle, True)
    grad_x, grad_router, _ = torch.ops.usaf.experts_backward_many(grad, hidden, index, router, many.native.handle)
    for number, results in enumerate(expected):
        for tensor, one in zip((out[number], grad_x[number], grad_router[number]), results):
            assert devices.same_bits(tensor.cpu(), one)
    assert devices.same_bits(many.bank.grad, single.bank.grad)


@emulated_only
def test_layers_on_several_streams_take_turns_at_the_scratch():
    first_layer, second_layer = make_layers(make_store(num_layers=2), GPU)
    hidden, index, router, grad = (tensor.to(GPU) for tensor in case())
    streams = [torch.Stream(GPU) for _ in range(2)]
    handles = [ctypes.c_void_p(stream.stream_id) for stream in streams]

    def run(layer, stream):
        with stream:
            torch.ops.usaf.experts_forward(hidden, index, router, layer.anchor, layer.native.handle, True)
            torch.ops.usaf.experts_backward(grad, hidden, index, router, layer.native.handle)

    run(first_layer, streams[0])
    assert runtime().emulated_waits(handles[1], handles[0]) == 0
    run(second_layer, streams[1])
    assert runtime().emulated_waits(handles[1], handles[0]) == 1
    run(first_layer, streams[0])
    assert runtime().emulated_waits(handles[0], handles[1]) == 1


def test_experts_under_the_threshold_get_no_gradient():
    store = make_store(num_layers=1)
    (on_cpu,), (on_gpu,) = make_layers(store, "cpu"), make_layers(store, GPU)
    arguments = case(40)
    for layer in (on_cpu, on_gpu):
        layer.set_threshold(0.9)
    assert_close(run_layer(on_gpu, *arguments), run_layer(on_cpu, *arguments), torch.float32)
    assert on_gpu.num_masked == on_cpu.num_masked > 0
    assert 0 < int(on_gpu.bank.expert_hit.sum()) < EXPERTS


@pytest.mark.parametrize("metric", ["gradient", "gradient_weight"])
def test_importance(metric):
    store = make_store(num_layers=1)
    found = []
    for device in ("cpu", GPU):
        (layer,) = make_layers(store, device)
        importance = layer.begin_importance(metric)
        for seed in range(2):
            run_layer(layer, *case(seed=seed))
        found.append(importance.cpu())
        layer.end_importance()
    assert found[0].sum() > 0
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("down_axis", ["hidden", "intermediate"])
def test_frozen_rows_and_pages_as_bitsandbytes_has_them(down_axis):
    """Whose W_down stands as it is: the rows of both banks are columns there."""
    intermediate = 128
    store = ExpertStore.create(["experts"], EXPERTS, HIDDEN, intermediate, down_axis=down_axis)
    for expert in range(EXPERTS):
        if down_axis == "intermediate":
            store.write_encoded_expert(0, expert, *bnb_expert(HIDDEN, intermediate)[0])
        else:
            shapes = ((intermediate, HIDDEN), (intermediate, HIDDEN), (HIDDEN, intermediate))
            store.write_expert(0, expert, *(torch.randn(shape) * 0.1 for shape in shapes))
    store.seal()
    expert, neuron = selection(EXPERTS, intermediate)
    codes, absmax = devices.usaf_ext.ops.quantize_blocks(torch.randn(len(expert), 3, HIDDEN) * 0.1, "nf4")
    found = []
    for device in ("cpu", GPU):
        layer = PagedLayer(ExpertMemory(store, "auto", torch.float32, device=device), 0)
        for first, trainable, put in ((0, True, layer.set_bank), (1, False, layer.set_frozen_bank)):
            half = slice(first, None, 2)
            neurons = (expert[half].clone(), neuron[half].clone())
            bank = RowBank.from_store(store, 0, neurons, mode="in_place", device=device, trainable=trainable)
            bank.codes.copy_(codes[half].to(device))
            bank.absmax.copy_(absmax[half].to(device))
            put(bank)
        results = run_layer(layer, *case())
        importance = layer.begin_importance("gradient_weight")
        run_layer(layer, *case(seed=1))
        found.append([*results, importance.cpu()])
    assert_close(found[1], found[0], torch.float32)


def test_tensors_of_the_cpu_are_refused():
    (layer,) = make_layers(make_store(num_layers=1), GPU)
    hidden, index, router, _ = case()
    good = {"hidden": hidden.to(GPU), "top_k_index": index.to(GPU), "top_k_weights": router.to(GPU)}
    for name, tensor in (("hidden", hidden), ("top_k_index", index), ("top_k_weights", router)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            layer(*(good | {name: tensor}).values())
    with pytest.raises(ValueError, match="x: expected a tensor on the layer's device"):
        torch.ops.usaf.experts_forward(hidden, index, router, layer.anchor.detach().cpu(), layer.native.handle, False)


def runtime():
    return ctypes.CDLL(_C.__file__)


@emulated_only
def test_memory_that_cannot_be_registered_stays_pageable(caplog):
    expected = run_layer(make_layers(make_store(num_layers=1), GPU)[0], *case())
    torch.manual_seed(0)
    store = make_store(num_layers=1)
    runtime().emulated_limit_registration(runtime().emulated_registered_bytes())
    try:
        with caplog.at_level(logging.WARNING):
            (layer,) = make_layers(store, GPU)
    finally:
        runtime().emulated_limit_registration(ctypes.c_int64(2**62))
    assert "out of memory" in caplog.text
    assert "stay pageable" in caplog.text
    torch.manual_seed(0)
    assert all(map(torch.equal, run_layer(layer, *case()), expected))


@emulated_only
def test_a_copy_that_fails_is_a_device_error_and_no_end():
    (layer,) = make_layers(make_store(num_layers=1), GPU)
    arguments = case()
    expected = run_layer(make_layers(layer.store, GPU)[0], *arguments)
    runtime().emulated_fail_next_copy(1)
    with pytest.raises(DeviceError, match=r"(CUDA|HIP) copy: invalid argument"):
        layer(*(tensor.to(GPU) for tensor in arguments[:3]))
    assert all(map(torch.equal, run_layer(layer, *arguments), expected))


@emulated_only
@pytest.mark.parametrize("current", [0, 1])
def test_a_pager_of_another_device_than_the_threads_current_one(tmp_path, current):
    """Every call is made with its device current, and its readers leave nothing on the one that threads begin with."""
    in_memory = make_store()
    in_memory.save(tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", tier="disk").native
    page_bytes = in_memory.layout.page_bytes
    slab = torch.zeros(5 * page_bytes, dtype=torch.uint8)
    aligned = -(-slab.data_ptr() // 64) * 64
    gc.collect()
    runtime().emulated_set_devices(2)
    try:
        assert runtime().emulated_set_device(current) == 0
        pager = _C.ExpertPager(store, aligned, 4, slab, 2, _C.open_device(GPU.type, 1))
        for layer in (0, 1, 0):
            for ticket in pager.prefetch(layer, list(range(EXPERTS)), "inference"):
                pager.wait(ticket)
                for address, expert in zip(pager.pages(ticket), pager.experts_of(ticket)):
                    start = address - slab.data_ptr()
                    expected = bytes(in_memory.native.page(layer, expert))
                    assert slab[start : start + page_bytes].numpy().tobytes() == expected
                pager.release(ticket)
        assert pager.registered_buffers == (2 * page_bytes, "")
        del pager
        assert runtime().emulated_calls_elsewhere() == 0
        assert runtime().emulated_is_used(1)
        assert runtime().emulated_is_used(0) == (current == 0)
    finally:
        runtime().emulated_set_devices(1)
        runtime().emulated_set_device(0)


@emulated_only
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_child_drops_a_layer_and_calls_no_driver(tmp_path, tier):
    make_store(num_layers=1).save(tmp_path / "store")
    layers = make_layers(ExpertStore.open(tmp_path / "store", tier=tier), GPU)
    expected = run_layer(layers[0], *case())
    gc.collect()

    def drop():
        layers.clear()
        gc.collect()

    check_child(drop)
    for tensor in (layers[0].bank.grad, layers[0].bank.grad_squares):
        tensor.zero_()
    assert all(map(devices.same_bits, run_layer(layers[0], *case()), expected))
