"""Which runs a cell still needs: a grid on the first seed whose best lies inside, then the other seeds at that rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cells import SEEDS, Cell
from records import key_of

FIRST_EXPONENTS = (-1, 0, 1)
MAX_POINTS = 14
STALLED = 1e9  # worse than any loss, better than a diverged run: the grid then moves to higher rates


class NoInteriorBest(Exception):
    """The grid was extended MAX_POINTS times and its best point is still at an edge."""


@dataclass(frozen=True)
class Progress:
    """exponents: grid points looked at. best: the one chosen, or None while the grid is open. missing: (exponent,
    seed) pairs to run next; empty with a best: the cell is complete."""

    exponents: tuple[int, ...]
    best: int | None
    missing: tuple[tuple[int, int], ...]


def tuning_loss(record: Mapping[str, Any]) -> float:
    """What the grid minimises: the loss on the validation text, in nats per token."""
    if record["outcome"] == "diverged":
        return math.inf
    if record["outcome"] == "stalled":
        return STALLED
    return record["loss"]["validation_after"]


def best_of(losses: Mapping[int, float]) -> int:
    """The exponent with the lowest loss. Of equals the highest (a rate too small to change anything), of diverged runs
    the lowest."""
    lowest = min(losses.values())
    equal = [exponent for exponent, loss in losses.items() if loss == lowest]
    return min(equal) if math.isinf(lowest) else max(equal)


def progress(cell: Cell, budget: dict[str, Any], best_rates: dict[str, float], runs: Mapping[str, Any]) -> Progress:
    """Where `cell` stands, given all finished runs by key. Raises NoInteriorBest."""
    settings = cell.settings(budget)

    def run(exponent: int, seed: int) -> Any:
        return runs.get(key_of(settings, cell.rates(exponent, best_rates), seed))

    exponents = list(FIRST_EXPONENTS)
    while True:
        done = {e: tuning_loss(record) for e in exponents if (record := run(e, SEEDS[0])) is not None}
        if len(done) < len(exponents):
            return Progress(tuple(exponents), None, tuple((e, SEEDS[0]) for e in exponents if e not in done))
        best = best_of(done)
        if exponents[0] < best < exponents[-1]:
            break
        if len(exponents) == MAX_POINTS:
            raise NoInteriorBest(
                f"{cell.name}: the best of {MAX_POINTS} grid points, {cell.point(best):g}, is still at the edge"
            )
        exponents = [exponents[0] - 1, *exponents] if best == exponents[0] else [*exponents, exponents[-1] + 1]
    return Progress(tuple(exponents), best, tuple((best, seed) for seed in SEEDS[1:] if run(best, seed) is None))
