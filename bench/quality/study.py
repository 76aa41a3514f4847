"""Running the study: whatever the cells still need, `jobs` runs at a time, each written down as it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

from cells import SEEDS, Cell
from records import Results, key_of
from tuning import NoInteriorBest, Progress, progress

# (settings, rates, seed) -> the run's record, without these three.
Runner = Callable[[dict[str, Any], dict[str, float], int], dict[str, Any]]


class CellsFailed(Exception):
    """Some cells could not be run; `failures` says why, by name."""

    def __init__(self, failures: dict[str, str]) -> None:
        self.failures = failures
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in failures.items()))


@dataclass
class Standing:
    """Where the cells stand: tuned ones with their rate, failed ones with their reason."""

    best_rates: dict[str, float] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def standing(cells: Iterable[Cell], budget: dict[str, Any], runs: dict[str, Any], failed: dict[str, str]) -> Standing:
    """Evaluate all cells against the finished runs. A cell comes after those it inherits from."""
    now = Standing(failures=dict(failed))
    for cell in cells:
        broken = [parent for parent in cell.inherited.values() if parent in now.failures]
        if broken:
            now.failures.setdefault(cell.name, f"needs the rate of {', '.join(broken)}, which failed")
        if cell.name in now.failures or any(parent not in now.best_rates for parent in cell.inherited.values()):
            continue
        try:
            where = progress(cell, budget, now.best_rates, runs)
        except NoInteriorBest as error:
            now.failures[cell.name] = str(error)
            continue
        now.progress[cell.name] = where
        if where.best is not None:
            now.best_rates[cell.name] = cell.point(where.best)
    return now


def run_study(
    cells: list[Cell],
    budget: dict[str, Any],
    results: Results,
    runner: Runner,
    executor: Executor,
    jobs: int,
    report: Callable[[str], None],
) -> None:
    """Run until every cell is complete. A cell whose run raises is given up and the others go on.

    Raises CellsFailed at the end when any cell was given up.
    """
    failed: dict[str, str] = {}
    running: dict[Future, tuple[Cell, dict[str, Any], dict[str, float], int]] = {}
    while True:
        now = standing(cells, budget, results.runs, failed)
        in_flight = {key_of(settings, rates, seed) for _cell, settings, rates, seed in running.values()}
        for cell in cells:
            where = now.progress.get(cell.name)
            if cell.name in now.failures or where is None:
                continue
            settings = cell.settings(budget)
            for exponent, seed in where.missing:
                rates = cell.rates(exponent, now.best_rates)
                key = key_of(settings, rates, seed)
                if len(running) < jobs and key not in in_flight:
                    in_flight.add(key)
                    running[executor.submit(runner, settings, rates, seed)] = (cell, settings, rates, seed)
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            cell, settings, rates, seed = running.pop(future)
            name = f"{cell.name}, {_text(rates)}, seed {seed}"
            error = future.exception()
            if error is not None:
                failed.setdefault(cell.name, f"{type(error).__name__}: {error}")
                report(f"{name}: FAILED, {failed[cell.name]}")
                continue
            record = {"cell": cell.name, "settings": settings, "rates": rates, "seed": seed, **future.result()}
            results.add(record)
            report(f"{name}: {_outcome(record)}")
    if now.failures:
        raise CellsFailed(now.failures)


def check_cells(
    cells: list[Cell], budget: dict[str, Any], runner: Runner, executor: Executor, report: Callable[[str], None]
) -> None:
    """One run of each cell at the middle of its first grid, kept nowhere. Raises CellsFailed."""
    starts = {cell.name: cell.start for cell in cells}
    futures = {
        cell.name: executor.submit(runner, cell.settings(budget), cell.rates(0, starts), SEEDS[0]) for cell in cells
    }
    failures = {}
    for name, future in futures.items():
        error = future.exception()
        if error is not None:
            failures[name] = f"{type(error).__name__}: {error}"
        report(f"{name}: {_outcome(future.result()) if error is None else 'FAILED, ' + failures[name]}")
    if failures:
        raise CellsFailed(failures)


def _text(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in rates.items())


def _outcome(record: dict[str, Any]) -> str:
    if record["outcome"] != "ok":
        return f"{record['outcome']} ({record['seconds']:.1f} s)"
    loss = record["loss"]
    return (
        f"new {loss['new_before']:.4f} -> {loss['new_after']:.4f}, old {loss['old_before']:.4f} -> "
        f"{loss['old_after']:.4f}, validation {loss['validation_after']:.4f} ({record['seconds']:.1f} s)"
    )
