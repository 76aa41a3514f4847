"""The study of the choices that the GPU kernels must carry: loss beside bytes, over three seeds.

    python bench/quality/core.py run [--jobs 2] [--only CELL ...]    runs what is missing; a second call resumes
    python bench/quality/core.py table                               writes bench/results/quality_core.md and .png
    python bench/quality/core.py check [--steps 3] [--only CELL ...] each cell once, briefly, nothing written
    python bench/quality/core.py cells                               names the cells

Each run is one line of bench/results/quality_core.jsonl. See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cells import BUDGET, CELLS, Cell, with_inherited
from records import Results
from study import CellsFailed, check_cells, run_study

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "quality_core.jsonl"


def commit() -> str:
    """HEAD's hash, with "-dirty" when tracked files other than results differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker() -> None:
    # A worker whose parent was killed would wait for ever, and hold whatever it inherited.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()


def _pool(jobs: int) -> ProcessPoolExecutor:
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they load torch
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker)


def with_pool(jobs: int, work: Callable[[ProcessPoolExecutor], None]) -> None:
    """Give `work` a pool of workers. An interrupt ends the process at once, whatever the workers do."""
    with _pool(jobs) as pool:
        try:
            work(pool)
        except KeyboardInterrupt:
            # Waiting for workers that were interrupted too can take for ever; they end with this process, and every
            # finished run is on disk.
            print("interrupted; call again to go on", file=sys.stderr, flush=True)
            os._exit(130)


class Recorder:
    """`runs.perform` with where and on what it ran, for a worker process."""

    def __init__(self, jobs: int) -> None:
        self.environment = {
            "commit": commit(),
            "device": f"cpu: {platform.machine()}, 1 thread, {jobs} runs at a time",
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
        }

    def __call__(self, settings: dict[str, Any], rates: dict[str, float], seed: int) -> dict[str, Any]:
        from material import fingerprints
        from runs import perform
        from torch.backends.cpu import get_cpu_capability
        from usaf_ext import __version__

        record = perform(settings, rates, seed)
        return {
            **record,
            **fingerprints(settings["config"]["seq_len"]),
            "commit": self.environment["commit"],
            "versions": {"usaf_ext": __version__, **self.environment["versions"]},
            "date": datetime.date.today().isoformat(),
            "device": f"{self.environment['device']}, {get_cpu_capability()}",
        }


def _report(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing")
    check = commands.add_parser("check", help="run each cell once, briefly")
    table = commands.add_parser("table", help="write the table and the plot")
    commands.add_parser("cells", help="name the cells")
    for command in (run, check):
        command.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
        command.add_argument("--only", nargs="+", metavar="CELL", help="these cells, and those they start from")
    check.add_argument("--steps", type=int, default=3, help="steps of each run (default: 3)")
    for command in (run, table):
        command.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.command in ("run", "check") and arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    return arguments


def main() -> int:
    arguments = _parse()
    if arguments.command == "cells":
        for cell in CELLS:
            print(f"{cell.name:28} {cell.description}")
        return 0
    if arguments.command == "table":
        from report import write_report

        for path in write_report(arguments.results):
            print(f"written: {path}")
        return 0
    cells: list[Cell] = list(CELLS) if arguments.only is None else with_inherited(arguments.only)
    started = time.perf_counter()

    def work(pool: ProcessPoolExecutor) -> None:
        runner = Recorder(arguments.jobs)
        if arguments.command == "check":
            check_cells(cells, {**BUDGET, "steps": arguments.steps}, runner, pool, _report)
            return
        from material import fingerprints

        with Results(arguments.results, fingerprints(BUDGET["seq_len"])) as results:
            run_study(cells, BUDGET, results, runner, pool, arguments.jobs, _report)

    try:
        with_pool(arguments.jobs, work)
    except CellsFailed as error:
        for name, reason in error.failures.items():
            print(f"FAILED {name}: {reason}", file=sys.stderr)
        return 1
    _report(f"done in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
