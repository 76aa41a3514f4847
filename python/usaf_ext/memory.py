"""The device memory of a model's experts: page slots and decode scratch, under one hard budget."""

from __future__ import annotations

import torch

from . import _C
from .errors import BudgetError
from .sizes import format_size, parse_size
from .store import ExpertStore

_MATRICES = 3  # gate, up, down^T of one expert are decoded at a time
_MIN_SLOTS = 2  # one page computes while the next arrives
_SLAB_ALIGN = 64

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertMemory:
    """Page slots and decode scratch of one model, and the pager that fills them from an `ExpertStore`.

    Args:
        store: a sealed store.
        device_budget: bytes for the slot slab and the decode scratch together (an int, a text such as "12GiB"), or
            "auto": room for every page, but on the CPU, where pages are copies of what is in memory already, for two
            layers' pages.
        dtype: compute dtype, torch.float32, torch.bfloat16 or torch.float16.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that works.
    """

    def __init__(self, store: ExpertStore, device_budget: int | str = "auto", dtype: torch.dtype = torch.float32):
        num_slots = self.slots_for(store, device_budget, dtype)
        self.store = store
        self.dtype = dtype
        self.num_slots = num_slots
        self._slab = torch.empty(num_slots * store.layout.page_bytes + _SLAB_ALIGN, dtype=torch.uint8)
        self._scratch = torch.empty(self._scratch_bytes(store, dtype), dtype=torch.uint8)
        self.device_budget = self.device_bytes if device_budget == "auto" else parse_size(device_budget)
        first_slot = -(-self._slab.data_ptr() // _SLAB_ALIGN) * _SLAB_ALIGN
        self.pager = _C.ExpertPager(store.native, first_slot, num_slots, self._slab)
        self.sweep = _C.ExpertSweep(self.pager)

    @classmethod
    def slots_for(cls, store: ExpertStore, device_budget: int | str, dtype: torch.dtype) -> int:
        """Page slots that `device_budget` affords. The store need not be filled or sealed yet.

        Raises:
            TypeError, ValueError: an unsupported dtype, a budget that is no size.
            BudgetError: the budget is too small.
        """
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(f"dtype: expected one of {COMPUTE_DTYPES}, got {dtype}")
        page_bytes = store.layout.page_bytes
        scratch_bytes = cls._scratch_bytes(store, dtype)
        num_pages = store.num_layers * store.num_experts
        if device_budget == "auto":
            return max(_MIN_SLOTS, min(num_pages, 2 * store.num_experts))
        budget = parse_size(device_budget, "device_budget")
        num_slots = min((budget - scratch_bytes - _SLAB_ALIGN) // page_bytes, num_pages)
        if num_slots < _MIN_SLOTS:
            smallest = cls.smallest_budget(store, dtype)
            raise BudgetError(
                f"device_budget: {budget} bytes are too few; the smallest that works for this model is {smallest} "
                f"({format_size(smallest)}): {_MIN_SLOTS} pages of {page_bytes} and {scratch_bytes} of scratch"
            )
        return num_slots

    @staticmethod
    def _scratch_bytes(store: ExpertStore, dtype: torch.dtype) -> int:
        return _MATRICES * store.intermediate_size * store.hidden_size * dtype.itemsize

    @classmethod
    def smallest_budget(cls, store: ExpertStore, dtype: torch.dtype) -> int:
        """Bytes of the smallest budget that works: two slots and the scratch."""
        return _MIN_SLOTS * store.layout.page_bytes + cls._scratch_bytes(store, dtype) + _SLAB_ALIGN

    @property
    def scratch_pointer(self) -> int:
        return self._scratch.data_ptr()

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device for paging: all that the budget covers, from construction on."""
        return self._slab.nbytes + self._scratch.nbytes

    def stats(self) -> dict[str, float]:
        """page_hits, page_misses, bytes_in, bytes_out, stall_seconds since construction or `reset_stats`."""
        return self.pager.stats()

    def reset_stats(self) -> None:
        self.pager.reset_stats()
