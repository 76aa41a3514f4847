"""Paired timing: in each round every peer runs once, then ours, so that drift of the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def paired(
    benchmark,
    ours: Callable[[], Any],
    peers: dict[str, Callable[[], Any]] | None = None,
    *,
    size: str,
    moved: int | None = None,
    rounds: int = 9,
    **extra: Any,
) -> None:
    """Time `ours` by pytest-benchmark and each peer in the same rounds; the report prints one row for each.

    size: text. moved: bytes (see cases.Work), or None. extra: more entries of `benchmark.extra_info`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers or {}}

    def run_peers() -> None:
        for name, peer in (peers or {}).items():
            start = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - start)

    benchmark.extra_info.update(size=size, bytes=moved, threads=torch.get_num_threads(), **extra)
    benchmark.pedantic(ours, setup=run_peers, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["peers"] = {name: times[-rounds:] for name, times in seconds.items()}
