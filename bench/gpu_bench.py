"""All of gpu_measure.py, whatever a kernel does: a process of it that a case brings down is followed by another.

    python bench/gpu_bench.py --out FOLDER [--seconds 240] [what else gpu_measure.py takes]

Writes FOLDER/bench.json after each case. Used by bench/gpu.sh, which makes the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BROKEN = 3  # exit code of a process whose device answers no more
MEASURE = Path(__file__).with_name("gpu_measure.py")


def read(out: Path) -> dict[str, Any]:
    """What bench.json holds; nothing, if there is none."""
    path = out / "bench.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(out: Path, result: dict[str, Any]) -> None:
    """At once: whoever reads it finds the one before or this one, whole."""
    part = out / "bench.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, out / "bench.json")


def measure_all(out: Path, seconds: float, arguments: list[str], measure: Path = MEASURE) -> int:
    """The exit code of the last process. One that ends within a case has failed in it."""
    begin = time.monotonic()
    (out / "bench.json").unlink(missing_ok=True)
    while True:
        left = f"--seconds={seconds - (time.monotonic() - begin):.1f}"
        code = subprocess.call([sys.executable, str(measure), f"--out={out}", left, *arguments])
        result = read(out)
        case = result.get("running")
        if case:
            result["failed"][case] = f"ended the process (exit code {code})"
            write(out, {**result, "running": None})
        elif code != BROKEN:
            return code
        print(f"gpu_bench: exit code {code}{f' within {case}' if case else ''}; the rest in a new process", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an existing folder")
    parser.add_argument("--seconds", type=float, default=240, help="no case begins after that")
    arguments, others = parser.parse_known_args()
    return measure_all(arguments.out, arguments.seconds, others)


if __name__ == "__main__":
    sys.exit(main())
