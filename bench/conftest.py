"""The benchmark report: one Markdown table and one JSON under bench/results/, from pytest-benchmark's own figures.

    pytest bench --benchmark-enable [--report NAME]        (make bench)

A case sets `benchmark.extra_info["bytes"]` (each input read once, each output written once), `["size"]` (text) and,
for a peer, `["peer"] = True`. GB/s and the share of the copy bandwidth, measured in this run, follow from the bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import usaf_ext

RESULTS = Path(__file__).parent / "results"
_COPY_BYTES = 512 << 20
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def pytest_addoption(parser):
    parser.addoption("--report", default=None, help="write bench/results/NAME.md and NAME.json")
    parser.addoption("--threads", type=int, default=None, help="torch threads (default: all)")


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of mapping new ones: otherwise the page faults of fresh results lead every
    figure, ours and the peers'. In training the results' memory is reused too."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def pytest_configure(config):
    _keep_freed_memory()
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(scope="session")
def copy_bandwidth(request) -> float:
    """Bytes per second, read plus written, of a large tensor copy: the measure of every other figure."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    request.config.usaf_copy_bandwidth = 2 * _COPY_BYTES / statistics.median(seconds)
    return request.config.usaf_copy_bandwidth


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _environment(config) -> dict:
    packages = ("torch", "transformers", "bitsandbytes")
    return {
        "device": f"{_cpu_model()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "usaf_ext": usaf_ext.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "command": "pytest " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "load_average_at_start": config.usaf_load_average,
    }


def pytest_sessionstart(session):
    session.config.usaf_load_average = os.getloadavg()[0]


def _row(bench, copy_bandwidth: float | None) -> dict:
    stats = bench.stats
    info = bench.extra_info
    moved = info.get("bytes")
    row = {
        "case": bench.name,
        "size": info.get("size", ""),
        "peer": bool(info.get("peer")),
        "bytes": moved,
        "median_ms": stats.median * 1e3,
        "iqr_ms": stats.iqr * 1e3,
        "rounds": stats.rounds,
        "gb_per_s": moved / stats.median / 1e9 if moved else None,
    }
    row["percent_of_copy"] = 100 * moved / stats.median / copy_bandwidth if moved and copy_bandwidth else None
    return row


def _markdown(environment: dict, copy_bandwidth: float | None, rows: list[dict]) -> str:
    lines = [
        f"Device: {environment['device']}  ",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in environment["versions"].items()) + "  ",
        f"Command: `{environment['command']}`  ",
        f"Date: {environment['date']}, load average at start {environment['load_average_at_start']:.2f}  ",
    ]
    if copy_bandwidth:
        lines.append(f"Copy bandwidth in this run (read + written): {copy_bandwidth / 1e9:.1f} GB/s")
    lines += ["", "| case | size | bytes | median +- IQR | GB/s | % of copy |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        name = f"*{row['case']}* (peer)" if row["peer"] else row["case"]
        moved = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else ""
        rate = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else ""
        share = f"{row['percent_of_copy']:.0f}%" if row["percent_of_copy"] else ""
        timing = f"{row['median_ms']:.2f} +- {row['iqr_ms']:.2f} ms"
        lines.append(f"| {name} | {row['size']} | {moved} | {timing} | {rate} | {share} |")
    return "\n".join(lines) + "\n"


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [bench for bench in getattr(session, "benchmarks", []) if bench.stats.rounds]
    if not benchmarks:
        return
    copy_bandwidth = getattr(config, "usaf_copy_bandwidth", None)
    environment = _environment(config)
    rows = [_row(bench, copy_bandwidth) for bench in benchmarks]
    text = _markdown(environment, copy_bandwidth, rows)
    terminalreporter.write_line("\n" + text)
    name = config.getoption("--report")
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
        result = {**environment, "copy_gb_per_s": copy_bandwidth and copy_bandwidth / 1e9, "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        terminalreporter.write_line(f"written: bench/results/{name}.md, bench/results/{name}.json")
