"""Memory that a device has registered: its protection stays, and a child of fork() neither has it nor gives it back."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from child_processes import check_child
from expert_layers import EXPERTS, HIDDEN, routing, weights
from native_memory import NativeDevice, NativePager, call
from usaf_ext.experts import PagedExperts
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks")

PAGE = 4096
SLAB = 1 << 30  # kRegisteredSlabBytes of cpp/memory/host_registration.h


def mappings(begin: int, num_bytes: int) -> list[tuple[int, str, bool]]:
    """(bytes, protection, whether children get it) of what is mapped there, in order."""
    found = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ", line):
            start, end = (int(match[i], 16) for i in (1, 2))
            start, end, protection = max(start, begin), min(end, begin + num_bytes), match[3][:3]
        elif line.startswith("VmFlags:") and start < end:
            found.append((end - start, protection, "dc" not in line.split()))
    return found


@pytest.fixture
def device():
    device = NativeDevice("troubled", 0)
    yield device
    device.close()


@pytest.mark.parametrize("seal_first", [True, False])
@pytest.mark.parametrize("registered", [0, SLAB, SLAB + 3 * PAGE])
def test_what_is_registered_stays_writable_and_the_rest_is_sealed(device, registered, seal_first):
    """A GPU's driver that finds registered memory read-only waits for ever for it to become writable."""
    num_pages = SLAB // PAGE + 3
    device.troubled_registrable(registered)
    store = call("store_new", device.handle, num_pages, seal_first)
    found = mappings(call("store_base", store), num_pages * PAGE)
    call("store_free", store)
    parts = [(registered, "rw-", False), (num_pages * PAGE - registered, "r--", True)]
    assert found == [part for part in parts if part[0] > 0]


def test_children_get_it_again_when_it_is_released(device):
    memory = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for registrable, kept in ((8, []), (4, [(4 * PAGE, "rw-", True)])):
        device.troubled_registrable(registrable * PAGE)
        registration = call("registration_new", device.handle, base, 8 * PAGE, 2 * PAGE)
        assert mappings(base, 8 * PAGE) == [(registrable * PAGE, "rw-", False), *kept]
        call("registration_free", registration)
        assert mappings(base, 8 * PAGE) == [(8 * PAGE, "rw-", True)]


@pytest.mark.parametrize("num_buffers", [0, 3])
def test_a_child_drops_a_pager(num_buffers):
    device = NativeDevice("cpu")
    pager = NativePager(device, 2, 6, 4, num_buffers=num_buffers)

    def use():
        for layer in (0, 1):
            for ticket in pager.prefetch(layer, list(range(6)), "inference"):
                pager.wait(ticket)
                experts = zip(pager.pages(ticket), pager.experts_of(ticket))
                assert all(pager.page_is(page, layer * 6 + expert) for page, expert in experts)
                pager.release(ticket)

    def drop():
        pager.close()
        device.close()

    use()
    check_child(drop)
    use()  # the parent's
    drop()


def test_a_child_unmaps_nothing_that_took_the_place_of_registered_memory(device):
    store = call("store_new", device.handle, 4, True)
    base = call("store_base", store)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def work():
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE: only where nothing is
        assert libc.mmap(base, 4 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == base
        ctypes.memset(base, 7, 4 * PAGE)
        call("store_free", store)
        assert ctypes.string_at(base, 4 * PAGE) == b"\x07" * (4 * PAGE)

    check_child(work)
    call("store_free", store)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_child_drops_an_expert_layer(tmp_path, tier):
    """As a data loader's worker does when it collects garbage."""
    made = PagedExperts.from_weights(*weights())
    made.layer.store.save(tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", tier=tier)
    (layer,) = layers = [type(made)(type(made.layer)(ExpertMemory(store), 0))]
    x, (index, router) = torch.randn(9, HIDDEN), routing(9, 2, EXPERTS)
    expected = layer(x, index, router)

    def drop():
        nonlocal layer, store
        layers.clear()
        del layer, store
        gc.collect()

    check_child(drop)
    assert torch.equal(layer(x, index, router), expected)
