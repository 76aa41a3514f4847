"""Native code compiled for the tests, as a shared library for ctypes."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def build(sources: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL | None:
    """Compile `sources` (relative to the repository) and load the result; None without a C++ compiler.

    CXX and CXXFLAGS are honoured, so that a sanitizer can be added.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return None
    output = Path(tempfile.mkdtemp(prefix="usaf_native_")) / "native.so"
    flags = ["-std=c++20", "-fPIC", "-shared", *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    try:
        command = [*compiler, *flags, "-I", _ROOT / "cpp", *(_ROOT / source for source in sources), "-o", output]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(output))
    finally:
        shutil.rmtree(output.parent)
