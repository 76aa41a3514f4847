"""Ways to use a pager: a model's sweeps, and anything in any order beside a model of what must come of it."""

from __future__ import annotations

import pytest
from native_memory import PHASES


def sweep(pager, layers, phase, look_ahead):
    """Use every expert of `layers`, in order, as the expert layer does."""
    everything = list(range(pager.num_experts))
    tickets = pager.prefetch(layers[0], everything, phase)
    for i in range(len(layers)):
        ahead = []
        if look_ahead and i + 1 < len(layers):
            ahead = pager.prefetch(layers[i + 1], everything, phase)
        for ticket in tickets:
            pager.wait(ticket)
            pager.release(ticket)
        if not look_ahead and i + 1 < len(layers):
            ahead = pager.prefetch(layers[i + 1], everything, phase)
        tickets = ahead


def misses_of(pager, work) -> int:
    before = pager.stats()
    work()
    after = pager.stats()
    misses = after["page_misses"] - before["page_misses"]
    assert after["bytes_in"] - before["bytes_in"] == misses * pager.page_bytes
    return misses


class Model:
    """What the pager must do, without its slots: which tickets live, and which waits can succeed."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.live: dict[int, list[int]] = {}  # ticket -> page numbers
        self.waited: dict[int, list[int]] = {}  # ticket -> addresses

    def can_wait(self, ticket: int) -> bool:
        needed = {page for other, pages in self.live.items() if other <= ticket for page in pages}
        return len(needed) <= self.num_slots


def random_use(pager, draw, num_layers, streams, num_actions, kind) -> int:
    """Do anything in any order, checking what is in the slots. With `streams` of the lazy device it is kernels that
    look: returns how many pages they found wrong. `kind` "lazy": that device's work runs in between, else at the end.
    """
    model = Model(pager.num_slots)
    stream_of: dict[int, int | None] = {}
    asked = 0

    def check(ticket):
        for address, page in zip(model.waited[ticket], model.live[ticket]):
            if streams[0] is None:
                assert pager.page_is(address, page), f"ticket {ticket}: page {page} is not in its slot"
            else:
                pager.launch_check(stream_of[ticket], address, page)

    for _ in range(num_actions):
        action = draw.choice(["prefetch", "wait", "wait", "wait", "release", "release", "cancel", "check"])
        if action == "prefetch" and len(model.live) < 8:
            layer = draw.randrange(num_layers)
            experts = sorted(draw.sample(range(pager.num_experts), draw.randint(0, pager.num_experts)))
            for ticket in pager.prefetch(layer, experts, draw.choice(PHASES)):
                model.live[ticket] = [layer * pager.num_experts + e for e in pager.experts_of(ticket)]
                asked += len(model.live[ticket])
        elif action == "wait" and (open_ := [t for t in model.live if t not in model.waited]):
            ticket = open_[0] if draw.random() < 0.8 else draw.choice(open_)
            stream_of[ticket] = draw.choice(streams)
            if model.can_wait(ticket):
                pager.wait(ticket, stream_of[ticket])
                model.waited[ticket] = pager.pages(ticket)
                check(ticket)
            else:
                with pytest.raises(ValueError, match="first release or cancel"):
                    pager.wait(ticket, stream_of[ticket])
        elif action == "release" and model.waited:
            ticket = draw.choice(list(model.waited))
            check(ticket)
            pager.release(ticket, stream_of[ticket])
            del model.waited[ticket], model.live[ticket]
        elif action == "cancel" and model.live and draw.random() < 0.3:
            ticket = draw.choice(list(model.live))
            pager.cancel(ticket)
            model.waited.pop(ticket, None)
            del model.live[ticket]
        elif action == "check":
            for ticket in model.waited:
                check(ticket)
            if draw.random() < 0.02:
                pager.reset()
                model.live.clear()
                model.waited.clear()
        held = [address for ticket in model.waited for address in model.waited[ticket]]
        pages = [page for ticket in model.waited for page in model.live[ticket]]
        assert len(set(zip(held, pages))) == len(set(held)) == len(set(pages))  # a slot a page, a page a slot
        if kind == "lazy":
            pager.device.lazy_run_some(draw.choice([0, 0, 1, 3, 20]), draw.getrandbits(32))
            if pager.on_disk:
                pager.lazy_read_some(draw.choice([0, 0, 1, 3, 20]), draw.getrandbits(32))
    stats = pager.stats()
    assert stats["page_hits"] + stats["page_misses"] <= asked
    missed = stats["page_misses"] * pager.page_bytes
    assert missed >= stats["bytes_in"] if pager.on_disk else missed == stats["bytes_in"]  # some are cancelled unread
    assert stats["page_misses"] > model.num_slots
    if streams[0] is None:
        return 0
    pager.device.lazy_run_some(1 << 40, draw.getrandbits(32))
    assert pager.device.lazy_num_queued() == 0  # no stream waits for what never comes
    return pager.wrong_pages()
