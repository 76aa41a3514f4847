"""Placement "host" beside a GPU: gradients cross to the CPU's update and new codes come back, beside all else.

On a stream of their own, through two pinned buffers, and in a thread of their own: while the CPU updates one layer, the
gradient of the next crosses, and the caller goes on with the backward of the one after that.

    compute stream   .. gradient k | .. gradient k+1 | .. gradient k+2 |           wait | next forward
    copy stream             [gradient k >]   [gradient k+1 >]  [< codes k]  [< codes k+1]
    update thread                            update k ........ update k+1 ..
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from .bank import RowBank
from .devices import host_bytes, host_empty

# Of a bank: its gradient in host memory, grad_scale and found_inf (float32, 0-dim, on the CPU).
HostUpdate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

_NUM_BUFFERS = 2
_ALIGN = 64
_SCALARS = torch.empty(2, dtype=torch.float32, device="meta")


class _Staged(NamedTuple):
    """What crosses for a bank: grad and scalars (grad_scale, found_inf) to the host, codes and absmax back."""

    grad: torch.Tensor
    scalars: torch.Tensor
    codes: torch.Tensor
    absmax: torch.Tensor


def _sources(bank: RowBank) -> _Staged:
    assert bank.grad is not None
    return _Staged(bank.grad, _SCALARS, bank.codes, bank.absmax)


def _buffer_bytes(bank: RowBank) -> int:
    return sum(-(-source.nbytes // _ALIGN) * _ALIGN for source in _sources(bank))


def staging_bytes(banks: Iterable[RowBank]) -> int:
    """Bytes of host memory that the two buffers take when these banks are updated."""
    needed = [host_bytes(_buffer_bytes(bank), bank.device) for bank in banks]
    return _NUM_BUFFERS * max(needed, default=0)


class _Buffer:
    """Pinned memory for what crosses for one bank at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.arrived = torch.Event(device)  # the gradient, at the host
        self.sent = torch.Event(device)  # the codes, to the device
        self.update: Future[None] | None = None  # the latest one from this buffer, until finish() has seen its end

    def views(self, bank: RowBank) -> _Staged:
        """Room for what crosses for `bank`; all earlier copies must be done."""
        needed = _buffer_bytes(bank)
        if self._memory.nbytes < needed:
            self._memory = host_empty((needed,), torch.uint8, self._device)
        views, start = [], 0
        for source in _sources(bank):
            views.append(self._memory[start : start + source.nbytes].view(source.dtype).view(source.shape))
            start += -(-source.nbytes // _ALIGN) * _ALIGN
        return _Staged(*views)

    def wait(self) -> None:
        """Until the update is done. Raises what it raised."""
        update, self.update = self.update, None
        if update is not None:
            update.result()


class HostUpdates:
    """Runs the updates of banks in placement "host" on a GPU, in the order in which they are submitted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.Stream(device)
        self._buffers = [_Buffer(device) for _ in range(_NUM_BUFFERS)]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="usaf-host-update")

    @torch.no_grad()
    def submit(self, bank: RowBank, grad_scale: torch.Tensor, found_inf: torch.Tensor, update: HostUpdate) -> None:
        """Send the gradient of `bank`, as work already on the compute stream leaves it, to `update`, which runs in
        another thread. The gradient may be cleared at once. grad_scale, found_inf: 0-dim, on the device.

        The host waits for the update before the last, whose buffer this one uses.
        """
        compute = torch.accelerator.current_stream(self._device)
        assert bank.grad is not None
        scalars = torch.stack([grad_scale.float(), found_inf.float()])
        buffer = self._buffers[0]
        self._buffers.reverse()
        buffer.wait()
        buffer.sent.synchronize()
        staged = buffer.views(bank)
        # Behind the backward that made the gradient, and behind whatever still reads the codes that come back.
        self._copies.wait_stream(compute)
        with self._copies:
            staged.grad.copy_(bank.grad, non_blocking=True)
            staged.scalars.copy_(scalars, non_blocking=True)
            buffer.arrived.record(self._copies)
        compute.wait_event(buffer.arrived)
        buffer.update = self._thread.submit(self._run, bank, buffer, staged, update, torch.get_num_threads())

    def finish(self) -> None:
        """Wait for all updates; what comes on the compute stream afterwards sees all new codes."""
        if all(buffer.update is None for buffer in self._buffers):
            return
        for buffer in self._buffers:
            buffer.wait()
        torch.accelerator.current_stream(self._device).wait_stream(self._copies)

    @torch.no_grad()
    def _run(self, bank: RowBank, buffer: _Buffer, staged: _Staged, update: HostUpdate, num_threads: int) -> None:
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)  # each thread has its own number
        buffer.arrived.synchronize()
        update(staged.grad, staged.scalars[0], staged.scalars[1])
        staged.codes.copy_(bank.state_codes)
        staged.absmax.copy_(bank.state_absmax)
        with self._copies:
            bank.codes.copy_(staged.codes, non_blocking=True)
            bank.absmax.copy_(staged.absmax, non_blocking=True)
            buffer.sent.record(self._copies)
