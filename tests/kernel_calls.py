"""Kernel launches from Python: the argument structs of cpp/kernel_api.h as ctypes, read from the header itself, and a
runner that executes one launch in another process (tests/aarch64/op_runner.cpp)."""

from __future__ import annotations

import ctypes
import pathlib
import re
import struct
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np

REPO = pathlib.Path(__file__).resolve().parents[1]
_SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}


def _parse_structs(header: str) -> dict[str, type[ctypes.Structure]]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.S)
    enums = dict.fromkeys(re.findall(r"enum class (\w+) : int32_t", text), ctypes.c_int32)
    types = {**_SCALARS, **enums, "Format": ctypes.c_int32, "AdamMode": ctypes.c_int32}  # of cpp/numerics
    structs = {}
    for name, body in re.findall(r"struct (\w+Args) \{(.*?)\n\};", text, flags=re.S):
        fields: list[tuple[str, Any]] = []
        for declaration in body.split(";"):
            words = declaration.replace("const ", "").split(None, 1)
            if not words:
                continue
            kind, names = words
            for field in names.split(","):
                pointer = kind.endswith("*") or field.strip().startswith("*")
                fields.append((field.strip(" *\n"), ctypes.c_void_p if pointer else types[kind]))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


STRUCTS = _parse_structs((REPO / "cpp/kernel_api.h").read_text())


def args_of(launcher: str) -> type[ctypes.Structure]:
    """The argument struct of a launcher of cpp/kernel_launchers.inc."""
    if launcher.endswith("_residual"):
        return STRUCTS["ResidualArgs"]
    return STRUCTS["".join(word.capitalize() for word in launcher.split("_")) + "Args"]


def run_call(command: Sequence[str], path: pathlib.Path, launcher: str, **fields: Any) -> None:
    """Execute `launcher` by `command` (a built op_runner, perhaps behind qemu) with the given struct fields.

    Arrays are passed by pointer and updated in place with what the kernel left in them; None is a null pointer. Every
    field of the struct must be given. Raises RuntimeError with the runner's message if it fails.
    """
    kind = args_of(launcher)
    names = [name for name, _ in kind._fields_]
    if set(names) != set(fields):
        raise TypeError(f"{launcher}: fields {sorted(set(names) ^ set(fields))} are missing or unknown")
    args, pointers, buffers = kind(), [], []
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            pointers.append((getattr(kind, name).offset, len(buffers)))
            buffers.append(value)
        elif value is not None:
            setattr(args, name, value)
    sizes = struct.pack("<3q", ctypes.sizeof(kind), len(buffers), len(pointers))
    parts = [launcher.encode().ljust(32, b"\0"), sizes, bytes(args)]
    parts += [struct.pack("<2q", *pointer) for pointer in pointers]
    for buffer in buffers:
        parts += [struct.pack("<q", buffer.nbytes), buffer.tobytes()]
    path.write_bytes(b"".join(parts))
    result = subprocess.run([*command, str(path)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{launcher}: exit code {result.returncode}: {result.stderr}")
    content = path.read_bytes()
    position = sum(map(len, parts[: 3 + len(pointers)]))
    for buffer in buffers:
        position += 8
        buffer.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8, buffer.nbytes, position)
        position += buffer.nbytes
