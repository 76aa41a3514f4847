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
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _C
from .errors import UsafError
from .experts import run_op

Result = TypeVar("Result")


class _Abandoned(BaseException):
    """Raised in the waiting micro-batches when another one failed; no `except Exception` of a model may catch it."""


class _ThreadState:
    """What torch keeps for each thread, as it is where this is made: autograd, autocast, threads to use, the stream."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self._grad = torch.is_grad_enabled()
        self._num_threads = torch.get_num_threads()
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._stream = None if kind == "cpu" else torch.accelerator.current_stream(device)

    @contextlib.contextmanager
    def entered(self):
        kind, dtype, enabled = self._autocast
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)  # of this thread, which is a micro-batch's own
        with (
            torch.autocast(kind, dtype=dtype, enabled=enabled),
            torch.set_grad_enabled(self._grad),
            # Backward stays in the thread that calls it: a device's own thread could not wait for the others.
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield


class _MicroBatch(threading.Thread):
    """A thread for one micro-batch at a time. It runs only while another one is in `go_on`: to the next experts that
    its body calls, or to the body's end. It outlives the body, since libraries keep what they prepared for a thread."""

    def __init__(self, number: int) -> None:
        super().__init__(name=f"micro-batch-{number}", daemon=True)
        self._changed = threading.Condition()
        self._state = "idle"  # "idle" without a body, "running", or "waiting" for its experts
        self._abandoned = self._ended = False
        self._body: Callable[[], Any] | None = None
        self.request: tuple[Any, tuple[Any, ...]] | None = None  # the expert op it waits for, and its arguments
        self.reply: Any = None
        self.result: Any = None
        self._error: BaseException | None = None
        self.start()

    def begin(self, body: Callable[[], Any], state: _ThreadState) -> None:
        """Have `body` run at the next go_on."""
        context = contextvars.copy_context()

        def run_body() -> Any:
            with state.entered(), _Meeting(self):
                return body()

        self._body = lambda: context.run(run_body)

    def go_on(self) -> None:
        self.request = None
        with self._changed:
            self._set("running")
            self._changed.wait_for(lambda: self._state != "running")
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Come back idle, whatever it does now."""
        with self._changed:
            self._abandoned = True
            if self._state == "waiting":
                self._set("running")
            self._changed.wait_for(lambda: self._state == "idle")
            self._abandoned = False
        self._body = self.request = self.reply = self.result = self._error = None

    def end(self) -> None:
        self.abandon()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self.join()

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._state == "running" or self._ended)
            if self._ended:
                return
            assert self._body is not None
            try:
                self.result = self._body()
            except BaseException as error:
                self._error = error
            _C.release_thread_pool()
            with self._changed:
                self._set("idle")

    def meet(self, op: Any, args: tuple[Any, ...]) -> Any:
        _C.release_thread_pool()
        with self._changed:
            if not self._abandoned:
                self.request = (op, args)
                self._set("waiting")
                self._changed.wait_for(lambda: self._state == "running")
            if self._abandoned:
                raise _Abandoned
        reply, self.reply = self.reply, None
        return reply

    def _set(self, state: str) -> None:
        self._state = state
        self._changed.notify_all()


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


class MicroBatchThreads:
    """The threads that micro-batches run in; a context manager, at whose end they end."""

    def __init__(self) -> None:
        self._threads: list[_MicroBatch] = []

    def __enter__(self) -> MicroBatchThreads:
        return self

    def __exit__(self, *_: object) -> None:
        while self._threads:
            self._threads.pop().end()

    def run(
        self,
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
        while len(self._threads) < len(bodies):
            self._threads.append(_MicroBatch(len(self._threads)))
        threads = self._threads[: len(bodies)]
        state = _ThreadState(device)
        for thread, body in zip(threads, bodies):
            thread.begin(body, state)
        try:
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
