"""Layer-major accumulation: several micro-batches share one sweep of the pages, up in forward and down in backward.

Each micro-batch runs its own forward and backward, unchanged, in a thread of its own. Only one thread runs at a time,
in ascending order, each until it comes to a MoE layer's experts; there it waits. When all have come, the caller's
thread computes the experts of all in one call, and the micro-batches go on in ascending order. So nothing needs to be
known about the model, every graph is the one that the micro-batch would have by itself, and whatever a layer
accumulates (bank and router gradients) it accumulates in the order of the micro-batches: the bits are those of running
them one after another.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import UsafError
from .experts import run_op

Result = TypeVar("Result")


class _Abandoned(BaseException):
    """Raised in the waiting micro-batches when another one failed; no `except Exception` of a model may catch it."""


class _ThreadState:
    """What torch keeps for each thread, as it is where this is made: modes of autograd and autocast, and the stream."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self._device = device
        self._grad = torch.is_grad_enabled()
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextlib.contextmanager
    def entered(self):
        kind, dtype, enabled = self._autocast
        with (
            torch.cuda.stream(self._stream),  # of None: nothing
            torch.autocast(kind, dtype=dtype, enabled=enabled),
            torch.set_grad_enabled(self._grad),
            # Backward stays in the thread that calls it: a device's own thread could not wait for the others.
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield


class _MicroBatch(threading.Thread, Generic[Result]):
    """One micro-batch's thread. It runs between `go_on` and the return of it: to the next experts, or to its end."""

    def __init__(self, number: int, body: Callable[[], Result], state: _ThreadState) -> None:
        super().__init__(name=f"micro-batch-{number}")
        self._body, self._state, self._context = body, state, contextvars.copy_context()
        self._wake, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self.request: tuple[Any, tuple[Any, ...]] | None = None  # the expert op it waits for, and its arguments
        self.reply: Any = None
        self.result: Result
        self.error: BaseException | None = None

    def go_on(self) -> None:
        self.request = None
        self._wake.release()
        self._paused.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        self._abandoned = True
        self._wake.release()
        if self.ident is not None:
            self.join()

    def run(self) -> None:
        self._wake.acquire()
        try:
            if not self._abandoned:
                self.result = self._context.run(self._run_body)
        except BaseException as error:
            self.error = error
        finally:
            self._paused.release()

    def _run_body(self) -> Result:
        with self._state.entered(), _Meeting(self):
            return self._body()

    def meet(self, op: Any, args: tuple[Any, ...]) -> Any:
        self.request = (op, args)
        self._paused.release()
        self._wake.acquire()
        if self._abandoned:
            raise _Abandoned
        reply, self.reply = self.reply, None
        return reply


class _Meeting(TorchDispatchMode):
    """Where a micro-batch calls its experts, have it wait for the others."""

    def __init__(self, micro_batch: _MicroBatch) -> None:
        super().__init__()
        self._micro_batch = micro_batch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _JOINT:
            return self._micro_batch.meet(func, args)
        return func(*args, **(kwargs or {}))


def _joint_forward(calls: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
    x, index, weights, _anchors, handles, training = zip(*calls)
    return run_op(torch.ops.usaf.experts_forward_many, handles[0], x, index, weights, handles[0], training[0])


def _joint_backward(calls: Sequence[tuple[Any, ...]]) -> list[tuple[torch.Tensor, ...]]:
    grad_out, x, index, weights, handles = zip(*calls)
    op = torch.ops.usaf.experts_backward_many
    grad_x, grad_weights, grad_anchor = run_op(op, handles[0], grad_out, x, index, weights, handles[0])
    # The sum of all increments goes to the first, so that the others add zeros to it.
    increments = [grad_anchor] + [torch.zeros_like(grad_anchor) for _ in calls[1:]]
    return list(zip(grad_x, grad_weights, increments))


# op -> (position of the layer's handle, what computes it for all micro-batches)
_JOINT: dict[Any, tuple[int, Callable[[Sequence[tuple[Any, ...]]], Sequence[Any]]]] = {
    torch.ops.usaf.experts_forward.default: (4, _joint_forward),
    torch.ops.usaf.experts_backward.default: (4, _joint_backward),
}


def run_together(
    bodies: Sequence[Callable[[], Result]],
    device: torch.device,
    while_running: Callable[[int], AbstractContextManager[Any]] = lambda number: contextlib.nullcontext(),
    after_backward: Callable[[int], None] = lambda handle: None,
) -> list[Result]:
    """Run `bodies`, the forward and backward of one micro-batch each, and return what they return.

    Args:
        bodies: each must call the experts of the same layers in the same order.
        device: of the model.
        while_running: entered, with the micro-batch's number, for every stretch that it runs.
        after_backward: called with a layer's handle when the gradients of all micro-batches are in its bank.

    Raises:
        UsafError: the bodies come to different layers. Whatever one of them raises; the others are then abandoned.
    """
    state = _ThreadState(device)
    threads = [_MicroBatch(number, body, state) for number, body in enumerate(bodies)]
    try:
        for thread in threads:
            thread.start()
        while True:
            for number, thread in enumerate(threads):
                with while_running(number):
                    thread.go_on()
            if all(thread.request is None for thread in threads):
                return [thread.result for thread in threads]
            _compute_experts(threads, after_backward)
    finally:
        for thread in threads:
            thread.abandon()


def _compute_experts(threads: Sequence[_MicroBatch], after_backward: Callable[[int], None]) -> None:
    """Answer what all micro-batches wait for."""
    requests = [thread.request for thread in threads]
    places = {request and (request[0], request[1][_JOINT[request[0]][0]]) for request in requests}
    if len(places) != 1:
        raise UsafError(
            "layer-major accumulation: the micro-batches of a step came to different expert layers; use "
            "accumulation_order='micro_batch' for a model whose layers depend on its input"
        )
    ((op, handle),) = places  # type: ignore[misc]
    with torch.no_grad():
        replies = _JOINT[op][1]([request[1] for request in requests if request is not None])
        if op is torch.ops.usaf.experts_backward.default:
            after_backward(handle)
    for thread, reply in zip(threads, replies):
        thread.reply = reply
