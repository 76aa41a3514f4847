"""The benchmark report: one Markdown table and one JSON, from the seconds of each round."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One case. seconds: of each round, for ours.

    info: size (text), bytes (moved, or None), threads, copy_rates (bytes/s of the copy, a round each), peers (name ->
    seconds of each round); and axis, x, peer_x of a point on an axis.
    """

    name: str
    info: dict[str, Any]
    seconds: list[float]


def _spread(values: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(values) < 2:
        return values[0], 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), high - low


def _milliseconds(median: float, iqr: float) -> str:
    digits = 2 if median >= 1 else 4
    return f"{median:.{digits}f} +- {iqr:.{digits}f} ms"


def _figures(name: str, info: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    median, iqr = _spread(seconds)
    moved, copy_rates = info.get("bytes"), info.get("copy_rates")
    share = None
    if moved and copy_rates:
        share = 100 * statistics.median(moved / duration / rate for duration, rate in zip(seconds, copy_rates))
    return {
        "case": name,
        "size": info.get("size", ""),
        "threads": info.get("threads"),
        "bytes": moved,
        "median_ms": median * 1e3,
        "iqr_ms": iqr * 1e3,
        "rounds": len(seconds),
        "gb_per_s": moved / median / 1e9 if moved else None,
        "copy_gb_per_s": statistics.median(copy_rates) / 1e9 if copy_rates else None,
        "percent_of_copy": share,
    }


def rows_of(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """A row for each measurement and, below it, one for each of its peers, with ours / peer over the paired rounds.

    Where peers are other points of an axis, info["peer_x"] says where each stands.
    """
    rows = []
    for measurement in measurements:
        name, info, ours = measurement.name, measurement.info, measurement.seconds
        row = _figures(name, info, ours)
        row.update({key: info[key] for key in ("axis", "x") if key in info})
        rows.append(row)
        for peer, seconds in info.get("peers", {}).items():
            ratio, ratio_iqr = _spread([mine / theirs for mine, theirs in zip(ours, seconds)])
            peer_row = _figures(name, info, seconds)
            if peer in info.get("peer_x", {}):
                peer_row.update(axis=info["axis"], x=info["peer_x"][peer])
            rows.append({**peer_row, "peer": peer, "ours_over_peer": ratio, "ours_over_peer_iqr": ratio_iqr})
    return rows


def linear_fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each axis, the affine least-squares fit of the time over x, and how far the worst point is above it."""
    fits = []
    for axis in dict.fromkeys(row["axis"] for row in rows if "axis" in row):
        points = [(row["x"], row["median_ms"]) for row in rows if row.get("axis") == axis]
        if len(points) < 3:
            continue
        slope, intercept = statistics.linear_regression(*zip(*points))
        above = max((y / (intercept + slope * x) - 1, x) for x, y in points)
        fits.append(
            {
                "axis": axis,
                "points": points,
                "ms_per_unit": slope,
                "ms_at_zero": intercept,
                "worst_percent_above_fit": 100 * above[0],
                "worst_x": above[1],
            }
        )
    return fits


def markdown(environment: dict[str, Any], rows: list[dict], fits: list[dict]) -> str:
    lines = [
        f"Device: {environment['device']}  ",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in environment["versions"].items()) + "  ",
        f"Command: `{environment['command']}`  ",
        f"Date: {environment['date']}, load average at start {environment['load_average_at_start']:.2f}  ",
        "Each row: median over the rounds +- interquartile range. A peer ran in the same rounds, on the same inputs; "
        "`ours / peer` is the median of the rounds' ratios. So is `% of copy`: a copy of "
        f"{environment['copy']}, read + written, ran in the same rounds too, at `copy` GB/s.  ",
        "",
        "| case | size | bytes | time | GB/s | copy | % of copy | ours / peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name, size = (f"- *{row['peer']}*", "") if "peer" in row else (row["case"], row["size"])
        moved = f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] and not row.get("peer") else ""
        rate = f"{row['gb_per_s']:.1f}" if row["gb_per_s"] else ""
        share = f"{row['percent_of_copy']:.0f}%" if row["percent_of_copy"] else ""
        copy = f"{row['copy_gb_per_s']:.1f}" if row["copy_gb_per_s"] and "peer" not in row else ""
        ratio = f"{row['ours_over_peer']:.2f} +- {row['ours_over_peer_iqr']:.2f}" if "peer" in row else ""
        timing = _milliseconds(row["median_ms"], row["iqr_ms"])
        lines.append(f"| {name} | {size} | {moved} | {timing} | {rate} | {copy} | {share} | {ratio} |")
    if fits:
        lines += [
            "",
            "Affine fits of the time:",
            "",
            "| over | ms at zero | ms a unit | worst point above the fit |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {fit['axis']} | {fit['ms_at_zero']:.1f} | {fit['ms_per_unit']:.4g} | "
            f"{fit['worst_percent_above_fit']:+.1f}% (at {fit['worst_x']}) |"
            for fit in fits
        ]
    return "\n".join(lines) + "\n"
