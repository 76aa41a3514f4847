"""The devices that are tested on, and the ops on the one whose turn it is.

The models of trained_models.py lie on that device too, `current()`, where a test says `usefixtures("device")`.

A test module imports `ops` (and `opcheck`, `on_device`) from here and says `pytestmark = usefixtures("device")`. Its
tests make their tensors and compare on the CPU; on a GPU every tensor that an op is given lies on the device, and what
the op returns or writes comes back. Tests of what only the CPU does (range checks, threads) are `cpu_only`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import usaf_ext.ops
from torch import Tensor
from usaf_ext import _C

CPU = torch.device("cpu")
_current = CPU
_MAX_CASES = 30

cpu_only = pytest.mark.parametrize("device", ["cpu"], indirect=True)


def gpu() -> torch.device | None:
    """The GPU that this build has kernels for, the emulated one included; None without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(found.type, 0) if found is not None and _C.GPU_BACKEND else None


def current() -> torch.device:
    """The device whose turn it is."""
    return _current


def is_emulated() -> bool:
    """Whether this process runs the build of tests/gpu_emulation/build_device.py."""
    return _C.GPU_BACKEND == "emulated"


def names() -> list[str]:
    return ["cpu", *([gpu().type] if gpu() else [])]


def _parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def chosen(items: list[Any], all_cases: bool) -> list[Any]:
    """The tests to run of those collected. A GPU has none of the CPU's instruction sets; and the emulated one, whose
    kernels tests/test_gpu_*.py go through, is given some cases of each test only, unless `all_cases`."""
    on_cpu = [item for item in items if _parameters(item).get("device", "cpu") == "cpu"]
    cases: dict[str, list[Any]] = {}  # of each test, on the GPU
    for item in items:
        if _parameters(item).get("device", "cpu") != "cpu" and _parameters(item).get("isa", "plain") == "plain":
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    if is_emulated() and not all_cases:
        cases = {name: random.Random(name).sample(of, min(len(of), _MAX_CASES)) for name, of in cases.items()}
    kept = {id(item) for of in [on_cpu, *cases.values()] for item in of}
    return [item for item in items if id(item) in kept]


@contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    global _current
    _current = device
    try:
        yield
    finally:
        _current = CPU


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def on_device(function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(...) on the current device, for tensors of the CPU."""
    if _current.type == "cpu":
        return function(*args, **kwargs)
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in moved:
            moved[id(value)] = (value, value.to(_current))
        return moved[id(value)][1]

    def bring_back(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(map(bring_back, value))
        if isinstance(value, Tensor):
            assert value.device == (_current if moved else CPU)
            return value.cpu()
        return value

    result = function(*map(move, args), **{name: move(value) for name, value in kwargs.items()})
    with torch.no_grad():
        for original, on_device in moved.values():
            written = on_device.cpu()
            if not same_bits(original, written):
                original.copy_(written)
    return bring_back(result)


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """torch.library.opcheck with the arguments on the current device."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(_current).requires_grad_(value.requires_grad)

    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if _current.type not in ("cpu", "cuda"):
        checks.remove("test_autograd_registration")  # knows torch's own devices only
    keywords = {name: move(value) for name, value in (kwargs or {}).items()}
    torch.library.opcheck(op, tuple(map(move, args)), keywords, test_utils=checks)


class _Ops:
    """usaf_ext.ops on the current device."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(usaf_ext.ops, name)
        return functools.partial(on_device, function)


ops = _Ops()
