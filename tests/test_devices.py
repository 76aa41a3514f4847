"""Names of devices, and what is refused, in every build; tests/test_gpu_package.py has what needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import devices
import pytest
import torch
from trained_models import paged_model
from usaf_ext import _C, UsafConfig, cli
from usaf_ext.bank import RowBank
from usaf_ext.devices import check_compute_dtype, has_bfloat16, host_bytes, resolve_device, send
from usaf_ext.experts import PagedExperts
from usaf_ext.integrations.transformers import UsafHfQuantizer
from usaf_ext.loading import load_model
from usaf_ext.memory import ExpertMemory

CPU = torch.device("cpu")
needs_none = pytest.mark.skipif(devices.gpu() is not None, reason="this build and machine have a GPU")


@pytest.mark.parametrize("name", ["cpu", "cpu:0", CPU])
def test_the_cpu_has_no_index(name):
    assert resolve_device(name) == CPU


def test_auto_is_the_gpu_if_there_is_one():
    assert resolve_device("auto") == (devices.gpu() or CPU)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (None, TypeError, "--device: expected a torch.device, its name or a number, got NoneType"),
        (True, TypeError, "--device: expected a torch.device, its name or a number, got bool"),
        ("gpu 0", ValueError, "--device: expected 'auto', 'cpu' or a GPU such as 'cuda:0', got 'gpu 0'"),
        ("xpu", ValueError, "--device: this build of usaf_ext has no kernels for 'xpu'"),
        (99, ValueError, "--device: expected the number of a GPU, got 99; torch finds"),
        (-1, ValueError, "--device: expected the number of a GPU, got -1"),
    ],
)
def test_bad_devices(name, error, message):
    with pytest.raises(error, match=message):
        resolve_device(name, "--device")


@needs_none
@pytest.mark.parametrize("where", ["memory", "experts", "bank", "model", "load_model", "device_map"])
def test_every_way_in_names_its_argument(tiny_checkpoint, where):
    model = paged_model(tiny_checkpoint)
    store = model.model.layers[0].mlp.experts.usaf_layer.store
    one = torch.zeros(1, dtype=torch.int32)
    weights = (torch.randn(2, 8, 64), torch.randn(2, 8, 64), torch.randn(2, 64, 8))
    ways = {
        "memory": lambda: ExpertMemory(store, device="cuda"),
        "experts": lambda: PagedExperts.from_weights(*weights, device="cuda"),
        "bank": lambda: RowBank.from_store(store, 0, (one, one), mode="in_place", device="cuda"),
        "model": lambda: type(model).from_pretrained(tiny_checkpoint, quantization_config=UsafConfig(device="cuda:0")),
        "load_model": lambda: load_model(tiny_checkpoint, device="cuda"),
        "device_map": lambda: type(model).from_pretrained(
            tiny_checkpoint, quantization_config=UsafConfig(), device_map="cuda:0"
        ),
    }
    kernels = "the CPU" if _C.GPU_BACKEND is None else f"the CPU and {_C.GPU_BACKEND}"
    name = "device_map" if where == "device_map" else "device"
    message = f"^{name}: (this build of usaf_ext has no kernels for 'cuda|there is no 'cuda)"
    with pytest.raises(ValueError, match=message) as caught:
        ways[where]()
    assert kernels in str(caught.value) or "torch finds no GPU" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "device_map", "message"),
    [
        (None, {"model": 0, "lm_head": "cpu"}, "device_map: expected one device for the whole model"),
        (None, "balanced", "device_map: expected one device for the whole model"),
        (None, {}, "device_map: expected one device for the whole model"),
        (None, {"": "disk"}, "device_map: 'disk' is no device to compute on"),
        ("xpu", None, "device: this build of usaf_ext has no kernels for 'xpu'"),
    ],
)
def test_device_maps_that_are_refused(device, device_map, message):
    quantizer = UsafHfQuantizer(UsafConfig(device=device))
    with pytest.raises(ValueError, match=message):
        quantizer.validate_environment(device_map=device_map)


@pytest.mark.parametrize("device_map", [None, "cpu", CPU, {"": "cpu"}, {"": CPU}])
def test_device_maps_of_the_cpu(device_map):
    quantizer = UsafHfQuantizer(UsafConfig())
    quantizer.validate_environment(device_map=device_map)
    assert quantizer.update_device_map(device_map) == device_map


def test_two_gpus_and_auto(monkeypatch):
    monkeypatch.setattr("usaf_ext.integrations.transformers.gpus", lambda: [torch.device("cuda", i) for i in (0, 1)])
    with pytest.raises(ValueError, match="device_map: 'auto' with 2 GPUs: name one"):
        UsafHfQuantizer(UsafConfig()).validate_environment(device_map="auto")


def test_auto_is_one_device(tiny_checkpoint):
    quantizer = UsafHfQuantizer(UsafConfig())
    quantizer.validate_environment(device_map="auto")
    assert quantizer.update_device_map("auto") == {"": devices.gpu() or CPU}


@pytest.mark.parametrize("device", [0, True, 1.5])
def test_bad_device_of_the_config(device):
    with pytest.raises(TypeError, match="device: expected a device, its name or None"):
        UsafConfig(device=device)


def test_the_command_line_names_its_flag(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text " * 50)
    arguments = ["--model", str(tiny_checkpoint), "--data", str(tmp_path / "text.txt")]
    assert cli.main(["eval", *arguments, "--device", "tpu"]) == 2
    assert "error: --device: expected 'auto', 'cpu' or a GPU such as 'cuda:0', got 'tpu'" in capsys.readouterr().err
    assert cli.main(["eval", *arguments, "--device", "cpu"]) == 0
    assert ", on cpu: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hip", "chip", "has"),
    [
        (None, (7, 5), False),
        (None, (8, 0), True),
        (None, (12, 0), True),
        ("7.0", "gfx1031", False),
        ("7.0", "gfx1030:xnack-", False),
        ("7.0", "gfx1100", True),
        ("7.0", "gfx90a:sramecc+:xnack-", True),
    ],
)
def test_chips_without_bfloat16(monkeypatch, tiny_checkpoint, hip, chip, has):
    """Whatever torch says: on them the checkpoint's bfloat16 becomes float16, and asking for it is an error."""
    major, minor = (10, 3) if hip else chip
    properties = SimpleNamespace(name="some card", gcnArchName=chip, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    card = torch.device("cuda", 0)
    assert has_bfloat16(card) == has
    if has:
        check_compute_dtype(torch.bfloat16, card)
        return
    check_compute_dtype(torch.float16, card)
    with pytest.raises(ValueError, match="dtype: bfloat16 does not work well or at all on cuda:0: some card"):
        check_compute_dtype(torch.bfloat16, card)


def test_a_bfloat16_checkpoint_is_computed_in_float16_there(monkeypatch, tiny_checkpoint, caplog):
    monkeypatch.setattr("usaf_ext.loading.has_bfloat16", lambda device: False)
    loaded = load_model(tiny_checkpoint)
    assert loaded.model.dtype == torch.float16
    assert [r.getMessage() for r in caplog.records if "no bfloat16: computing in float16" in r.getMessage()]
    assert load_model(tiny_checkpoint, dtype=torch.float32).model.dtype == torch.float32


def test_sizes_of_pinned_memory():
    card = torch.device("cuda", 0)
    assert [host_bytes(n, CPU) for n in (0, 5, 1024)] == [0, 5, 1024]
    assert [host_bytes(n, card) for n in (0, 1, 5, 1024, 1025)] == [0, 1, 8, 1024, 2048]


def test_sending_to_the_cpu_copies_nothing():
    tensor = torch.zeros(3)
    assert send(tensor, CPU) is tensor
