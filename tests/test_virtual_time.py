"""The pager and the expert layers' schedule on the virtual-time device: forgotten waits, bytes and time of a step."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "bench"))

import simulated_step
import virtual_time
from cards import CARDS, Model, qwen3_30b_a3b
from simulated_step import Simulation, random_routing
from virtual_time import LayerWork, Rates, Schedule

pytestmark = pytest.mark.skipif(not virtual_time.available(), reason="no C++ compiler")

# ---- the device's clock ----

INSTANT = Rates(copy_seconds=1.0, queue_depth=1000)


def _run(schedule, kernels=3.0, **work):
    count = schedule.num_experts
    schedule.run_layer(0, "inference", LayerWork([9] * count, [kernels] * count, **work))
    return schedule.figures()


def test_a_kernel_starts_behind_its_page():
    with Schedule(1, 2, 2, INSTANT) as schedule:  # groups of one
        figures = _run(schedule)
        assert schedule.spans() == [
            (False, 0, 0.0, 0.0),  # before the experts
            *((True, 0, 0.0, 1.0), (True, 0, 1.0, 2.0)),
            *((False, 0, 1.0, 4.0), (False, 0, 4.0, 7.0), (False, 0, 7.0, 7.0)),
        ]
    assert (figures.compute_end, figures.kernel_seconds, figures.copy_seconds) == (7.0, 6.0, 2.0)
    assert (figures.stall_seconds, figures.launch_seconds, figures.host_waits) == (1.0, 0.0, 1)
    assert (figures.page_hits, figures.page_misses, figures.wrong_reads) == (0, 2, 0)


def test_a_slot_is_refilled_behind_its_last_kernel():
    with Schedule(1, 4, 2, INSTANT) as schedule:
        assert _run(schedule).compute_end == 13.0
        copies = [(start, end) for is_copy, _, start, end in schedule.spans() if is_copy]
    assert copies == [(0.0, 1.0), (1.0, 2.0), (4.0, 5.0), (7.0, 8.0)]
    with Schedule(1, 4, 2, INSTANT) as schedule:  # kernels shorter than copies
        figures = _run(schedule, kernels=0.25)
    assert figures.compute_end == 4.25
    assert figures.stall_seconds == 4.25 - 4 * 0.25


def test_the_host_pays_for_its_calls_and_waits():
    rates = Rates(copy_seconds=1.0, call_seconds=0.5, event_seconds=0.125, wake_seconds=2.0, queue_depth=1000)
    with Schedule(1, 1, 2, rates) as schedule:
        figures = _run(schedule, before_seconds=4.0)
        spans = schedule.spans()
    # Launch at 0.5, done at 4.5; the host is back at 6.5, and copies to a slot that was never used.
    copied_at = 6.5 + 0.5
    assert spans[0] == (False, 0, 0.5, 4.5)
    assert spans[1] == (True, 0, copied_at, copied_at + 1.0)
    assert spans[2] == (False, 0, copied_at + 1.0, copied_at + 4.0)
    assert figures.host_waits == 1
    assert figures.host_wait_seconds == 6.5 - 0.625


def test_the_host_waits_for_room_in_a_queue():
    def copied_at(depth):
        with Schedule(1, 1, 2, Rates(copy_seconds=1.0, call_seconds=0.25, queue_depth=depth)) as schedule:
            for _ in range(4):
                schedule.launch(1.0, 1)
            schedule.run_layer(0, "backward", LayerWork([9], [1.0]))  # which waits for nothing
            (copy,) = [start for is_copy, _, start, _ in schedule.spans() if is_copy]
            return copy

    assert copied_at(1000) == 6 * 0.25
    assert copied_at(1) == 3.25 + 0.25  # the fifth kernel is queued when the fourth has begun
    assert copied_at(2) == 2.25 + 0.25


# ---- forgotten waits ----


@pytest.mark.parametrize("perfect", [True, False], ids=["all waits", "only the needed ones"])
def test_nothing_is_reported_without_a_fault(perfect):
    assert virtual_time.run_random_schedules(1, 10_000, "none", perfect) == (0, 10_000)


@pytest.mark.parametrize("fault", ["missing_wait", "early_reuse"])
def test_every_forgotten_wait_is_caught(fault):
    caught, num_run = virtual_time.run_random_schedules(1, 10_000, fault)
    assert caught == 10_000
    assert num_run < 50_000


# ---- a step of Qwen3-30B-A3B ----

MODEL = qwen3_30b_a3b()


def _slots(gib: int, model: Model = MODEL) -> int:
    return simulated_step.slots_in(model, gib << 30)


@pytest.mark.parametrize("gib", [4, 8, 11])
@pytest.mark.parametrize("num_tokens", [512, 2048, 8192])
@pytest.mark.parametrize("card", CARDS)
def test_a_step_takes_what_its_copies_or_kernels_take(card, num_tokens, gib):
    pages, slots = MODEL.num_pages, _slots(gib)
    with Simulation(MODEL, CARDS[card], num_tokens, slots) as simulation:
        steps = [simulation.step(random_routing(MODEL, num_tokens, seed)) for seed in range(3)]
    assert steps[0].bytes_in <= (2 * pages - slots) * MODEL.page_bytes
    for step in steps[1:]:
        assert step.bytes_in <= 2 * (pages - slots) * MODEL.page_bytes
        assert step.seconds <= 1.05 * step.bound
        assert max(step.stalls[1:]) < 1e-6  # in backward, but at its turn
    for step in steps:
        assert step.wrong_reads == 0
        assert step.forward.host_waits <= MODEL.num_layers
        assert step.backward.host_waits == 0
        for phase in (step.forward, step.backward):  # few of the driver's, however many pages a layer has
            assert phase.event_calls <= 8 * MODEL.num_layers


@pytest.mark.parametrize(("num_tokens", "gib"), [(2048, 8), (512, 11)])
def test_copies_are_spread_over_a_sweep(num_tokens, gib):
    """On an older board's link a layer's copies take longer than its kernels, but all copies together do not."""
    card = replace(CARDS["rtx3060"], link_bandwidth=12e9)
    slots = _slots(gib)
    with Simulation(MODEL, card, num_tokens, slots) as simulation:
        steps = [simulation.step(random_routing(MODEL, num_tokens, seed)) for seed in range(2)]
    step = steps[1]
    layer_copies = MODEL.num_experts * MODEL.page_bytes / card.link_bandwidth
    assert layer_copies > step.forward.compute_seconds / MODEL.num_layers
    for phase in (step.forward, step.backward):
        assert phase.copy_seconds < phase.compute_seconds
        assert phase.seconds <= 1.05 * phase.bound
    assert step.bytes_in <= 2 * (MODEL.num_pages - slots) * MODEL.page_bytes


@pytest.mark.parametrize("times", [(1, 1), (1, 2), (2, 2)], ids=["once", "twice in backward", "twice"])
@pytest.mark.parametrize("num_slots", [12, 18, 24, 30])
def test_a_caller_that_comes_back_to_each_layer_copies_no_more(num_slots, times):
    """As a plain checkpoint does, which runs a layer's forward again in backward."""
    layers, experts = 8, 6
    pages = layers * experts
    work = LayerWork([9] * experts, [1.0] * experts)
    with Schedule(layers, experts, num_slots, INSTANT) as schedule:

        def misses_of_step() -> int:
            before = schedule.figures().page_misses
            sweeps = (("training_forward", range(layers)), ("backward", reversed(range(layers))))
            for (phase, order), count in zip(sweeps, times):
                for layer in order:
                    for _ in range(count):
                        schedule.run_layer(layer, phase, work)
            return schedule.figures().page_misses - before

        misses_of_step()
        for _ in range(2):
            assert misses_of_step() == 2 * (pages - num_slots)
        assert schedule.figures().wrong_reads == 0
