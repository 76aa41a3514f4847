"""Lanes of copies and kernels over a step's time, their overlap, and a plot of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Interval = tuple[float, float]


BINS = 500  # of a panel's time axis


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals given in the order of their starts."""
    union: list[Interval] = []
    for start, end in intervals:
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        elif end > start:
            union.append((start, end))
    return union


def busy_shares(union: Sequence[Interval], end: float, num_bins: int) -> list[float]:
    """For each of `num_bins` equal parts of [0, end], the share of it that lies in `union`."""
    width = end / num_bins
    shares = [0.0] * num_bins
    for start, stop in union:
        for i in range(int(start / width), min(num_bins, int(stop / width) + 1)):
            shares[i] += max(0.0, min(stop, (i + 1) * width) - max(start, i * width)) / width
    return shares


def common_seconds(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """How long both of two unions (as of `merged`) last at the same time."""
    seconds, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        seconds += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return seconds


@dataclass(frozen=True)
class Lanes:
    """Copies and kernels of one step, each in the order of their starts, in seconds from its begin."""

    copies: list[Interval]
    kernels: list[Interval]
    turn: float  # when backward begins

    @classmethod
    def of(cls, spans: Iterable[tuple[bool, int, float, float]], begin: float, turn: float) -> Lanes:
        """Of spans as virtual_time.Schedule.spans() has them, those from `begin` on."""
        lanes: tuple[list[Interval], list[Interval]] = ([], [])
        for is_copy, _, start, end in spans:
            if start >= begin:
                lanes[is_copy].append((start - begin, end - begin))
        return cls(lanes[True], lanes[False], turn - begin)

    def overlap(self) -> float:
        """The share of the copies' time in which kernels run."""
        copies = merged(self.copies)
        return common_seconds(copies, merged(self.kernels)) / sum(end - start for start, end in copies)


def plot_steps(path: str | Path, panels: Sequence[tuple[str, Lanes]], columns: int) -> None:
    """Write a PNG with a panel for each (title, lanes): how busy the link is above, the card below, and the turn."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 1.15 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, lanes) in zip(axes.flat, panels):
        end = lanes.kernels[-1][1]
        edges = [i * end / BINS for i in range(BINS + 1)]
        for height, intervals, color in ((1.1, lanes.copies, "tab:orange"), (0.1, lanes.kernels, "tab:blue")):
            shares = busy_shares(merged(intervals), end, BINS)
            axis.stairs([height + 0.8 * share for share in shares], edges, baseline=height, fill=True, color=color)
        axis.axvline(lanes.turn, color="black", linewidth=0.8)
        axis.set_xlim(0, end)
        axis.set_ylim(0, 2)
        axis.set_yticks([0.5, 1.5], ["kernels", "copies"], fontsize="x-small")
        axis.tick_params(axis="x", labelsize="x-small")
        axis.set_title(title, fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("seconds; black: backward begins; height: share of the time", fontsize="small")
    figure.suptitle("Simulated with assumed rates (bench/timeline.py), not measured", fontsize="medium")
    figure.savefig(path, dpi=110)
