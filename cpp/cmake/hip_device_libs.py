"""A folder of device libraries in which clang finds every AMD chip it is asked for.

    python hip_device_libs.py CLANG FOLDER CHIP...

Debian's device libraries are older than its newest clang: they lack oclc_isa_version_NNNN.bc of newer chips, files that
hold one constant. FOLDER gets links to the libraries that are there, and those files, made by CLANG. For
--rocm-device-lib-path. Exits non-zero, with a message, if there are no device libraries or CLANG fails.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

# Debian 12, Debian 13, ROCm; the last of each in order of name is the newest.
_PLACES = (
    "/usr/lib/*/amdgcn/bitcode",
    "/usr/lib/clang/*/amdgcn/bitcode",
    "/usr/lib/clang/*/lib/amdgcn/bitcode",
    "/usr/lib/llvm-*/lib/clang/*/amdgcn/bitcode",
    "/usr/lib/llvm-*/lib/clang/*/lib/amdgcn/bitcode",
    "/usr/amdgcn/bitcode",
    "/opt/rocm*/amdgcn/bitcode",
)


def find_device_libs() -> pathlib.Path:
    """The installed folder of device libraries."""
    for place in _PLACES:
        for found in sorted(glob.glob(place), reverse=True):
            if os.path.exists(os.path.join(found, "ockl.bc")):
                return pathlib.Path(found)
    raise FileNotFoundError(f"no device libraries (ockl.bc) in any of {', '.join(_PLACES)}")


def isa_version(chip: str) -> int:
    """What __oclc_ISA_version is: major * 1000 + minor * 100 + stepping; the last two are hexadecimal digits."""
    match = re.fullmatch(r"gfx(\d+)([0-9a-f])([0-9a-f])", chip)
    if match is None:
        raise ValueError(f"chip: expected a name such as gfx1030, got {chip!r}")
    return int(match[1]) * 1000 + int(match[2], 16) * 100 + int(match[3], 16)


def make_folder(clang: str, folder: pathlib.Path, chips: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for library in find_device_libs().glob("*.bc"):
        link = folder / library.name
        if not link.is_symlink() and not link.exists():
            link.symlink_to(library)
    for chip in chips:
        target = folder / f"oclc_isa_version_{chip.removeprefix('gfx')}.bc"
        if target.exists():
            continue
        constant = f"constant i32 {isa_version(chip)}, align 4"
        source = f"@__oclc_ISA_version = linkonce_odr protected local_unnamed_addr addrspace(4) {constant}\n"
        command = [clang, "-x", "ir", "-", "-c", "-emit-llvm", "--target=amdgcn-amd-amdhsa", "-nogpulib"]
        command += ["-Wno-override-module", "-o", str(target)]
        subprocess.run(command, input=source, text=True, check=True)


if __name__ == "__main__":
    try:
        make_folder(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:])
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"hip_device_libs: {error}")
