"""Build the extension with GPU kernels against the torch that is here, as a package to import:

python tests/gpu_builds.py cuda|hip|hip_on_cuda [--architecture 90-real]
PYTHONPATH=build/gpu/packages/cuda python -m usaf_ext.cli info

cuda and hip are the builds that users make; hip_on_cuda compiles hip/ with nvcc (tests/hip_on_cuda). No GPU is needed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu_emulation"))
from build_device import link_package, run_tool

REPO = pathlib.Path(__file__).resolve().parents[1]
BUILD_DIR = REPO / "build" / "gpu"  # kept: the next build compiles only what changed
CHOICES = {
    "cuda": ["-DUSAF_CUDA=ON", "-DUSAF_HIP=OFF"],
    "hip": ["-DUSAF_CUDA=OFF", "-DUSAF_HIP=ON"],
    "hip_on_cuda": [],
}


def build(kind: str, architecture: str | None = None) -> pathlib.Path:
    """Build `kind` for one chip: the folder for PYTHONPATH.

    Args:
        kind: "cuda", "hip" or "hip_on_cuda". architecture: as in CMAKE_CUDA_ARCHITECTURES or USAF_HIP_ARCHITECTURES;
            90-real and gfx1030 by default.

    Raises RuntimeError with the compiler's output.
    """
    package, build_dir = BUILD_DIR / "packages" / kind, BUILD_DIR / kind
    link_package(package)
    source = REPO / "tests/hip_on_cuda" if kind == "hip_on_cuda" else REPO
    variable = "USAF_HIP_ARCHITECTURES" if kind == "hip" else "CMAKE_CUDA_ARCHITECTURES"
    chip = architecture or ("gfx1030" if kind == "hip" else "90-real")
    places = [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'usaf_ext'}", f"-DPython_EXECUTABLE={sys.executable}"]
    options = [*CHOICES[kind], f"-D{variable}={chip}", *places]
    run_tool("cmake", "-S", str(source), "-B", str(build_dir), "-G", "Ninja", *options)
    run_tool("cmake", "--build", str(build_dir), "--target", "_C")
    return package


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CHOICES)
    parser.add_argument("--architecture")
    arguments = parser.parse_args()
    print(build(arguments.kind, arguments.architecture))
