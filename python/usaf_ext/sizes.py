"""Sizes in bytes, as people write them: `12GiB`, `500 MB`, `4096`."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power


def parse_size(text: str | int, argument: str = "size") -> int:
    """Bytes of `text`: a whole number of bytes, or a number with KiB/MiB/GiB/TiB (1024) or KB/MB/GB/TB (1000).

    Raises:
        ValueError: not such a text, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
        if not match or match.group(2).lower() not in _UNITS:
            raise ValueError(f"{argument}: expected a size such as '12GiB', '500MB' or a number of bytes, got {text!r}")
        value = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if value <= 0:
        raise ValueError(f"{argument}: expected a positive size, got {text!r}")
    return value


def format_size(num_bytes: int | float) -> str:
    """`num_bytes` for people: `1.5 GiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
