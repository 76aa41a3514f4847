"""Launches of the emulated expert kernels from numpy arrays: the argument structs of cpp/kernel_api.h by field name."""

from __future__ import annotations

import ctypes
import pathlib
import sys
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import kernel_calls

STREAM = 0x5EED
DTYPES = {"f32": 0, "bf16": 1, "f16": 2}
SCHEDULES = (0, 1, 9)  # threads ascending, descending, shuffled


class Device:
    """An emulated library. `skew`: elements by which every array but those of `aligned` misses a multiple of 16
    bytes."""

    def __init__(self, path: str) -> None:
        self.native = ctypes.CDLL(path)
        self.native.device_malloc.restype = ctypes.c_void_p
        self.native.last_message.restype = ctypes.c_char_p
        self.native.last_stream.restype = ctypes.c_void_p
        self.native.launches.restype = ctypes.c_int64
        self.skew = 0
        self.aligned: frozenset[str] = frozenset()

    def run(self, launcher: str, **fields: Any) -> None:
        """One launch with the struct's fields. Arrays are copied to memory that ends with their last byte, and updated
        in place with what the kernels left there; the same array twice is the same memory. None is a null pointer."""
        kind = kernel_calls.args_of(launcher)
        names = [name for name, _ in kind._fields_]
        if set(names) != set(fields):
            raise TypeError(f"{launcher}: fields {sorted(set(names) ^ set(fields))} are missing or unknown")
        args, arrays, bases = kind(), {}, []
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                if id(value) not in arrays:
                    skew = 0 if name in self.aligned else self.skew * value.itemsize
                    bases.append(ctypes.c_void_p(self.native.device_malloc(ctypes.c_size_t(value.nbytes + skew))))
                    arrays[id(value)] = (value, bases[-1].value + skew)
                    ctypes.memmove(arrays[id(value)][1], value.ctypes.data, value.nbytes)
                setattr(args, name, arrays[id(value)][1])
            elif value is not None:
                setattr(args, name, value)
        try:
            stream = ctypes.c_void_p(STREAM)
            if self.native.run_launcher(launcher.encode(), ctypes.byref(args), stream) != 0:
                raise RuntimeError(self.native.last_message().decode())
            for value, address in arrays.values():
                ctypes.memmove(value.ctypes.data, address, value.nbytes)
        finally:
            for base in bases:
                self.native.device_free(base)
