"""The pager: what is in a slot after wait(), what never happens to a held slot, how much a step copies, and misuse."""

from __future__ import annotations

import random

import pytest
import torch
from pager_use import misses_of, random_use, sweep
from usaf_ext import _C
from usaf_ext.errors import BudgetError, DeviceError, StoreError

# ---- how much a step copies ----

LAYERS, EXPERTS = 4, 6
PAGES = LAYERS * EXPERTS


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("num_slots", [2, 3, 4, 5, 6, 7, 9, 11, 12, 15, 18, 20, 23, 24])
def test_a_training_step_copies_each_page_outside_the_budget_once_a_sweep(make_pager, num_slots, look_ahead):
    pager = make_pager(LAYERS, EXPERTS, num_slots)

    def step():
        sweep(pager, range(LAYERS), "training_forward", look_ahead)
        sweep(pager, range(LAYERS - 1, -1, -1), "backward", look_ahead)

    assert misses_of(pager, step) <= 2 * PAGES - num_slots
    for _ in range(4):
        assert misses_of(pager, step) <= 2 * (PAGES - num_slots)
    assert pager.stats()["page_hits"] + pager.stats()["page_misses"] == 5 * 2 * PAGES


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("num_slots", [12, 15, 18, 23, 24])
def test_inference_keeps_what_a_cyclic_order_lets_it_keep(make_pager, num_slots, look_ahead):
    """All slots but those that the groups in use, one or two, pass through; least-recently-used would keep none."""
    pager = make_pager(LAYERS, EXPERTS, num_slots)
    misses_of(pager, lambda: sweep(pager, range(LAYERS), "inference", look_ahead))
    in_use = 2 * EXPERTS if look_ahead else EXPERTS
    for _ in range(4):
        misses = misses_of(pager, lambda: sweep(pager, range(LAYERS), "inference", look_ahead))
        assert misses <= (PAGES - (num_slots - in_use) if num_slots < PAGES else 0)


def test_copies_start_before_the_wait(make_pager):
    pager = make_pager(2, 4, 8, "lazy")
    tickets = pager.prefetch(0, [0, 1, 2, 3], "inference") + pager.prefetch(1, [0, 1, 2, 3], "inference")
    assert pager.stats() == {"page_hits": 0, "page_misses": 8, "bytes_in": 8 * pager.page_bytes}
    assert pager.device.lazy_run_some(1000, 0) > 0
    stream = pager.device.create_stream()
    for layer, ticket in enumerate(tickets):
        pager.wait(ticket, stream)
        assert all(pager.page_is(page, layer * 4 + i) for i, page in enumerate(pager.pages(ticket)))


@pytest.mark.parametrize("phase", ["inference", "training_forward"])
def test_look_ahead_leaves_what_is_used_before_it(make_pager, phase):
    """Layer 2 asked for while layer 0 computes: it must not evict layer 1, which comes first and is there."""
    pager = make_pager(4, 2, 4)
    for layer in (1, 0):
        (ticket,) = pager.prefetch(layer, [0, 1], phase)
        pager.wait(ticket)
        if layer == 1:
            pager.release(ticket)
    (far,) = pager.prefetch(2, [0, 1], phase)
    assert pager.stats()["page_misses"] == 4  # not until layer 0 is free
    pager.release(ticket)
    assert pager.stats()["page_misses"] == 6
    pager.wait(far)
    pager.release(far)
    pager.wait(*pager.prefetch(1, [0, 1], phase))
    assert pager.stats()["page_hits"] == 2


# ---- groups ----


def test_needs_two_slots(make_pager):
    with pytest.raises(BudgetError, match="at least 2 slots of 4096 bytes, got 1"):
        make_pager(1, 4, 1)


def test_groups_are_at_most_half_the_slots_and_in_order(make_pager):
    pager = make_pager(1, 11, 8)
    tickets = pager.prefetch(0, list(range(11)), "inference")
    groups = [pager.experts_of(ticket) for ticket in tickets]
    assert [len(group) for group in groups] == [3, 4, 4]
    assert [expert for group in groups for expert in group] == list(range(11))
    assert tickets == sorted(tickets)
    assert pager.prefetch(0, [], "inference") == []
    assert pager.experts_of(pager.prefetch(0, [2, 9], "inference")[0]) == [2, 9]


def test_tickets_are_never_used_again(make_pager):
    pager = make_pager(1, 4, 4)
    seen = []
    for _ in range(5):
        seen += pager.prefetch(0, [0, 1, 2, 3], "inference")
        pager.reset()
    assert len(seen) == len(set(seen)) == 10


def test_a_shared_page_stays_until_both_groups_are_done(make_pager):
    pager = make_pager(1, 6, 4)
    first, second = (pager.prefetch(0, [1], "inference")[0] for _ in range(2))
    for ticket in (first, second):
        pager.wait(ticket)
    assert pager.pages(first) == pager.pages(second)
    assert pager.stats() == {"page_hits": 1, "page_misses": 1, "bytes_in": pager.page_bytes}
    pager.release(first)
    for expert in (2, 3, 4, 5, 2, 3, 4, 5):
        (ticket,) = pager.prefetch(0, [expert], "inference")
        pager.wait(ticket)
        pager.release(ticket)
    assert pager.page_is(pager.pages(second)[0], 1)


# ---- misuse ----


def test_a_wait_that_cannot_succeed_names_what_to_release(make_pager):
    pager = make_pager(2, 4, 4)
    first, second = pager.prefetch(0, [0, 1, 2, 3], "inference")
    third, fourth = pager.prefetch(1, [0, 1, 2, 3], "inference")
    pager.wait(first)
    pager.wait(second)
    with pytest.raises(ValueError, match=rf"ticket {third}: it needs slots.*cancel ticket {first}, {second}$"):
        pager.wait(third)
    with pytest.raises(ValueError, match=rf"ticket {fourth}: ticket {third} before it needs"):
        pager.wait(fourth)
    pager.release(first)
    pager.wait(third)
    pager.cancel(second)
    pager.wait(fourth)
    assert [pager.page_is(page, 6 + i) for i, page in enumerate(pager.pages(fourth))] == [True, True]


def test_refuses_tickets_in_the_wrong_state(make_pager):
    pager = make_pager(1, 4, 4)
    first, second = pager.prefetch(0, [0, 1, 2, 3], "inference")
    for call in (pager.pages, pager.release):
        with pytest.raises(ValueError, match=f"ticket {second} was not waited for"):
            call(second)
    pager.wait(first)
    with pytest.raises(ValueError, match=f"ticket {first} was waited for already"):
        pager.wait(first)
    pager.release(first)
    pager.cancel(second)
    for ticket, text in ((first, "released or cancelled already"), (second, "already"), (99, "unknown"), (-1, "unkn")):
        for call in (pager.wait, pager.release, pager.cancel, pager.pages, pager.experts_of):
            with pytest.raises(ValueError, match=f"ticket {ticket} (was|is) .*{text}"):
                call(ticket)


@pytest.mark.parametrize(
    ("layer", "experts", "text"),
    [
        (-1, [0], "layer: expected 0 to 1, got -1"),
        (2, [0], "layer: expected 0 to 1, got 2"),
        (0, [4], "experts: expected ascending numbers below 4, each once, got 4 at 0"),
        (0, [-1, 2], "got -1 at 0"),
        (0, [2, 1], "got 1 at 1"),
        (0, [1, 3, 3], "got 3 at 2"),
    ],
)
def test_refuses_bad_requests(make_pager, layer, experts, text):
    pager = make_pager(2, 4, 4)
    with pytest.raises(ValueError, match=text):
        pager.prefetch(layer, experts, "inference")
    assert pager.stats()["page_misses"] == 0


# ---- the extension's own ----


def test_the_extension_pages_a_store():
    layout = _C.PageLayout("nf4", 64, 8)
    store = _C.ExpertStore(2, 3, layout)
    slab = torch.full((5 * layout.page_bytes,), 255, dtype=torch.uint8)
    aligned = -(-slab.data_ptr() // 64) * 64
    with pytest.raises(StoreError, match="sealed"):
        _C.ExpertPager(store, aligned, 4, None, 0, _C.open_device("cpu"))
    for page in range(6):
        view = store.page(*divmod(page, 3))
        view[:] = bytes([page]) * len(view)
    store.seal()
    for pointer in (0, aligned + 32):
        with pytest.raises(ValueError, match="slab: expected a pointer aligned to 64 bytes"):
            _C.ExpertPager(store, pointer, 4, None, 0, _C.open_device("cpu"))
    with pytest.raises(BudgetError, match="at least 2 slots of 4096 bytes, got 1"):
        _C.ExpertPager(store, aligned, 1, None, 0, _C.open_device("cpu"))
    pager = _C.ExpertPager(store, aligned, 4, None, 0, _C.open_device("cpu"))
    with pytest.raises(ValueError, match="phase"):
        pager.prefetch(0, [0], "sideways")
    for layer in (0, 1, 0, 1):
        for ticket in pager.prefetch(layer, [0, 1, 2], "inference"):
            pager.wait(ticket)
            for address, expert in zip(pager.pages(ticket), pager.experts_of(ticket)):
                begin = address - slab.data_ptr()
                assert 0 <= begin <= 4 * layout.page_bytes + 63
                assert (slab[begin : begin + layout.page_bytes] == layer * 3 + expert).all()
            pager.release(ticket)
    stats = pager.stats()
    assert stats["page_hits"] + stats["page_misses"] == 12
    assert stats["bytes_in"] == stats["page_misses"] * layout.page_bytes
    assert stats["bytes_out"] == 0
    assert stats["stall_seconds"] > 0
    pager.reset_stats()
    assert set(pager.stats().values()) == {0}


# ---- failures ----


def test_a_refused_copy_is_an_error_of_the_wait_and_is_done_again(make_pager):
    pager = make_pager(1, 6, 4, "troubled")
    pager.device.troubled_refuse(1)
    first, second = pager.prefetch(0, [0, 1, 2, 3], "inference")
    for _ in range(2):
        with pytest.raises(DeviceError, match="copy refused"):
            pager.wait(first)
    pager.wait(second)
    pager.cancel(first)
    pager.release(second)
    for ticket in pager.prefetch(0, [1, 2, 3, 4], "inference"):  # all slots are free
        pager.wait(ticket)
        assert all(pager.page_is(page, i) for page, i in zip(pager.pages(ticket), pager.experts_of(ticket)))


def test_a_failed_copy_is_an_error_of_the_wait_and_is_done_again(make_pager):
    pager = make_pager(1, 4, 4, "troubled")
    pager.device.troubled_fail(1)
    first, second = pager.prefetch(0, [0, 1, 2, 3], "inference")
    with pytest.raises(DeviceError, match="null pointer"):
        pager.wait(first)
    with pytest.raises(ValueError, match="not waited for"):
        pager.pages(first)
    pager.reset()
    for ticket in pager.prefetch(0, [0, 1, 2, 3], "inference"):
        pager.wait(ticket)
        assert all(pager.page_is(page, i) for page, i in zip(pager.pages(ticket), pager.experts_of(ticket)))
    # The copies of a group share an event, so the pages of the group are lost together.
    assert pager.stats() == {"page_hits": 2, "page_misses": 6, "bytes_in": 6 * pager.page_bytes}
    assert second > first


# ---- anything, in any order ----


@pytest.mark.parametrize("kind", ["cpu", "slow", "lazy", "never early"])
@pytest.mark.parametrize("num_slots", [2, 3, 5, 8, 13])
def test_random_use(make_pager, kind, num_slots):
    for seed in range(3):
        draw = random.Random(f"{kind} {num_slots} {seed}")
        lazy = kind in ("lazy", "never early")
        num_layers, num_experts = draw.choice([(2, 8), (3, 6), (5, 4)])
        device = {"cpu": ("cpu", 0), "slow": ("troubled", 1 << 18)}.get(kind, ("lazy", 0))
        pager = make_pager(num_layers, num_experts, num_slots, *device)
        # Kernels run on either of two streams, so that slots change hands between them.
        streams = [pager.device.create_stream() for _ in range(2)] if lazy else [None]
        assert random_use(pager, draw, num_layers, streams, 250 if kind == "slow" else 500, kind) == 0
