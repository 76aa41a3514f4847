"""The safetensors container: where tensors stand in a file, and writing one without holding it in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .errors import StoreError

# safetensors dtype name -> (torch dtype, bytes per element)
SAFETENSORS_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "BOOL": (torch.bool, 1),
    "U8": (torch.uint8, 1),
    "I8": (torch.int8, 1),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "I16": (torch.int16, 2),
    "U16": (torch.uint16, 2),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I32": (torch.int32, 4),
    "U32": (torch.uint32, 4),
    "F32": (torch.float32, 4),
    "I64": (torch.int64, 8),
    "U64": (torch.uint64, 8),
    "F64": (torch.float64, 8),
}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor stands: `num_bytes` at `begin` of `file` (a name in the checkpoint's folder)."""

    file: str
    dtype: str  # as safetensors names it, e.g. "BF16"
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return SAFETENSORS_DTYPES[self.dtype][0]


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], bytes]:
    """Header of a safetensors file: tensors in the order of their data, its metadata, and the raw header bytes.

    Raises StoreError naming the file when it is truncated, has holes or overlaps, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise StoreError(f"{path}: truncated, or not a safetensors file")
            raw = file.read(length)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors: dict[str, TensorInfo] = {}
        end = 0
        for key, entry in entries:
            begin, stop = entry["data_offsets"]
            numel = math.prod(entry["shape"])
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise StoreError(f"{path}: tensor {key!r} has the unsupported dtype {entry['dtype']}")
            if begin != end or stop - begin != numel * SAFETENSORS_DTYPES[entry["dtype"]][1]:
                raise StoreError(f"{path}: tensor {key!r} does not match its place in the file")
            tensors[key] = TensorInfo(
                path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, stop - begin
            )
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: damaged safetensors header ({error})") from error
    if size != 8 + length + end:
        raise StoreError(f"{path}: {size} bytes, but its header asks for {8 + length + end} (truncated?)")
    return tensors, metadata, prefix + raw


def safetensors_dtype(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises ValueError for one that it does not have."""
    for name, (known, _) in SAFETENSORS_DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"dtype: {dtype} has no safetensors name")


def write_safetensors(
    file: BinaryIO,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    chunks: Iterable[bytes | memoryview],
    metadata: dict[str, str] | None = None,
    align: int = 8,
) -> None:
    """Write a header for `tensors` (key -> (safetensors dtype, shape), in data order), then `chunks` as their data.

    The header is padded so that the data starts at a multiple of `align` bytes.

    Raises StoreError when the chunks do not add up to the tensors' size.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        begin = end
        end += math.prod(shape) * SAFETENSORS_DTYPES[dtype][1]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % align)
    file.write(struct.pack("<Q", len(raw)) + raw)
    written = sum(file.write(chunk) for chunk in chunks)
    if written != end:
        raise StoreError(f"wrote {written} bytes of tensor data, expected {end}")
