"""Every op and the paged expert layer on one device, most telling cases first, until the time is over.

    python bench/gpu_measure.py --out FOLDER [--device cuda] [--seconds 240] [--only REGEX] [--size gpu|bench|test]

Adds to FOLDER/bench.json, after each case, what it does not have yet. gpu_bench.py starts it, again if it breaks down.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import BENCH_SHAPE, QWEN3_30B_LAYER, TEST_SHAPE, OpShape, Work
from device_timing import measure, synchronize
from environment import environment
from gpu_bench import BROKEN, read, write
from op_cases import OP_CASES
from paging_work import Paging
from pairing import Copy
from tables import rows_of
from usaf_ext.devices import resolve_device

logger = logging.getLogger("gpu_measure")

FIRST = (
    "decode_nf4_bf16",
    "encode_nf4_bf16",
    "encode_nf4_fp32",
    "adam_master_nf4",
    "gather",
    "scatter",
    "copies",
    "step",
    "adam_master_nf4_8bit_moments",
    "row_gradient",
    "glu",
    "glu_backward",
    "scatter_backward",
    "sort",
)
LARGE_MEMORY = 32 << 30  # bytes of a device from which the larger size is used
COPY_BYTES = {"gpu": 1 << 30, "bench": 256 << 20, "test": 1 << 20}
CACHE_BYTES = 256 << 20  # more than any GPU's last cache: works that take turns touch this much together
MOST_WORKS = 4
HANGS_AFTER = 60  # seconds that no case takes on a GPU

LARGE_SHAPE = replace(BENCH_SHAPE, layer=QWEN3_30B_LAYER.with_(num_tokens=16384), rows=131072, trained=65536)
# Shape of the ops; tokens of the paged layer's steps.
SIZES: dict[str, tuple[OpShape, tuple[int, ...]]] = {
    "gpu": (LARGE_SHAPE, (2048, 8192, 32768)),
    "bench": (BENCH_SHAPE, (512, 2048, 8192)),
    "test": (TEST_SHAPE, (37,)),
}


def _size_for(device: torch.device) -> str:
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= LARGE_MEMORY
    return "gpu" if large else "bench"


def _copy_on(device: torch.device, num_bytes: int) -> Copy:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Copy(lambda: target.copy_(source), 2 * num_bytes)


def _op_works(build: Callable[[OpShape], Work], shape: OpShape) -> list[Work]:
    """The same work on several inputs, more together than a cache holds."""
    first = build(shape)
    count = min(MOST_WORKS, max(2, -(-CACHE_BYTES // first.moved)))
    return [first, *(build(shape) for _ in range(count - 1))]


def cases(device: torch.device, size: str) -> Iterator[tuple[str, Callable[[], list[Work]]]]:
    """Names and builders, in order of value."""
    shape, token_counts = SIZES[size]
    shape = shape.on(device)
    paging: list[Paging] = []

    def make_paging() -> Paging:
        if not paging:
            paging.append(Paging(QWEN3_30B_LAYER if size != "test" else TEST_SHAPE.layer, device))
        return paging[0]

    for name in (*FIRST, *(name for name in OP_CASES if name not in FIRST)):
        if name == "copies":
            yield name, lambda: [make_paging().copies()]
        elif name == "step":
            for num_tokens in token_counts:
                yield f"step[{num_tokens}]", lambda num_tokens=num_tokens: [make_paging().step(num_tokens)]
            paging.clear()
        else:
            yield name, lambda name=name: _op_works(OP_CASES[name], shape)


def _answers(device: torch.device) -> bool:
    """Whether the device still works. After an illegal access, say, it fails whatever this process asks of it."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def run(device: torch.device, size: str, seconds: float, only: str, rounds: int, out: Path) -> int:
    """Measure what bench.json does not have yet. Exit code: 0, 1 if cases failed, BROKEN if no more can run here."""
    start = time.monotonic()
    earlier = read(out)
    rows: list[dict[str, Any]] = earlier.get("rows", [])
    failed: dict[str, str] = earlier.get("failed", {})
    done = {row["case"] for row in rows} | set(failed)
    left_out: list[str] = []
    head = environment(device, "python " + " ".join(sys.argv), COPY_BYTES[size], os.getloadavg()[0])
    result = {**head, "size": size, "rows": rows, "failed": failed, "left_out": left_out, "running": None}
    copy = _copy_on(device, COPY_BYTES[size])
    for name, build in cases(device, size):
        if name in done or not re.search(only, name):
            continue
        if time.monotonic() - start > seconds:
            left_out.append(name)
            continue
        write(out, {**result, "running": name})
        if device.type == "cuda":
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        works: list[Work] = []
        try:
            works = build()
            against = copy if works[0].moved and name != "copies" else None
            rows += rows_of([measure(name, works, device, against, rounds)])
        except Exception as error:  # the other cases are still worth having
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logger.exception("%s failed", name)
        if not _answers(device):
            failed.setdefault(name, "the device answered no more after it")
            write(out, result)
            return BROKEN
        write(out, result)
        faulthandler.cancel_dump_traceback_later()
        works.clear()  # frees the device's memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        logger.info("%s: %.1f s so far", name, time.monotonic() - start)
    write(out, result)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an existing folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=240, help="no case begins after that")
    parser.add_argument("--only", default="", help="cases whose name matches")
    parser.add_argument("--size", choices=SIZES, help="by the device's memory if not given")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        device = resolve_device(arguments.device, "--device")
    except ValueError as error:
        print(f"gpu_measure: {error}", file=sys.stderr)
        return 2
    size = arguments.size or _size_for(device)
    return run(device, size, arguments.seconds, arguments.only, arguments.rounds, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
