"""The fake GPU, to torch: `fake_gpu:0`, on which the emulated build of the extension runs.

torch imports this at the end of its own import (entry point "torch.backends"), so that the device is there before
anything asks for it.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAME = "fake_gpu"


def register() -> None:
    """Load the extension, which holds the device, and tell torch its name."""
    if "usaf_ext._C" in sys.modules:
        return
    path = str(next(pathlib.Path(__file__).parent.joinpath("usaf_ext").glob("_C*.so")))
    loader = importlib.machinery.ExtensionFileLoader("usaf_ext._C", path)
    spec = importlib.util.spec_from_file_location("usaf_ext._C", path, loader=loader)
    assert spec is not None
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, sys.modules[__name__])
    torch.utils.generate_methods_for_privateuse1_backend()
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["usaf_ext._C"] = module
    _let_data_change_device()
    # torch's backward thread drops a Python object after it has told the caller that it is done; if the interpreter is
    # gone by then, the process aborts. Sleeping lets it.
    atexit.register(time.sleep, 0.1)


def _let_data_change_device() -> None:
    """`tensor.data = other` between the CPU and the device, as torch has it for GPUs and refuses it for a PrivateUse1.

    Module.to(device) goes this way and so keeps its Parameter objects, on which tied weights and optimizers rely.
    """
    plain, same_kind = torch._C.TensorBase.data, torch._has_compatible_shallow_copy_type

    def may_become(tensor: torch.Tensor, value: torch.Tensor) -> bool:
        kinds = {tensor.device.type, value.device.type}
        return kinds == {"cpu", NAME} and tensor.layout == value.layout == torch.strided

    def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
        if may_become(tensor, value):
            torch.ops.fake_gpu.set_data(tensor, value.detach())
        else:
            plain.__set__(tensor, value)

    def has_compatible_type(input: torch.Tensor, from_: torch.Tensor) -> bool:  # torch._dynamo checks the names
        return may_become(input, from_) or same_kind(input, from_)

    torch.Tensor.data = property(plain.__get__, set_data)
    torch._has_compatible_shallow_copy_type = has_compatible_type


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _lazy_init() -> None:
    pass


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: object) -> None:
    if torch.device(device if isinstance(device, str | torch.device) else f"{NAME}:{device}").index not in (None, 0):
        raise RuntimeError(f"no such device: {device}")


@contextmanager
def device(device: object) -> Iterator[None]:
    set_device(device)
    yield


def get_device_name(device: object = None) -> str:
    return "emulated"


def synchronize(device: object = None) -> None:
    torch.accelerator.synchronize()


def current_stream(device: object = None) -> torch.Stream:
    return torch.accelerator.current_stream()


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def manual_seed(seed: int) -> None:
    torch.ops.fake_gpu.manual_seed(seed)


manual_seed_all = manual_seed


def get_rng_state(device: object = None) -> torch.Tensor:
    return torch.ops.fake_gpu.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.ops.fake_gpu.set_rng_state(state)
