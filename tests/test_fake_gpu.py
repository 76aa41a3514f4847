"""The test-only torch device of tests/gpu_emulation/torch_device: as strict as a GPU, and as able as training needs."""

from __future__ import annotations

import copy
import io

import devices
import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from usaf_ext import ops

if not devices.is_emulated():
    pytest.skip("there in the emulated build alone: see test_emulated_device.py", allow_module_level=True)

DEVICE = torch.device("fake_gpu:0")


def on_device(*shape, **options):
    return torch.randn(*shape).to(DEVICE).requires_grad_(options.get("requires_grad", False))


def test_it_is_the_accelerator():
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("fake_gpu")
    assert torch.accelerator.device_count() == 1
    assert torch.accelerator.current_device_index() == 0


@pytest.mark.parametrize(
    "mix",
    [
        lambda host, device: host + device,
        lambda host, device: device.add_(host),
        lambda host, device: device @ host,
        lambda host, device: torch.cat([host, device]),
        lambda host, device: F.linear(device, host),
        lambda host, device: F.embedding(host.abs().long(), device),
        lambda host, device: torch.where(host > 0, device, device),
        lambda host, device: device.index_select(0, host[0].abs().long()),
        lambda host, device: torch.add(host, host, out=device),
    ],
)
def test_it_refuses_tensors_of_the_cpu(mix):
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.zeros(4, 4), on_device(4, 4))


def test_what_a_gpu_takes_from_the_cpu():
    x = on_device(4, 4)
    expected = x.cpu()
    assert torch.equal((x * torch.tensor(2.0)).cpu(), expected * 2)
    assert torch.equal(x[torch.tensor([1, 3])].cpu(), expected[[1, 3]])
    x[torch.tensor([0])] = 5.0
    assert bool((x[0] == 5).all())


def test_no_numpy_and_no_kernel_of_the_cpu_for_foreign_ops():
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
        on_device(3).numpy()
    with torch.library._scoped_library("usaf_test", "FRAGMENT") as library:
        library.define("only_on_cpu(Tensor x) -> Tensor")
        library.impl("only_on_cpu", lambda x: x + 1, "CPU")
        assert torch.ops.usaf_test.only_on_cpu(torch.zeros(1)).item() == 1
        with pytest.raises(NotImplementedError, match="usaf_test::only_on_cpu"):
            torch.ops.usaf_test.only_on_cpu(on_device(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fresh_memory_is_not_a_number(dtype):
    assert bool(torch.empty(100, dtype=dtype, device=DEVICE).isnan().all())
    assert bool(torch.empty(100, dtype=dtype, pin_memory=True).isnan().all())


def test_views_share_memory_and_results_do_not():
    x = torch.zeros(6, device=DEVICE)
    view = x.view(2, 3).t()[1:]
    view.fill_(1)
    assert x.tolist() == [0, 1, 1, 0, 1, 1]
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    first, second = x.split(3)
    first.add_(second)
    assert x.tolist() == [0, 2, 2, 0, 1, 1]
    assert (x + 0).data_ptr() != x.data_ptr()
    grown = torch.empty(0, device=DEVICE)
    assert torch.add(x, x, out=grown).tolist() == grown.tolist() == [0, 4, 4, 0, 2, 2]


def test_resize_set_and_copies_of_storages():
    x = torch.arange(4.0, device=DEVICE)
    x.resize_(6)
    assert x[:4].tolist() == [0, 1, 2, 3]
    y = torch.empty(0, device=DEVICE).set_(x.untyped_storage(), 1, (2,), (2,))
    assert y.tolist() == [1, 3]
    twin = copy.deepcopy(x)
    twin.zero_()
    assert x[3] == 3
    assert twin.device == DEVICE
    assert torch.empty(3, device=DEVICE).set_().numel() == 0
    buffer = io.BytesIO()
    torch.save(x, buffer)
    for location in (None, "cpu"):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=location)
        assert loaded.device == (DEVICE if location is None else torch.device("cpu"))
        assert loaded[:4].tolist() == [0, 1, 2, 3]


def test_pinned_memory():
    assert torch.empty(5, pin_memory=True).is_pinned()
    assert torch.zeros(5).pin_memory()[2:].is_pinned()
    assert not torch.zeros(5).is_pinned()
    x = on_device(5)
    assert torch.equal(x.to("cpu", non_blocking=True), x.cpu())


def test_memory_is_counted():
    before = torch.accelerator.memory_allocated()
    x = torch.empty(1000, device=DEVICE)
    y = x.isnan().float()  # by a CPU kernel, in its memory
    assert torch.accelerator.memory_allocated() >= before + 8000
    del x, y
    assert torch.accelerator.memory_allocated() == before


def test_an_op_runs_on_the_current_stream():
    x = on_device(2, 64)
    assert torch.accelerator.current_stream().native_handle == 0
    ops.quantize_blocks(x, "nf4")
    assert torch.ops.fake_gpu.last_stream() == 0
    stream = torch.Stream(device=DEVICE)
    with stream:
        assert torch.accelerator.current_stream() == stream
        launches = torch.ops.fake_gpu.num_launches()
        ops.quantize_blocks(x, "nf4")
    assert torch.ops.fake_gpu.num_launches() > launches
    assert torch.ops.fake_gpu.last_stream() == stream.native_handle != 0
    event = stream.record_event()
    event.synchronize()
    assert event.query()
    assert torch.accelerator.current_stream().native_handle == 0


def test_random_numbers_are_the_device_s_own():
    torch.manual_seed(5)
    first, host_first = torch.rand(8, device=DEVICE), torch.rand(8)
    torch.manual_seed(5)
    torch.rand(8)  # the CPU's draws do not advance the device's
    assert torch.equal(torch.rand(8, device=DEVICE), first)
    state = torch.get_device_module("fake_gpu").get_rng_state()
    second = torch.rand(8, device=DEVICE)
    torch.get_device_module("fake_gpu").set_rng_state(state)
    assert torch.equal(torch.rand(8, device=DEVICE), second)
    generators = [torch.Generator(DEVICE).manual_seed(3) for _ in range(2)]
    draws = [torch.empty(8, device=DEVICE).normal_(generator=generator) for generator in generators]
    assert torch.equal(*draws)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(8, device=DEVICE, generator=torch.Generator())
    torch.manual_seed(5)
    torch.rand(8, device=DEVICE)
    assert torch.equal(torch.rand(8), host_first)


def test_the_ops_of_a_language_model():
    """Values and gradients as on the CPU."""

    def run(device):
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(11, 8, generator=generator).to(device).requires_grad_()
        tokens = torch.randint(11, (2, 6), generator=generator).to(device)
        x = F.embedding(tokens, table)
        q = x.view(2, 6, 2, 4).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(2, 6, 8)
        weights, index = F.softmax(x, -1).topk(3)
        x = x + (F.one_hot(index, 8) * weights.unsqueeze(-1)).sum(2).cumsum(1).sort(-1)[0]
        x = checkpoint(lambda value: F.rms_norm(F.silu(value), (8,)), x, use_reentrant=False)
        x = x + x.index_select(1, tokens[0].clamp(max=5)) + x.masked_fill(x > 0, 0.0)
        loss = F.cross_entropy((x @ table.T).flatten(0, 1), tokens.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([table], 0.1)
        return loss, norm, table.grad

    for result, expected in zip(run(DEVICE), run(torch.device("cpu")), strict=True):
        assert result.device == DEVICE
        torch.testing.assert_close(result.detach().cpu(), expected.detach())


def test_a_module_that_moves_keeps_its_parameters():
    module = torch.nn.Linear(3, 3)
    weight, module.tied = module.weight, module.weight
    before = weight.detach().clone()
    weight.sum().backward()
    assert module.to(DEVICE).weight is module.tied is weight
    assert weight.device == weight.grad.device == DEVICE
    module(on_device(2, 3)).sum().backward()
    assert torch.equal(module.cpu().weight, before)
    assert weight.grad.device.type == "cpu"


def test_training_a_transformer_equals_the_cpu():
    def losses(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config()).to(device)
        model.train()
        model.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tokens = torch.arange(24).view(2, 12).to(device)
        found = []
        for _ in range(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    on_gpu, on_cpu = losses(DEVICE), losses(torch.device("cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert on_gpu[-1] < on_gpu[0]
