"""Devices: what a name stands for, what this build can do with it, and copies to it that the host does not wait for."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence

import torch

from . import _C

CPU = torch.device("cpu")
# bfloat16 arithmetic came to NVIDIA's chips with this compute capability; RDNA 1 and 2 do not have it either. torch
# claims it on both: slow emulation on the one, aborts in the middle of a GEMM on the other.
_FIRST_BF16_CAPABILITY = (8, 0)
_NO_BF16_ARCHITECTURE = "gfx10"


def has_kernels(device_type: str) -> bool:
    """Whether this build has kernels for torch devices of this type."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("usaf::quantize_blocks", key)


def gpus() -> list[torch.device]:
    """The GPUs that torch finds and this build has kernels for."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or not has_kernels(found.type):
        return []
    return [torch.device(found.type, index) for index in range(torch.accelerator.device_count())]


def resolve_device(device: torch.device | str | int, name: str = "device") -> torch.device:
    """The device that is meant, with its index unless it is the CPU.

    Args:
        device: a torch device or its name ("cuda", "cuda:1"), a GPU's number, or "auto": the current GPU where torch
            finds one that this build has kernels for, else the CPU.
        name: of the argument, for messages.

    Raises:
        TypeError: neither of them. ValueError: no such device, or one that this build has no kernels for.
    """
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"{name}: expected a torch.device, its name or a number, got {type(device).__name__}")
    present = gpus()
    if device == "auto":
        return present[torch.accelerator.current_device_index()] if present else CPU
    if isinstance(device, int):
        if not 0 <= device < len(present):
            raise ValueError(f"{name}: expected the number of a GPU, got {device}; {_found(present)}")
        return present[device]
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name}: expected 'auto', 'cpu' or a GPU such as 'cuda:0', got {device!r}") from None
    if wanted.type == "cpu":
        return CPU
    if not has_kernels(wanted.type):
        kernels = "the CPU" if _C.GPU_BACKEND is None else f"the CPU and {_C.GPU_BACKEND}"
        raise ValueError(f"{name}: this build of usaf_ext has no kernels for {str(wanted)!r}, only for {kernels}")
    if wanted.index is None and present:
        wanted = torch.device(wanted.type, torch.accelerator.current_device_index())
    if wanted not in present:
        raise ValueError(f"{name}: there is no {str(wanted)!r}; {_found(present)}")
    return wanted


def _found(present: Sequence[torch.device]) -> str:
    names = ", ".join(str(device) for device in present)
    return f"torch finds {names or 'no GPU that this build has kernels for'}"


@functools.cache
def open_device(device: torch.device) -> _C.Device:
    """The native side of a resolved device, one for the process: streams, copies, memory registration."""
    return _C.open_device(device.type, device.index or 0)


def describe_device(device: torch.device) -> str:
    """One line for people: the device and its chip."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu: {platform.machine()}, {torch.get_num_threads()} threads, {capability}"
    return f"{device}: {_chip(device)} ({_C.GPU_BACKEND} kernels)"


def _chip(device: torch.device) -> str:
    properties = getattr(torch.get_device_module(device.type), "get_device_properties", None)
    return properties(device).name if properties else device.type


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself, whatever torch claims: not RDNA 1 and 2, nor before sm_80."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return not properties.gcnArchName.startswith(_NO_BF16_ARCHITECTURE)
    return (properties.major, properties.minor) >= _FIRST_BF16_CAPABILITY


def check_compute_dtype(dtype: torch.dtype, device: torch.device, name: str = "dtype") -> None:
    """Raise ValueError, naming the argument, for bfloat16 where `has_bfloat16` says no."""
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        raise ValueError(
            f"{name}: bfloat16 does not work well or at all on {describe_device(device)}; take float16, which trains "
            "with loss scaling, or float32"
        )


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor in host memory; pinned if `device`, with which it will be exchanged, is a GPU.

    torch takes pinned memory in powers of two: see `host_bytes`.
    """
    return torch.empty(*shape, dtype=dtype, pin_memory=device.type != "cpu")


def host_bytes(num_bytes: int, device: torch.device) -> int:
    """Bytes of host memory that a `host_empty` of `num_bytes` takes."""
    return num_bytes if device.type == "cpu" or num_bytes == 0 else 1 << (num_bytes - 1).bit_length()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, on the CPU, on `device`; the host does not wait, and may change `tensor` at once.

    Through pinned memory, which torch keeps until the copy is done: a copy from pageable memory waits for all that the
    device has to do before.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def read_numbers(*tensors: torch.Tensor) -> list[float]:
    """The values of 0-dim tensors of one device, in one wait for it."""
    return torch.stack([tensor.detach().double().reshape(()) for tensor in tensors]).tolist()
