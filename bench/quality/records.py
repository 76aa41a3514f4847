"""The results file: one JSON line a run, appended whole; a run's settings, rates and seed are its key."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

FINGERPRINTS = ("model_fingerprint", "data_fingerprint")


def key_of(settings: dict[str, Any], rates: dict[str, float], seed: int) -> str:
    return json.dumps({"settings": settings, "rates": rates, "seed": seed}, sort_keys=True)


class Results:
    """Runs by key, backed by `path`. One writer at a time: the file is locked until `close`.

    A last line without its end (a kill while it was written) is cut off. Raises ValueError for a line that is no
    record, and when the file holds runs of another model or data than `fingerprints`.
    """

    def __init__(self, path: Path, fingerprints: dict[str, str]) -> None:
        if set(fingerprints) != set(FINGERPRINTS):
            raise ValueError(f"fingerprints: expected {FINGERPRINTS}, got {tuple(fingerprints)}")
        self.path, self.fingerprints = path, dict(fingerprints)
        self.runs: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{path} is being written by another run of the study") from error
        try:
            records, whole = read_records(path)
            for record in records:
                self._check(record)
                self.runs[key_of(record["settings"], record["rates"], record["seed"])] = record
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def _check(self, record: dict[str, Any]) -> None:
        for name in FINGERPRINTS:
            if record[name] != self.fingerprints[name]:
                raise ValueError(
                    f"{self.path} holds runs of another {name.partition('_')[0]} ({record[name][:12]}..., now "
                    f"{self.fingerprints[name][:12]}...): they cannot be compared; move the file away"
                )

    def add(self, record: dict[str, Any]) -> None:
        self._check(record)
        line = json.dumps(record, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.runs[key_of(record["settings"], record["rates"], record["seed"])] = record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All whole lines, and the bytes they take: a last line without its end is not one of them."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        missing = {"settings", "rates", "seed", "outcome", *FINGERPRINTS} - set(record)
        if missing:
            raise ValueError(f"{path}, line {number}: not a run of this study (no {', '.join(sorted(missing))})")
        records.append(record)
    return records, whole
