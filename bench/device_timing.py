"""Timing on any device, in rounds that ours, the peers and a copy share: events on CUDA and ROCm, else the clock.

Works take turns, so that no run finds its inputs in the device's cache, and a reading covers several calls, so that the
host is ahead of the device and the launch of the first is all that it adds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Work
from pairing import Copy
from tables import Measurement

logger = logging.getLogger(__name__)

READING_SECONDS = 0.005  # a reading is repeated until it is at least this long
MOST_CALLS = 200
WARM_UPS = 2
ERROR_CHARACTERS = 160  # of a peer's error, in the table

Calls = Sequence[Callable[[], Any]]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(calls: Calls, device: torch.device) -> float:
    """Seconds that `device` takes for the calls, one after another."""
    if device.type != "cuda":  # the emulated device's events carry no times
        synchronize(device)
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize(device)
        return time.perf_counter() - start
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _take_turns(calls: Calls, count: int) -> list[Callable[[], Any]]:
    return [calls[i % len(calls)] for i in range(count)]


def _count(calls: Calls, device: torch.device) -> int:
    """Warm up; then how many calls make one reading."""
    seconds_of(_take_turns(calls, max(WARM_UPS, len(calls))), device)
    once = seconds_of(calls, device) / len(calls)
    return min(MOST_CALLS, max(len(calls), math.ceil(READING_SECONDS / max(once, 1e-9))))


def measure(name: str, works: Sequence[Work], device: torch.device, copy: Copy | None, rounds: int = 7) -> Measurement:
    """Time works, equal but for where their inputs lie.

    A peer that raises (bitsandbytes without this GPU's library, say) is left out; the size says so, and why.

    Raises: whatever ours raises.
    """
    contenders: dict[str, Calls] = {"": [work.ours for work in works]}
    for peer in works[0].peers:
        contenders[peer] = [work.peers[peer] for work in works]
    if copy is not None:
        contenders["copy"] = [copy.run]
    counts: dict[str, int] = {}
    size = works[0].size
    for contender, calls in contenders.items():
        try:
            counts[contender] = _count(calls, device)
        except Exception as error:  # whatever another library brings up must not cost us our own figure
            if contender in ("", "copy"):
                raise
            logger.warning("%s: %s is left out", name, contender, exc_info=True)
            reason = " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())[:ERROR_CHARACTERS]
            size += f"; {contender} left out: {reason}"
    seconds: dict[str, list[float]] = {contender: [] for contender in counts}
    for _ in range(rounds):
        for contender, count in counts.items():
            reading = seconds_of(_take_turns(contenders[contender], count), device)
            seconds[contender].append(reading / count)
    info: dict[str, Any] = {"size": size, "bytes": works[0].moved, "calls": counts[""]}
    ours = seconds.pop("")
    if copy is not None:
        info["copy_rates"] = [copy.moved / duration for duration in seconds.pop("copy")]
    return Measurement(name, {**info, "peers": seconds}, ours)
