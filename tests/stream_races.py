"""Finds work on streams that nothing orders: two ops on the same memory, one of them writing, neither before the other.

For a device whose streams run at once, so that a wait that is missing would never show.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Races(TorchDispatchMode):
    """While entered, torch's streams and events are this object's, and each op is looked at.

    Ops on tensors of the CPU alone are the host's, at once; the others are queued on the current stream. An op comes
    after what its stream and the host knew of when it was queued.
    """

    def __init__(self, device: torch.device, monkeypatch: Any) -> None:
        super().__init__()
        self.found: list[str] = []
        self._device, self._patch = device, monkeypatch
        self._touched: dict[int, list[tuple[int, bool, str]]] = {}  # storage -> (op, whether it wrote, name)
        self._alive: list[torch.Tensor] = []  # so that no address is used again
        self._num_ops = 0
        self.host = _Stream(self)
        self.current = self.compute = _Stream(self)

    def __enter__(self) -> Races:
        self._patch.setattr(torch, "Stream", lambda device: _Stream(self))
        self._patch.setattr(torch, "Event", lambda device: _Event(self))
        self._patch.setattr(torch.accelerator, "current_stream", lambda device: self.current)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema.arguments
        given = [(schema[i], value) for i, value in enumerate(args)]
        given += [(argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs]
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        touched = [(t, bool(a.alias_info and a.alias_info.is_write)) for a, value in given for t in _tensors(value)]
        written = [t for t in _tensors(result) if not any(t is known for known, _ in touched)]
        self._run(func._schema.name, [*touched, *((t, True) for t in written)])
        return result

    def _run(self, name: str, touched: list[tuple[torch.Tensor, bool]]) -> None:
        stream = self.current if any(t.device == self._device for t, _ in touched) else self.host
        before, self._num_ops = stream.done | self.host.done, self._num_ops + 1
        for tensor, writes in touched:
            uses = self._touched.setdefault(tensor.untyped_storage().data_ptr(), [])
            for op, wrote, what in uses:
                if (writes or wrote) and op not in before and op != self._num_ops:
                    self.found.append(f"{what} and {name}")
            uses.append((self._num_ops, writes, name))
            self._alive.append(tensor)
        stream.done = before | {self._num_ops}


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


class _Event:
    def __init__(self, races: Races) -> None:
        self.done: set[int] = set()
        self._races = races

    def record(self, stream: _Stream) -> None:
        self.done = set(stream.done)

    def synchronize(self) -> None:
        self._races.host.done |= self.done


class _Stream:
    def __init__(self, races: Races) -> None:
        self.done: set[int] = set()
        self._races = races

    def wait_event(self, event: _Event) -> None:
        self.done |= event.done

    def wait_stream(self, other: _Stream) -> None:
        self.done |= other.done

    def __enter__(self) -> None:
        self._races.current = self

    def __exit__(self, *_: object) -> None:
        self._races.current = self._races.compute
