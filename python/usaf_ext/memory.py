"""The memory of a model's experts: page slots and decode scratch on the device, and what the host holds for them, each
under one hard budget."""

from __future__ import annotations

import logging

import torch

from . import _C
from .devices import CPU, open_device, resolve_device
from .errors import BudgetError
from .registration import register_store, report_buffers
from .sizes import format_size, parse_size
from .store import ExpertStore

logger = logging.getLogger(__name__)

_MATRICES = 3  # gate, up, down^T of one expert are decoded at a time
_MIN_SLOTS = 2  # one page computes while the next arrives
_MIN_BUFFERS = 2  # one page is copied while the next is read
_AUTO_BUFFERS = 16
_BUFFER_OVERHEAD = 512  # bytes of bookkeeping a host buffer, at most
_READER_BYTES = 128 << 10  # stacks of the threads that read from disk, and their lists
# What "auto" leaves of a GPU's memory: one part in so many of the card, for a display and what libraries allocate; and
# of the free rest it takes one part in so many, the other is for banks, gradients and activations.
_GPU_RESERVE, _GPU_SHARE = 10, 2

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertMemory:
    """Page slots and decode scratch of one model, and the pager that fills them from an `ExpertStore`.

    Args:
        store: a sealed store.
        device_budget: bytes for the slot slab and the decode scratch together (an int, a text such as "12GiB"), or
            "auto". On the CPU, where pages are copies of what is in memory already, that is room for two layers' pages.
            On a GPU: for every page, or what fits into half of the memory that is free now, less a tenth of the card;
            that is for a display and for libraries, the other half for banks, gradients and activations.
        dtype: compute dtype, torch.float32, torch.bfloat16 or torch.float16.
        host_budget: bytes (an int, or a text such as "12GiB") that store, host buffers and what `reserve_host` sets
            aside may take together of the process's memory; None: no limit. A store in memory must fit. Of a store on
            disk, as many pages are kept in host buffers as fit; None: 16.
        device: where slots and scratch lie and the experts are computed; see `devices.resolve_device`. The memory of a
            store in memory is registered with a GPU.

    Raises:
        TypeError, ValueError: a device that is not there or that this build has no kernels for; an unsupported dtype.
        DeviceError: the first use of a GPU, and an op gives wrong results there.
        BudgetError: a budget is too small; the message names the smallest that works.
    """

    def __init__(
        self,
        store: ExpertStore,
        device_budget: int | str = "auto",
        dtype: torch.dtype = torch.float32,
        host_budget: int | str | None = None,
        device: torch.device | str | int = CPU,
    ):
        device = resolve_device(device)
        num_slots = self.slots_for(store, device_budget, dtype, device)
        num_buffers = self.buffers_for(store, host_budget)
        if device.type != "cpu":
            from .first_use import ensure_works  # its checks make memories themselves

            ensure_works(device)
            if store.tier == "memory":
                register_store(store, device)
        self.store = store
        self.dtype = dtype
        self.device = device
        self.num_slots = num_slots
        self._slab = torch.empty(num_slots * store.layout.page_bytes, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(self._scratch_bytes(store, dtype), dtype=torch.uint8, device=device)
        if device.type != "cpu":
            # Work that is queued may still use this memory's former contents; pages come in on another stream.
            torch.accelerator.synchronize(device)
        self.device_budget = self.device_bytes if device_budget == "auto" else parse_size(device_budget)
        native = open_device(device)
        slots = self._slab.data_ptr()  # torch's memory begins at a multiple of 64 bytes, as parts of pages do
        self.pager = _C.ExpertPager(store.native, slots, num_slots, self._slab, num_buffers, native)
        report_buffers(self.pager, num_buffers * store.layout.page_bytes, device)
        self.sweep = _C.ExpertSweep(self.pager)
        self.host_budget = None if host_budget is None else parse_size(host_budget, "host_budget")
        self._reserved_host = 0
        where = "in memory" if store.tier == "memory" else f"on disk, {num_buffers} pages of it in host buffers"
        logger.info(
            "%s of experts %s: %s of host memory, %s on %s",
            *(format_size(store.bytes), where, format_size(self.host_bytes), format_size(self.device_bytes), device),
        )

    @classmethod
    def slots_for(
        cls, store: ExpertStore, device_budget: int | str, dtype: torch.dtype, device: torch.device = CPU
    ) -> int:
        """Page slots that `device_budget` affords on a resolved device. The store need not be filled or sealed yet.

        Raises:
            TypeError, ValueError: an unsupported dtype, a budget that is no size.
            BudgetError: the budget is too small.
        """
        if dtype not in COMPUTE_DTYPES:
            raise TypeError(f"dtype: expected one of {COMPUTE_DTYPES}, got {dtype}")
        page_bytes = store.layout.page_bytes
        scratch_bytes = cls._scratch_bytes(store, dtype)
        num_pages = store.num_layers * store.num_experts
        if device_budget == "auto" and device.type == "cpu":
            return max(_MIN_SLOTS, min(num_pages, 2 * store.num_experts))
        budget = cls._auto_budget(device) if device_budget == "auto" else parse_size(device_budget, "device_budget")
        num_slots = min((budget - scratch_bytes) // page_bytes, num_pages)
        if num_slots < _MIN_SLOTS:
            smallest = cls.smallest_budget(store, dtype)
            raise BudgetError(
                f"device_budget: {budget} bytes are too few; the smallest that works for this model is {smallest} "
                f"({format_size(smallest)}): {_MIN_SLOTS} pages of {page_bytes} and {scratch_bytes} of scratch"
            )
        return num_slots

    @staticmethod
    def _auto_budget(device: torch.device) -> int:
        free, total = open_device(device).memory_info()
        return max(0, free - total // _GPU_RESERVE) // _GPU_SHARE

    @staticmethod
    def _scratch_bytes(store: ExpertStore, dtype: torch.dtype) -> int:
        return _MATRICES * store.intermediate_size * store.hidden_size * dtype.itemsize

    @classmethod
    def smallest_budget(cls, store: ExpertStore, dtype: torch.dtype) -> int:
        """Bytes of the smallest budget that works: two slots and the scratch."""
        return _MIN_SLOTS * store.layout.page_bytes + cls._scratch_bytes(store, dtype)

    @classmethod
    def buffers_for(cls, store: ExpertStore, host_budget: int | str | None, reserved: int = 0) -> int:
        """Host buffers of a page each that `host_budget` affords beside `reserved` bytes; 0 for a store in memory.

        Raises:
            ValueError: a budget that is no size.
            BudgetError: the budget is too small.
        """
        budget = None if host_budget is None else parse_size(host_budget, "host_budget")
        if store.tier == "memory":
            if budget is not None and budget < store.bytes + reserved:
                raise BudgetError(_too_small(budget, store.bytes, reserved, "keeps these experts in memory"))
            return 0
        num_pages = store.num_layers * store.num_experts
        if budget is None:
            return max(_MIN_BUFFERS, min(num_pages, _AUTO_BUFFERS))
        buffer_bytes = store.layout.page_bytes + _BUFFER_OVERHEAD
        num_buffers = (budget - reserved - cls._host_overhead(store)) // buffer_bytes
        if num_buffers < _MIN_BUFFERS:
            smallest = cls.smallest_host_budget(store)
            raise BudgetError(_too_small(budget, smallest, reserved, "works for this store on disk"))
        return max(_MIN_BUFFERS, min(num_buffers, num_pages))

    @staticmethod
    def _host_overhead(store: ExpertStore) -> int:
        return _READER_BYTES + store.layout.page_bytes  # a page that is read by itself, e.g. for its rows

    @classmethod
    def smallest_host_budget(cls, store: ExpertStore) -> int:
        """Bytes of the smallest host budget that works for this store, beside reservations."""
        if store.tier == "memory":
            return store.bytes
        return cls._host_overhead(store) + _MIN_BUFFERS * (store.layout.page_bytes + _BUFFER_OVERHEAD)

    @property
    def host_bytes(self) -> int:
        """What `host_budget` covers: the store or its host buffers, and reservations."""
        held = self.store.bytes
        if self.store.tier == "disk":
            buffer_bytes = self.store.layout.page_bytes + _BUFFER_OVERHEAD
            held = self._host_overhead(self.store) + self.pager.num_buffers * buffer_bytes
        return held + self._reserved_host

    def reserve_host(self, num_bytes: int) -> None:
        """Set `num_bytes` of the host budget aside for something else, such as banks in host memory; they replace what
        was set aside before. Host buffers of a store on disk give way, or come back. Call it between sweeps.

        Raises:
            ValueError: negative.
            BudgetError: they do not fit; nothing has changed.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes: expected at least 0, got {num_bytes}")
        num_buffers = self.buffers_for(self.store, self.host_budget, num_bytes)
        if num_buffers != self.pager.num_buffers:
            self.pager.resize_ring(num_buffers)
        self._reserved_host = num_bytes

    @property
    def scratch_pointer(self) -> int:
        return self._scratch.data_ptr()

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device for paging: all that the budget covers, from construction on."""
        return self._slab.nbytes + self._scratch.nbytes

    def stats(self) -> dict[str, float]:
        """Since construction or `reset_stats`: page_hits, page_misses (pages), bytes_in, bytes_out (between host and
        device), bytes_read (from disk), stall_seconds (of the host, for pages), read_stall_seconds (of them, for disk).
        """
        return self.pager.stats()

    def reset_stats(self) -> None:
        self.pager.reset_stats()


def _too_small(budget: int, smallest: int, reserved: int, what: str) -> str:
    total = smallest + reserved
    beside = f", {reserved} of them reserved for banks" if reserved else ""
    return (
        f"host_budget: {budget} bytes are too few; the smallest that {what} is {total} ({format_size(total)}){beside}"
    )
