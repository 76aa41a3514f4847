"""Copies of pages to the device, and the expert layer with most of its pages in host memory."""

from __future__ import annotations

from collections.abc import Callable

import layers
import torch
from cases import LayerCase, Work
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from usaf_ext.devices import host_empty
from usaf_ext.experts import PagedExperts

DENSITY = 0.01


class Paging:
    """One layer's experts, all pages resident and a quarter of them, and transformers' own on the same weights."""

    def __init__(self, case: LayerCase, device: torch.device):
        self.case = case
        self.device = device
        self.peer: Qwen3MoeExperts = layers.transformers_experts(case)
        every_page = case.num_experts * _page_bytes(case) + (64 << 20)
        self.resident = layers.paged_experts(self.peer, device_budget=every_page, device=device)
        self.paged = layers.paged_at_a_quarter(self.peer, self.resident)
        for experts in (self.resident, self.paged):
            layers.train_neurons(experts.layer, DENSITY)
        self.peer.to(device)

    def copies(self) -> Work:
        """The pager's copies of all pages that are not resident, beside as many bare asynchronous copies of a page."""
        sweep, moved = self._page_sweep(self.paged)
        layout, num_slots = self.paged.layer.store.layout, self.paged.layer.memory.num_slots
        count = round(moved / layout.page_bytes)
        pages = host_empty((min(count, 64), layout.page_bytes), torch.uint8, self.device)
        pages.fill_(1)
        slots = torch.empty(num_slots, layout.page_bytes, dtype=torch.uint8, device=self.device)

        def bare_loop():
            for i in range(count):
                slots[i % num_slots].copy_(pages[i % len(pages)], non_blocking=True)

        size = f"{count} pages of {layout.page_bytes} bytes"
        return Work(size, moved, sweep, {"bare asynchronous copies": bare_loop})

    def step(self, num_tokens: int) -> Work:
        """Forward and backward at a quarter of the pages, beside: all resident, the copies alone, transformers."""
        inputs = self.case.with_(num_tokens=num_tokens).inputs(device=self.device)
        sweep, _ = self._page_sweep(self.paged)
        peers = {
            "all pages resident": layers.ours_step(self.resident, inputs),
            "copies of two sweeps alone": lambda: (sweep(), sweep()),
            "transformers grouped_mm, input gradients": layers.transformers_step(
                self.peer, inputs, "grouped_mm", weight_gradients=False
            ),
        }
        memory, ours = self.paged.layer.memory, layers.ours_step(self.paged, inputs)
        ours()
        memory.reset_stats()
        ours()
        stats = memory.stats()
        size = (
            f"{num_tokens} tokens, {memory.num_slots} of {self.case.num_experts} pages; a step: "
            f"{stats['page_misses']:.0f} page misses, {stats['bytes_in'] / 1e6:.0f} MB in, the host waits "
            f"{stats['stall_seconds'] * 1e3:.2f} ms in the pager"
        )
        return Work(size, 0, ours, peers)

    def _page_sweep(self, experts: PagedExperts) -> tuple[Callable[[], None], int]:
        """A call that brings every page in once, and the bytes that one call copies when others came before it."""
        memory = experts.layer.memory
        every = list(range(self.case.num_experts))

        def sweep():
            stream = 0 if self.device.type == "cpu" else torch.accelerator.current_stream(self.device).native_handle
            for ticket in memory.pager.prefetch(0, every, "inference"):
                memory.pager.wait(ticket, stream)
                memory.pager.release(ticket, stream)

        repeats = 4
        sweep()
        memory.reset_stats()
        for _ in range(repeats):
            sweep()
        return sweep, round(memory.stats()["bytes_in"] / repeats)


def _page_bytes(case: LayerCase) -> int:
    return case.hidden_size * case.intermediate_size * 3  # more than any 4-bit page: the budget is no subject here
