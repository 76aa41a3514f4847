"""The native devices and pager on their own, compiled for the tests (tests/native/memory_harness.cpp), by ctypes.

The extension exposes the pager on the CPU device only. Here the same sources also run on a device that does nothing
until told to (`lazy`), and on one that is slow or fails (`troubled`).
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import mmap
import os
from pathlib import Path

import pytest
from native_build import build
from usaf_ext import errors

_SOURCES = (
    "tests/native/memory_harness.cpp",
    "cpp/cpu/device.cpp",
    "cpp/memory/expert_store.cpp",
    "cpp/memory/expert_pager.cpp",
    "cpp/memory/host_registration.cpp",
    "cpp/memory/page_files.cpp",
    "cpp/memory/page_reader.cpp",
    "cpp/memory/page_ring.cpp",
    "cpp/memory/pager_copies.cpp",
    "cpp/memory/pager_state.cpp",
)
_POINTERS = (
    *("create_stream", "create_event", "device_cpu", "device_lazy", "device_troubled", "rig_new", "files_new"),
    *("registration_new", "store_new", "store_base"),
)
_TEXTS = ("last_error_kind", "last_error_text", "device_name")
_NOTHING = (
    *("device_free", "destroy_stream", "destroy_event", "troubled_refuse", "troubled_fail", "troubled_fail_waits"),
    *("troubled_registrable", "registration_free", "store_free"),
    *("rig_free", "rig_unreadable_page", "rig_read_microseconds", "files_free", "trouble_pread"),
)
READ_FAULTS = ("none", "ignores_copies", "ends_early")
PHASES = ("inference", "training_forward", "backward")


@functools.cache
def _library() -> ctypes.CDLL:
    library = build(_SOURCES, ["-O1", "-pthread", "-Wl,--wrap=pread"])
    if library is None:
        pytest.skip("no C++ compiler")
    for name in _POINTERS:
        getattr(library, name).restype = ctypes.c_void_p
    for name in _TEXTS:
        getattr(library, name).restype = ctypes.c_char_p
    for name in _NOTHING:
        getattr(library, name).restype = None
    return library


def _argument(value):
    return ctypes.c_int64(value) if isinstance(value, int) else value


def call(name: str, *arguments):
    """Call a function of the harness; its error becomes the Python exception that the extension would raise."""
    library = _library()
    function = getattr(library, name)
    if function.restype is ctypes.c_int:
        function.restype = ctypes.c_int64
    result = function(*map(_argument, arguments))
    if (function.restype is ctypes.c_int64 and result == -1) or (name in ("rig_new", "files_new") and result is None):
        kind, text = library.last_error_kind().decode(), library.last_error_text().decode()
        raise getattr(errors, kind, getattr(builtins, kind, ValueError))(text)
    return result


class NativeDevice:
    """A device: `cpu`, `lazy`, or `troubled` (the CPU's, copying `busy_bytes` of its own before each copy)."""

    def __init__(self, kind: str = "cpu", busy_bytes: int = 0):
        self.kind = kind
        self.handle = call(f"device_{kind}", *([busy_bytes] if kind == "troubled" else []))

    def close(self) -> None:
        call("device_free", self.handle)

    def __getattr__(self, name: str):
        return lambda *arguments: call(
            name if name.startswith(("create", "destroy", "troubled", "lazy")) else f"device_{name}",
            self.handle,
            *arguments,
        )


class NativePager:
    """The interface of _C.ExpertPager over any device, on a store whose page i holds the number i throughout.

    With `num_buffers` above 0 the pages come through a ring, from a reader with threads, or, on the lazy device, from
    one that reads only when told to (`lazy_read_some`) or waited for. `fault` (of READ_FAULTS) makes the latter wrong.
    """

    def __init__(
        self,
        device: NativeDevice,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        num_buffers: int = 0,
        fault: str = "none",
    ):
        self.device = device
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.on_disk = num_buffers > 0
        sizes = (num_layers, num_experts, num_slots, num_buffers)
        self.handle = call("rig_new", device.handle, *sizes, READ_FAULTS.index(fault))
        self.page_bytes = call("rig_page_bytes", self.handle)

    def close(self) -> None:
        call("rig_free", self.handle)

    def prefetch(self, layer: int, experts: list[int], phase: str) -> list[int]:
        numbers = (ctypes.c_int64 * len(experts))(*experts)
        tickets = (ctypes.c_int64 * max(len(experts), 1))()
        count = call("pager_prefetch", self.handle, layer, numbers, len(experts), PHASES.index(phase), tickets)
        return list(tickets[:count])

    def experts_of(self, ticket: int) -> list[int]:
        experts = (ctypes.c_int64 * self.num_experts)()
        return list(experts[: call("pager_experts_of", self.handle, ticket, experts)])

    def wait(self, ticket: int, stream: int | None = None) -> None:
        call("pager_wait", self.handle, ticket, stream)

    def release(self, ticket: int, stream: int | None = None) -> None:
        call("pager_release", self.handle, ticket, stream)

    def cancel(self, ticket: int) -> None:
        call("pager_cancel", self.handle, ticket)

    def reset(self) -> None:
        call("pager_reset", self.handle)

    def pages(self, ticket: int) -> list[int]:
        addresses = (ctypes.c_int64 * self.num_slots)()
        return list(addresses[: call("pager_pages", self.handle, ticket, addresses)])

    def stats(self) -> dict[str, int]:
        names = ("page_hits", "page_misses", "bytes_in", *(("bytes_read",) if self.on_disk else ()))
        return {name: call("pager_stat", self.handle, which) for which, name in enumerate(names)}

    @property
    def num_buffers(self) -> int:
        return call("pager_num_buffers", self.handle)

    def resize_ring(self, num_buffers: int) -> None:
        call("pager_resize_ring", self.handle, num_buffers)

    def lazy_read_some(self, count: int, seed: int) -> int:
        return call("lazy_read_some", self.handle, count, seed)

    def set_unreadable(self, page: int) -> None:
        call("rig_unreadable_page", self.handle, page)

    def set_read_time(self, microseconds: int) -> None:
        call("rig_read_microseconds", self.handle, microseconds)

    def page_is(self, address: int, number: int) -> bool:
        """Does the slot at `address` hold page `number`, now, as the host sees it?"""
        return bool(call("page_is", self.handle, address, number))

    def launch_check(self, stream: int, address: int, number: int) -> None:
        """The same question asked by a kernel on a stream of the lazy device; `wrong_pages` counts the noes."""
        call("launch_check", self.handle, stream, address, number)

    def wrong_pages(self) -> int:
        return call("wrong_pages", self.handle)


class NativePageFiles:
    """One page of `page_bytes` at `offset` of a file that should have `size` bytes."""

    def __init__(self, path: Path, size: int, offset: int, page_bytes: int):
        self.page_bytes = page_bytes
        self.handle = call("files_new", os.fsencode(path), size, offset, page_bytes)

    def close(self) -> None:
        call("files_free", self.handle)

    @property
    def direct(self) -> bool:
        return bool(call("files_direct", self.handle))

    def read(self) -> bytes:
        buffer = mmap.mmap(-1, self.page_bytes)  # aligned
        call("files_read", self.handle, ctypes.byref(ctypes.c_char.from_buffer(buffer)))
        return buffer[:]


def trouble_pread(interrupted: int = 0, at_most: int = 0, failing: int = 0) -> None:
    """The next `interrupted` reads are cut off by a signal, then `failing` ones by an I/O error; every one gives
    `at_most` bytes (0: what it should)."""
    call("trouble_pread", interrupted, at_most, failing)
