"""Build the emulated kernels with the host compiler: the real sources of cuda/ and hip/, as C++."""

from __future__ import annotations

import os
import pathlib
import subprocess

HERE = pathlib.Path(__file__).parent
REPO = HERE.parents[1]
CXX = os.environ.get("CXX", "g++")
# Alignment is checked by the undefined-behaviour sanitizer, sizes by the address sanitizer.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

EXPERT_STEMS = ("sort", "gather", "glu", "row_gradient", "router_uniform", "residual", "moments8")

_SOURCES = {
    "cuda": [HERE / "driver.cpp", HERE / "codec_driver.cpp", REPO / "cuda/codec.cu"],
    "hip": [HERE / "driver.cpp", HERE / "codec_driver.cpp", REPO / "hip/codec.hip"],
    "adam_cuda": [HERE / "driver.cpp", HERE / "adam_driver.cpp", REPO / "cuda/masked_adam.cu"],
    "adam_hip": [HERE / "driver.cpp", HERE / "adam_driver.cpp", REPO / "hip/masked_adam.hip"],
    "expert_cuda": [
        HERE / "driver.cpp",
        HERE / "expert_driver.cpp",
        *(REPO / f"cuda/{stem}.cu" for stem in EXPERT_STEMS),
    ],
    "expert_hip": [
        HERE / "driver.cpp",
        HERE / "expert_driver.cpp",
        *(REPO / f"hip/{stem}.hip" for stem in EXPERT_STEMS),
    ],
    "broken_cuda": [HERE / "broken_kernels.cpp"],
    "broken_hip": [HERE / "broken_kernels.cpp"],
}


def compile_flags(backend: str, wave_size: int = 32) -> list[str]:
    """For the kernels of "cuda" or "hip" as host C++ over the emulator."""
    flags = ["-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    flags += [f"-I{HERE}", f"-I{REPO / 'cpp'}", f"-I{REPO / backend}"]
    flags += ["-DUSAF_MAX_GRID_Y=2"]  # small grids: the kernels' row loops run too
    return [*flags, f"-DEMULATED_WAVE_SIZE={wave_size}", *(["-DEMULATE_HIP"] if backend == "hip" else [])]


def build_library(out: pathlib.Path, name: str, *, sanitize: bool = False, wave_size: int = 32) -> pathlib.Path:
    """Compile one of _SOURCES into a shared library under `out`."""
    library = out / f"{name}{wave_size}{'_sanitized' if sanitize else ''}.so"
    # Sanitized code is compiled far more slowly than it runs.
    command = [CXX, "-std=c++20", "-O0" if sanitize else "-O1", "-g1", "-fPIC", "-shared"]
    command += compile_flags(name.split("_")[-1], wave_size)
    command += SANITIZE if sanitize else []
    command += [
        "-x",
        "c++",
        *map(str, _SOURCES[name]),
        str(HERE / "emulator.cpp"),
        str(HERE / "runtime.cpp"),
        "-o",
        str(library),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return library


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs to load a sanitized library."""
    runtimes = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
