"""Options, the copy that ops are measured by, and the report of a benchmark run.

    pytest bench --benchmark-enable --benchmark-only [--report NAME]        (make bench)

Cases call `pairing.paired`. With --report, bench/results/NAME.md and NAME.json are written.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path

import pytest
import tables
import torch
from environment import environment
from pairing import Copy

RESULTS = Path(__file__).parent / "results"
_COPY_BYTES = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def pytest_addoption(parser):
    parser.addoption("--report", default=None, help="write bench/results/NAME.md and NAME.json")


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of mapping new ones: otherwise the page faults of fresh results lead every
    figure, ours and the peers'. In training the results' memory is reused too."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def pytest_configure(config):
    _keep_freed_memory()


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}_thread{'s' * (n > 1)}")
def threads(request):
    """Torch threads of the case."""
    if request.param > (os.cpu_count() or 1):
        pytest.skip(f"needs {request.param} processors")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def copy() -> Copy:
    """A large tensor copy, the measure of the ops. It runs in every round: bandwidth drifts where a host is shared."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    return Copy(lambda: target.copy_(source), 2 * _COPY_BYTES)


def pytest_sessionstart(session):
    session.config.usaf_load_average = os.getloadavg()[0]


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [bench for bench in getattr(session, "benchmarks", []) if bench.stats.rounds]
    if not benchmarks:
        return
    command = "pytest " + " ".join(sys.argv[1:])
    head = environment(torch.device("cpu"), command, _COPY_BYTES, config.usaf_load_average)
    measurements = [
        tables.Measurement(bench.name.removeprefix("test_"), bench.extra_info, list(bench.stats.data))
        for bench in benchmarks
    ]
    rows = tables.rows_of(measurements)
    fits = tables.linear_fits(rows)
    text = tables.markdown(head, rows, fits)
    terminalreporter.write_line("\n" + text)
    name = config.getoption("--report")
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
        result = {**head, "rows": rows, "linear_fits": fits}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        terminalreporter.write_line(f"written: bench/results/{name}.md, bench/results/{name}.json")
