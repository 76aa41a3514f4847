"""The report of bench/gpu.sh: python bench/gpu_report.py WORK_DIR OUT_DIR

Reads WORK_DIR/parts.tsv (name, status, seconds, last line), *.log and, where the benchmarks ran, bench.json. Writes
OUT_DIR/gpu.json, gpu.md and gpu.log. Exit code 0 if all parts passed, else 1.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tables import markdown

PASSED = "passed"
LOG_LINES = 400  # of a part's end

# What is aimed at on a GPU: cases; "copy": at least this percent of the copy's bandwidth, else a peer: at most this
# multiple of its time.
AIMS = (
    (r"(encode|decode)_(nf4|nf4_f16|int8|fp8)_", "copy", 90.0),
    (r"gather|scatter|adam_", "copy", 85.0),
    (r"copies", "bare asynchronous copies", 1 / 0.95),
    (r"step\[", "all pages resident", 1.05),  # where its compute exceeds its copies
)


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure that has an aim, beside it."""
    judged = []
    for row in rows:
        for cases, against, aim in AIMS:
            if not re.match(cases, row["case"]) or row.get("peer", "copy") != against:
                continue
            figure = row["percent_of_copy"] if against == "copy" else row["ours_over_peer"]
            met = figure >= aim if against == "copy" else figure <= aim
            judged.append({"case": row["case"], "against": against, "aim": aim, "figure": figure, "met": met})
    return judged


def read_parts(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    keys = ("name", "status", "seconds", "last_line")
    parts: list[dict[str, Any]] = [dict(zip(keys, line.split("\t"))) for line in lines]
    return [{**part, "seconds": int(part["seconds"])} for part in parts]


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
    figures = json.loads(bench.read_text())
    aims = judge(figures["rows"])
    result |= {**figures, "aims": aims}
    missed = [aim for aim in aims if not aim["met"]]
    lines += ["", f"Aims: {len(aims) - len(missed)} of {len(aims)} met.", ""]
    for aim in missed:
        unit = "%" if aim["against"] == "copy" else " x"
        lines.append(
            f"- missed: {aim['case']}, {aim['figure']:.3g}{unit} of {aim['against']}; aim {aim['aim']:.3g}{unit}"
        )
    lines += [f"- failed: {name}: {error}" for name, error in figures["failed"].items()]
    if figures["left_out"]:
        lines.append(f"- no time for: {', '.join(figures['left_out'])}")
    return result, "\n".join([*lines, "", markdown(figures, figures["rows"], [])])


def main(work: Path, out: Path) -> int:
    result, text = report(work)
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gpu.md").write_text(text)
    with (out / "gpu.log").open("w") as log:
        for path in sorted(work.glob("*.log")):
            log.write(f"==== {path.stem}\n")
            log.writelines(line + "\n" for line in path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    print(text)
    return 0 if result["parts"] and all(part["status"] == PASSED for part in result["parts"]) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
