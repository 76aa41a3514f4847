"""What bench/gpu.sh found, as one JSON and one Markdown file.

python bench/gpu_report.py FOLDER    reads parts.tsv, the logs and bench.json, writes gpu.json and gpu.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tables

TAIL = 4  # lines of a part's log that say how it ended
LINES_OF_A_FAILURE = 40


def parts_of(folder: Path) -> list[dict]:
    """Name, status, seconds and the end of the log of each part, in their order."""
    parts = []
    for line in (folder / "parts.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        log = folder / f"{name}.log"
        lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()] if log.exists() else []
        kept = TAIL if status == "passed" else LINES_OF_A_FAILURE
        parts.append({"name": name, "status": status, "seconds": int(seconds), "log": lines[-kept:]})
    return parts


def report(parts: list[dict], bench: dict | None) -> str:
    lines = ["# One run of bench/gpu.sh", "", "| part | result | seconds | its last line |", "|---|---|---:|---|"]
    for part in parts:
        last = part["log"][-1].replace("|", "/")[:120] if part["log"] else ""
        lines.append(f"| {part['name']} | {part['status']} | {part['seconds']} | {last} |")
    if bench is not None:
        lines += ["", tables.markdown(bench, bench["rows"], []).rstrip()]
        lines += [f"\n{name} failed: {error}" for name, error in bench["failed"].items()]
        if bench["left_out"]:
            lines.append("\nLeft out for want of time: " + ", ".join(bench["left_out"]))
    for part in parts:
        if part["status"] != "passed" and part["log"]:
            lines += ["", f"## {part['name']}: {part['status']}", "", "```", *part["log"], "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python bench/gpu_report.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    parts = parts_of(folder)
    written = folder / "bench.json"
    bench = json.loads(written.read_text()) if written.exists() else None
    (folder / "gpu.json").write_text(json.dumps({"parts": parts, "bench": bench}, indent=1) + "\n")
    text = report(parts, bench)
    (folder / "gpu.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
