"""The pager on a store on disk: what is in a slot after wait(), whatever the order of reads and copies; what is read
ahead, what the ring keeps, and failed reads."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest
from pager_use import random_use, sweep
from usaf_ext.errors import BudgetError, DeviceError, StoreError

LAYERS, EXPERTS = 6, 8
PAGES = LAYERS * EXPERTS
READ_AHEAD = 8  # kReadAhead of cpp/memory/pager_copies.cpp


def training_step(pager):
    sweep(pager, range(LAYERS), "training_forward", True)
    sweep(pager, range(LAYERS - 1, -1, -1), "backward", True)


def pages_read(pager, work) -> int:
    before = pager.stats()["bytes_read"]
    work()
    read, rest = divmod(pager.stats()["bytes_read"] - before, pager.page_bytes)
    assert rest == 0
    return read


def wait_and_check(pager, ticket, layer=0):
    pager.wait(ticket)
    for address, expert in zip(pager.pages(ticket), pager.experts_of(ticket)):
        assert pager.page_is(address, layer * pager.num_experts + expert)


# ---- anything, in any order ----


@pytest.mark.parametrize("kind", ["threads", "slow", "lazy", "never early"])
@pytest.mark.parametrize(("num_slots", "num_buffers"), [(2, 2), (3, 2), (5, 3), (8, 16), (13, 5)])
def test_random_use(make_pager, kind, num_slots, num_buffers):
    for seed in range(3):
        draw = random.Random(f"{kind} {num_slots} {num_buffers} {seed}")
        lazy = kind in ("lazy", "never early")
        num_layers, num_experts = draw.choice([(2, 8), (3, 6), (5, 4)])
        device = {"threads": ("cpu", 0), "slow": ("troubled", 1 << 17)}.get(kind, ("lazy", 0))
        pager = make_pager(num_layers, num_experts, num_slots, *device, num_buffers=num_buffers)
        if kind == "slow":
            pager.set_read_time(100)
        streams = [pager.device.create_stream() for _ in range(2)] if lazy else [None]
        assert random_use(pager, draw, num_layers, streams, 150 if kind == "slow" else 500, kind) == 0


@pytest.mark.parametrize("fault", ["ignores_copies", "ends_early"])
def test_the_tests_notice_a_read_at_the_wrong_time(make_pager, fault):
    wrong = 0
    for seed in range(10):
        draw = random.Random(seed)
        pager = make_pager(3, 6, 5, "lazy", num_buffers=3, fault=fault)
        streams = [pager.device.create_stream() for _ in range(2)]
        wrong += random_use(pager, draw, 3, streams, 300, "lazy")
    assert wrong > 0


# ---- read-ahead ----


def test_reads_and_copies_run_before_the_wait(make_pager):
    pager = make_pager(2, 4, 8, "lazy", num_buffers=4)
    tickets = pager.prefetch(0, [0, 1, 2, 3], "inference") + pager.prefetch(1, [0, 1, 2, 3], "inference")
    assert pager.stats()["bytes_in"] == 0
    while pager.lazy_read_some(1000, 0) > 0:
        pass
    assert pager.stats() == {
        "page_hits": 0,
        "page_misses": 8,
        "bytes_in": 8 * pager.page_bytes,
        "bytes_read": 8 * pager.page_bytes,
    }
    prompt = Prompt(pager)
    for layer, ticket in enumerate(tickets):
        prompt.wait(ticket)
        assert all(pager.page_is(page, layer * 4 + i) for i, page in enumerate(pager.pages(ticket)))
    assert pager.lazy_read_some(1000, 0) == 0


def test_reads_ahead_of_free_slots_but_not_far(make_pager):
    """All slots are in use: the next group's pages are read, not copied, and no more of them than the look-ahead."""
    pager = make_pager(2, 24, 4, "cpu", num_buffers=24)
    held = pager.prefetch(0, [0, 1, 2, 3], "inference")
    for ticket in held:
        wait_and_check(pager, ticket)
    pager.prefetch(1, list(range(24)), "inference")
    while pager.stats()["bytes_read"] < (4 + READ_AHEAD) * pager.page_bytes:
        time.sleep(0.001)
    time.sleep(0.02)
    assert pager.stats()["bytes_read"] == (4 + READ_AHEAD) * pager.page_bytes
    assert pager.stats()["bytes_in"] == 4 * pager.page_bytes


def test_a_wait_blocks_for_the_read_only(make_pager):
    pager = make_pager(1, 2, 2, "cpu", num_buffers=2)
    pager.set_read_time(50_000)
    first, _ = pager.prefetch(0, [0, 1], "inference")
    start = time.monotonic()
    wait_and_check(pager, first)
    assert 0.04 < time.monotonic() - start < 5


def test_the_earliest_page_is_read_though_later_ones_fill_the_ring(make_pager):
    """Page 0 is on the device when layer 0 is queued behind layer 1, and driven out before its turn comes."""
    pager = make_pager(2, 4, 2, "lazy", num_buffers=2)
    prompt = Prompt(pager)
    (here,) = prompt.prefetch(0, [0], "inference")
    prompt.wait(here)
    prompt.release(here)
    tickets = [pager.prefetch(*ask, "inference")[0] for ask in ((1, [0]), (1, [1]), (0, [0]), (1, [2]), (1, [3]))]
    for ticket, page in zip(tickets, (4, 5, 0, 6, 7)):
        while pager.lazy_read_some(1000, 0) > 0:
            pass
        prompt.wait(ticket)
        assert pager.page_is(pager.pages(ticket)[0], page)
        prompt.release(ticket)


# ---- what the ring keeps ----


class Prompt:
    """A pager on the lazy device whose copies and kernels are done before the next read."""

    def __init__(self, pager):
        self.pager, self.num_experts = pager, pager.num_experts
        self.stream = pager.device.create_stream()

    def finish(self):
        while self.pager.lazy_read_some(1, 0) + self.pager.device.lazy_run_some(1 << 30, 0) > 0:
            pass

    def prefetch(self, layer, experts, phase):
        tickets = self.pager.prefetch(layer, experts, phase)
        self.finish()
        return tickets

    def wait(self, ticket):
        self.pager.wait(ticket, self.stream)
        self.finish()

    def release(self, ticket):
        self.pager.release(ticket, self.stream)
        self.finish()


@pytest.mark.parametrize("num_slots", [4, 8, 16])
@pytest.mark.parametrize("num_buffers", [2, 12, 20, 24, 32, 48])
def test_a_training_step_reads_what_neither_ring_nor_device_can_keep(make_pager, num_slots, num_buffers):
    """A page that is driven out of the device is in the ring only if it was kept there when it was copied."""
    pager = make_pager(LAYERS, EXPERTS, num_slots, "lazy", num_buffers=num_buffers)
    prompt = Prompt(pager)

    def work():
        training_step(prompt)

    assert pages_read(pager, work) <= 2 * PAGES - num_slots
    kept = max(num_slots, min(num_buffers - READ_AHEAD, PAGES - num_slots) + num_slots - EXPERTS)
    for _ in range(3):
        assert pages_read(pager, work) <= 2 * max(PAGES - kept, 0)


@pytest.mark.parametrize("num_buffers", [16, 24, 32])
def test_inference_reads_what_the_ring_cannot_keep(make_pager, num_buffers):
    num_slots = 2 * EXPERTS
    pager = make_pager(LAYERS, EXPERTS, num_slots, "lazy", num_buffers=num_buffers)
    prompt = Prompt(pager)

    def work():
        sweep(prompt, range(LAYERS), "inference", True)

    work()
    for _ in range(3):
        assert pages_read(pager, work) <= PAGES - (num_buffers - READ_AHEAD)


def test_a_smaller_ring_gives_way_and_a_larger_one_comes_back(make_pager):
    pager = make_pager(LAYERS, EXPERTS, 4, "cpu", num_buffers=40)
    training_step(pager)
    large = pages_read(pager, lambda: training_step(pager))
    ahead = pager.prefetch(0, list(range(EXPERTS)), "training_forward")  # reads under way
    pager.resize_ring(2)
    assert pager.num_buffers == 2
    for ticket in ahead:
        wait_and_check(pager, ticket)
        pager.release(ticket)
    training_step(pager)
    small = pages_read(pager, lambda: training_step(pager))
    pager.resize_ring(40)
    training_step(pager)
    assert pages_read(pager, lambda: training_step(pager)) <= large + 2 < small
    with pytest.raises(BudgetError, match="at least 2 host buffers of 4096 bytes, got 1"):
        pager.resize_ring(1)
    with pytest.raises(ValueError, match="num_buffers: expected at most 40, got 41"):
        pager.resize_ring(41)


# ---- failures ----


def test_a_failed_read_is_an_error_of_the_wait_and_is_done_again(make_pager):
    pager = make_pager(1, 8, 4, "cpu", num_buffers=3)
    pager.set_unreadable(2)
    first, second, third, _ = pager.prefetch(0, list(range(8)), "inference")
    wait_and_check(pager, first)
    for _ in range(2):
        with pytest.raises(StoreError, match="page 2: unreadable"):
            pager.wait(second)
    with pytest.raises(ValueError, match="not waited for"):
        pager.pages(second)
    pager.release(first)
    pager.cancel(second)
    wait_and_check(pager, third)
    pager.release(third)
    (again,) = pager.prefetch(0, [2], "inference")
    with pytest.raises(StoreError, match="page 2: unreadable"):
        pager.wait(again)
    pager.set_unreadable(-1)
    pager.reset()
    for ticket in pager.prefetch(0, list(range(8)), "inference"):
        wait_and_check(pager, ticket)
        pager.release(ticket)


def test_a_page_read_for_two_tickets_fails_for_both(make_pager):
    pager = make_pager(1, 4, 4, "lazy", num_buffers=2)
    prompt = Prompt(pager)
    pager.set_unreadable(1)
    first, second = (pager.prefetch(0, [1], "inference")[0] for _ in range(2))
    for ticket in (first, second):
        with pytest.raises(StoreError, match="page 1: unreadable"):
            prompt.wait(ticket)
    pager.cancel(first)
    pager.set_unreadable(-1)
    (third,) = pager.prefetch(0, [1], "inference")
    for ticket in (second, third):  # tried again for the third: the second has it too
        prompt.wait(ticket)
        assert pager.page_is(pager.pages(ticket)[0], 1)


def test_a_refused_copy_is_an_error_of_the_wait(make_pager):
    pager = make_pager(1, 4, 4, "troubled", num_buffers=4)
    pager.device.troubled_refuse(0)
    first, second = pager.prefetch(0, [0, 1, 2, 3], "inference")
    while pager.stats()["bytes_read"] < 4 * pager.page_bytes:
        time.sleep(0.001)
    fine = []
    for ticket in (first, second):  # whichever page was read first
        with contextlib.suppress(DeviceError):
            wait_and_check(pager, ticket)
            fine.append(ticket)
    assert len(fine) == 1
    (refused,) = {first, second} - set(fine)
    with pytest.raises(DeviceError, match="copy refused"):
        pager.wait(refused)
    pager.reset()
    for ticket in pager.prefetch(0, [0, 1, 2, 3], "inference"):
        wait_and_check(pager, ticket)


def test_a_failed_copy_is_an_error_of_the_wait_and_is_done_again(make_pager):
    pager = make_pager(1, 8, 4, "troubled", num_buffers=2)
    pager.device.troubled_fail(1)
    first, second = pager.prefetch(0, [0, 1, 2, 3], "inference")
    fine = []
    for ticket in (first, second):  # whichever page was copied second
        with contextlib.suppress(DeviceError):
            wait_and_check(pager, ticket)
            fine.append(ticket)
    (failed,) = {first, second} - set(fine)
    with pytest.raises(DeviceError, match="null pointer"):
        pager.wait(failed)
    pager.reset()
    for ticket in pager.prefetch(0, list(range(8)), "inference"):  # through the same two buffers
        wait_and_check(pager, ticket)
        pager.release(ticket)


def test_nothing_is_read_over_a_copy_that_cannot_be_waited_for(make_pager):
    pager = make_pager(1, 8, 8, "troubled", num_buffers=2)
    (ticket,) = pager.prefetch(0, [0, 1], "inference")
    wait_and_check(pager, ticket)
    pager.release(ticket)
    pager.device.troubled_fail_waits(1)
    for _ in range(3):
        (ticket,) = pager.prefetch(0, [2, 3], "inference")
        with pytest.raises(DeviceError, match="wait failed"):
            pager.wait(ticket)
        pager.reset()
        with pytest.raises(DeviceError, match="wait failed"):
            pager.resize_ring(2)
    pager.device.troubled_fail_waits(0)
    for ticket in pager.prefetch(0, list(range(8)), "inference"):
        wait_and_check(pager, ticket)
    pager.resize_ring(2)


def test_a_reset_from_another_thread_ends_a_wait(make_pager):
    pager = make_pager(1, 4, 4, "cpu", num_buffers=2)
    pager.set_read_time(100_000)
    ticket, _ = pager.prefetch(0, [0, 1, 2, 3], "inference")
    threading.Timer(0.02, pager.reset).start()
    with pytest.raises(ValueError, match="released or cancelled already"):
        pager.wait(ticket)


def test_refuses_a_ring_of_one(make_pager):
    with pytest.raises(BudgetError, match="a store on disk needs at least 2 host buffers of 4096 bytes, got 1"):
        make_pager(1, 4, 4, "cpu", num_buffers=1)
    with pytest.raises(ValueError, match="num_buffers: expected 0 for a store in memory, got 3"):
        make_pager(1, 4, 4, "cpu").resize_ring(3)
