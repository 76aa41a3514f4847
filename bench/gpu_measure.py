"""Every op and the paged expert layer on one device, most telling cases first, until the time is over.

    python bench/gpu_bench.py --out FOLDER [--device cuda] [--seconds 240] [--only REGEX] [--size gpu|bench|test]

Writes FOLDER/bench.json after each case. Used by bench/gpu.sh, which makes the report.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from cases import BENCH_SHAPE, QWEN3_30B_LAYER, TEST_SHAPE, OpShape, Work
from device_timing import measure
from environment import environment
from op_cases import OP_CASES
from paging_work import Paging
from pairing import Copy
from tables import Measurement, rows_of
from usaf_ext.devices import resolve_device

logger = logging.getLogger("gpu_bench")

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


def _write(out: Path, result: dict) -> None:
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")


def run(device: torch.device, size: str, seconds: float, only: str, rounds: int, out: Path) -> int:
    """Measure, writing after each case; how many failed."""
    start = time.monotonic()
    command = "python " + " ".join(sys.argv)
    head = environment(device, command, COPY_BYTES[size], os.getloadavg()[0])
    copy = _copy_on(device, COPY_BYTES[size])
    measured: list[Measurement] = []
    failed: dict[str, str] = {}
    left_out: list[str] = []
    result = {**head, "size": size, "rows": [], "failed": failed, "left_out": left_out}
    for name, build in cases(device, size):
        if not re.search(only, name):
            continue
        if time.monotonic() - start > seconds:
            left_out.append(name)
            continue
        try:
            works = build()
            against = copy if works[0].moved and name != "copies" else None
            measured.append(measure(name, works, device, against, rounds))
        except Exception as error:  # the other cases are still worth having
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logger.exception("%s failed", name)
        works = []  # frees the device's memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["rows"] = rows_of(measured)
        _write(out, result)
        logger.info("%s: %.1f s so far", name, time.monotonic() - start)
    _write(out, result)
    return len(failed)


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
        print(f"gpu_bench: {error}", file=sys.stderr)
        return 2
    size = arguments.size or _size_for(device)
    failed = run(device, size, arguments.seconds, arguments.only, arguments.rounds, arguments.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
