"""Paired timing: in each round every peer runs once, then ours, so that drift of the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Copy:
    """What an op's bandwidth is compared with. moved: bytes read plus written."""

    run: Callable[[], Any]
    moved: int


def paired(
    benchmark,
    ours: Callable[[], Any],
    peers: dict[str, Callable[[], Any]] | None = None,
    *,
    size: str,
    moved: int | None = None,
    copy: Copy | None = None,
    rounds: int = 9,
    **extra: Any,
) -> None:
    """Time `ours` by pytest-benchmark and each peer in the same rounds; the report prints one row for each.

    size: text. moved: bytes (see cases.Work), or None. copy: timed in each round too. extra: more entries of
    `benchmark.extra_info`.
    """
    others = dict(peers or {})
    if copy is not None:
        others["copy"] = copy.run
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def run_peers() -> None:
        for name, peer in others.items():
            start = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - start)

    benchmark.extra_info.update(size=size, bytes=moved, threads=torch.get_num_threads(), **extra)
    benchmark.pedantic(ours, setup=run_peers, rounds=rounds, warmup_rounds=1)
    timed = {name: times[-rounds:] for name, times in seconds.items()}
    if copy is not None:
        benchmark.extra_info["copy_rates"] = [copy.moved / duration for duration in timed.pop("copy")]
    benchmark.extra_info["peers"] = timed
