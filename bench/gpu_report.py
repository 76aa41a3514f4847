"""The report of bench/gpu.sh: python bench/gpu_report.py WORK_DIR OUT_DIR

Reads WORK_DIR/parts.tsv (name, status, seconds, last line), *.log and, where the benchmarks ran, bench.json. Writes
OUT_DIR/gpu.json, gpu.md and gpu.log. Exit code 0 if all parts passed, else 1.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from tables import markdown

PASSED = "passed"
LOG_BYTES = 2 << 20  # of a log's end
SORT_NOTE = "`sort` moves so little that all of it stays in a large L2: its share of a copy is none of the memory's."

# Peers that figures are judged by, as the cases name them.
COPY, BARE_COPIES = "copy", "bare asynchronous copies"
RESIDENT, SWEEPS = "all pages resident", "copies of two sweeps alone"
CHECK = "the check for finite values alone"

# What is aimed at on a GPU: cases; COPY: at least this percent of the copy's bandwidth, else a peer: at most this
# multiple of its time.
AIMS = (
    (r"(encode|decode)_(nf4|nf4_f16|int8|fp8)_", COPY, 90.0),
    (r"gather|scatter|adam_", COPY, 85.0),
    (r"copies", BARE_COPIES, 1 / 0.95),
    (r"step\[", RESIDENT, 1.05),  # the pager's stall; only of a step whose compute exceeds its copies
)

Rows = list[dict[str, Any]]


def _times(rows: Rows) -> dict[tuple[str, str], float]:
    """Milliseconds of a case ("" for ours) and peer."""
    return {(row["case"], row.get("peer", "")): row["median_ms"] for row in rows}


def judge(rows: Rows) -> list[dict[str, Any]]:
    """Each figure that has an aim, beside it."""
    judged, times = [], _times(rows)
    for row in rows:
        for cases, against, aim in AIMS:
            if not re.match(cases, row["case"]) or row.get("peer", COPY) != against:
                continue
            if against == RESIDENT and row["median_ms"] <= times.get((row["case"], SWEEPS), math.inf):
                continue
            figure = row["percent_of_copy"] if against == COPY else row["ours_over_peer"]
            met = figure >= aim if against == COPY else figure <= aim
            judged.append({"case": row["case"], "against": against, "aim": aim, "figure": figure, "met": met})
    return judged


def _stalls(rows: Rows) -> list[str]:
    """How long each step waits for pages, and whether that is judged."""
    lines, times = [], _times(rows)
    for row in rows:
        case = row["case"]
        if row.get("peer") != RESIDENT or (case, SWEEPS) not in times:
            continue
        compute, copies = row["median_ms"], times[case, SWEEPS]
        verdict = "judged" if compute > copies else "not judged, its copies take longer"
        lines.append(
            f"- pager stall: {case}, {100 * (row['ours_over_peer'] - 1):+.1f}% (its time over that with {RESIDENT}, "
            f"less 1; the pager's own count is of the host, not of the GPU): compute {compute:.2f} ms, copies "
            f"{copies:.2f} ms: {verdict}"
        )
    return lines


def _encodes(rows: Rows) -> list[str]:
    """Every encode with the check of its scales, for which the host waits, and without."""
    lines, times = [], _times(rows)
    for row in rows:
        check = times.get((row["case"], CHECK))
        if "peer" in row or check is None or not row["percent_of_copy"] or check >= row["median_ms"]:
            continue
        kernel = row["percent_of_copy"] * row["median_ms"] / (row["median_ms"] - check)
        lines.append(
            f"- {row['case']}: {row['percent_of_copy']:.0f}% of the copy, the check for finite values (a pass over the "
            f"scales, and the host waits for it) included; {kernel:.0f}% less the time of that check alone"
        )
    return lines


def read_parts(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(errors="replace").strip("\n").split("\n") if path.exists() else []
    keys = ("name", "status", "seconds", "last_line")
    parts: list[dict[str, Any]] = [dict(zip(keys, line.split("\t"))) for line in lines]
    return [{**part, "seconds": int(part["seconds"])} for part in parts]


def _benchmarks(figures: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Judged aims, and lines of Markdown."""
    rows = figures["rows"]
    aims = judge(rows)
    missed = [aim for aim in aims if not aim["met"]]
    lines = [f"Aims: {len(aims) - len(missed)} of {len(aims)} met.", ""]
    for aim in missed:
        unit = "%" if aim["against"] == COPY else " x"
        lines.append(
            f"- missed: {aim['case']}, {aim['figure']:.3g}{unit} of {aim['against']}; aim {aim['aim']:.3g}{unit}"
        )
    lines += [f"- failed: {name}: {error}" for name, error in figures["failed"].items()]
    if figures["running"]:
        lines.append(f"- out of time within: {figures['running']}")
    if figures["left_out"]:
        lines.append(f"- no time for: {', '.join(figures['left_out'])}")
    lines += [*_stalls(rows), *_encodes(rows)]
    if any(row["case"] == "sort" for row in rows):
        lines.append(f"- {SORT_NOTE}")
    return aims, [*lines, "", markdown(figures, rows, [])]


def report(work: Path) -> tuple[dict[str, Any], str]:
    """The JSON and the Markdown."""
    parts = read_parts(work / "parts.tsv")
    result: dict[str, Any] = {"parts": parts}
    lines = ["| part | | seconds | |", "|---|---|---:|---|"]
    lines += [
        f"| {part['name']} | {part['status']} | {part['seconds']} | {part['last_line'].replace('|', '/')} |"
        for part in parts
    ]
    bench = work / "bench.json"
    if not bench.exists():
        return result, "\n".join([*lines, "", "No benchmarks ran.", ""])
    try:
        figures = json.loads(bench.read_text())
        aims, benchmarks = _benchmarks(figures)
    except Exception as error:  # the parts are worth having without
        text = bench.read_text(errors="replace")
        result["broken_bench_json"] = text
        return result, "\n".join(
            [*lines, "", f"bench.json cannot be read ({type(error).__name__}: {error}):", "", text, ""]
        )
    return result | {**figures, "aims": aims}, "\n".join([*lines, "", *benchmarks])


def _write(path: Path, text: str) -> None:
    """At once: what stood there before, or all of this."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _logs(work: Path) -> str:
    texts = []
    for path in sorted(work.glob("*.log")):
        content = path.read_bytes()
        texts.append(f"==== {path.stem}\n{content[-LOG_BYTES:].decode(errors='replace').rstrip()}\n")
    return "".join(texts)


def main(work: Path, out: Path) -> int:
    _write(out / "gpu.log", _logs(work))
    result, text = report(work)
    _write(out / "gpu.json", json.dumps(result, indent=1) + "\n")
    _write(out / "gpu.md", text)
    print(text)
    return 0 if result["parts"] and all(part["status"] == PASSED for part in result["parts"]) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
