"""The expert layers' schedule on a virtual-time device (tests/native/schedule_harness.cpp), by ctypes.

The real pager and sweep run there; kernels and copies take given times and only check, or carry, small pages.
"""

from __future__ import annotations

import ctypes
import functools
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from native_build import build

FAULTS = ("none", "missing_wait", "early_reuse")
PHASES = ("inference", "training_forward", "backward")
_ROOT = Path(__file__).resolve().parents[1]


class Rates(ctypes.Structure):
    """Seconds of a copy of one page, of a launch or copy on the host, of an event's record or wait there, and from an
    event until the host that waits for it goes on; and how many copies, or kernels, a stream's queue holds before the
    host must wait for room."""

    _fields_ = [
        ("copy_seconds", ctypes.c_double),
        ("call_seconds", ctypes.c_double),
        ("event_seconds", ctypes.c_double),
        ("wake_seconds", ctypes.c_double),
        ("queue_depth", ctypes.c_int64),
    ]


class _LayerWork(ctypes.Structure):
    _fields_ = [
        ("before_seconds", ctypes.c_double),
        ("after_seconds", ctypes.c_double),
        ("before_calls", ctypes.c_int64),
        ("after_calls", ctypes.c_int64),
        ("expert_calls", ctypes.c_int64),
        ("tokens", ctypes.POINTER(ctypes.c_int64)),
        ("expert_seconds", ctypes.POINTER(ctypes.c_double)),
    ]


class Figures(ctypes.Structure):
    """Sums since the start. compute_end: when the last kernel ends. stall_seconds: kernels that nothing but an event
    kept from starting; launch_seconds: nothing but the host. host_waits: of the host for an event. event_calls:
    records, and waits of streams."""

    _fields_ = [
        ("compute_end", ctypes.c_double),
        ("copy_seconds", ctypes.c_double),
        ("kernel_seconds", ctypes.c_double),
        ("stall_seconds", ctypes.c_double),
        ("launch_seconds", ctypes.c_double),
        ("host_waits", ctypes.c_int64),
        ("host_wait_seconds", ctypes.c_double),
        ("event_calls", ctypes.c_int64),
        ("page_hits", ctypes.c_int64),
        ("page_misses", ctypes.c_int64),
        ("wrong_reads", ctypes.c_int64),
    ]

    def __sub__(self, other: Figures) -> Figures:
        return Figures(*(getattr(self, name) - getattr(other, name) for name, _ in self._fields_))


class _Span(ctypes.Structure):
    _fields_ = [
        ("is_copy", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("start", ctypes.c_double),
        ("end", ctypes.c_double),
    ]


@dataclass(frozen=True)
class LayerWork:
    """What one MoE layer launches: `before` its experts (attention, router), for each expert with tokens, `after`.
    Times in seconds; calls are kernel launches."""

    tokens: Sequence[int]
    expert_seconds: Sequence[float]
    expert_calls: int = 1
    before_seconds: float = 0.0
    before_calls: int = 1
    after_seconds: float = 0.0
    after_calls: int = 1


@functools.cache
def available() -> bool:
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    memory = [str(Path(path).relative_to(_ROOT)) for path in sorted(glob.glob(str(_ROOT / "cpp/memory/*.cpp")))]
    library = build(["tests/native/schedule_harness.cpp", *memory], ["-O1", "-pthread"])
    if library is not None:
        library.last_error.restype = ctypes.c_char_p
        library.schedule_new.restype = ctypes.c_void_p
        library.schedule_free.restype = None
        for name in ("run_layer", "launch", "figures", "spans"):
            getattr(library, f"schedule_{name}").restype = ctypes.c_int64
        library.run_random_schedules.restype = ctypes.c_int64
    return library


def _call(name: str, *arguments):
    library = _library()
    assert library is not None, "no C++ compiler"
    result = getattr(library, name)(*arguments)
    if result in (-1, None):
        raise RuntimeError(library.last_error().decode())
    return result


class Schedule:
    """The sweeps of one model over `num_slots` page slots."""

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, rates: Rates):
        self.num_layers, self.num_experts = num_layers, num_experts
        sizes = (ctypes.c_int64(size) for size in (num_layers, num_experts, num_slots))
        self._handle = ctypes.c_void_p(_call("schedule_new", *sizes, ctypes.byref(rates)))

    def close(self) -> None:
        if self._handle:
            _library().schedule_free(self._handle)
            self._handle = None

    def __enter__(self) -> Schedule:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run_layer(self, layer: int, phase: str, work: LayerWork) -> None:
        native = _LayerWork(
            before_seconds=work.before_seconds,
            after_seconds=work.after_seconds,
            before_calls=work.before_calls,
            after_calls=work.after_calls,
            expert_calls=work.expert_calls,
            tokens=(ctypes.c_int64 * self.num_experts)(*work.tokens),
            expert_seconds=(ctypes.c_double * self.num_experts)(*work.expert_seconds),
        )
        number = ctypes.c_int32(PHASES.index(phase))
        _call("schedule_run_layer", self._handle, ctypes.c_int64(layer), number, ctypes.byref(native))

    def launch(self, seconds: float, calls: int) -> None:
        """Kernels outside the layers."""
        _call("schedule_launch", self._handle, ctypes.c_double(seconds), ctypes.c_int64(calls))

    def figures(self) -> Figures:
        figures = Figures()
        _call("schedule_figures", self._handle, ctypes.byref(figures))
        return figures

    def spans(self) -> list[tuple[bool, int, float, float]]:
        """(is a copy, layer, start, end) of all copies and kernels so far."""
        count = _call("schedule_spans", self._handle, None, ctypes.c_int64(0))
        spans = (_Span * count)()
        _call("schedule_spans", self._handle, spans, ctypes.c_int64(count))
        return [(bool(span.is_copy), span.layer, span.start, span.end) for span in spans]


def run_random_schedules(first_seed: int, wanted: int, fault: str, perfect: bool = False) -> tuple[int, int]:
    """Random schedules until in `wanted` of them a needed wait was forgotten, each in both orders of effects.

    Returns in how many of those a kernel read what it should not, and how many ran at all. Redundant waits are kept
    back, too, unless `perfect`.
    """
    num_run = ctypes.c_int64()
    number = ctypes.c_int32(FAULTS.index(fault))
    arguments = (ctypes.c_uint64(first_seed), ctypes.c_int64(wanted), number, ctypes.c_int32(perfect))
    return _call("run_random_schedules", *arguments, ctypes.byref(num_run)), num_run.value
