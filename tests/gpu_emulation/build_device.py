"""Build the extension with emulated GPU kernels and the torch device that they run on, as a package to import:

python tests/gpu_emulation/build_device.py [cuda|hip]
PYTHONPATH=build/emulated/packages/cuda python -m pytest tests/test_ops_codec.py
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

from build_emulation import HERE, REPO, compile_flags

BUILD_DIR = REPO / "build" / "emulated"  # kept: the next build compiles only what changed
BACKENDS = ("cuda", "hip")


def missing_tools() -> list[str]:
    """What the build needs and this machine lacks."""
    scripts = ("cmake", "ninja")
    found = {path.name for folder in _search_path() for path in pathlib.Path(folder).glob("*") if path.name in scripts}
    return [tool for tool in scripts if tool not in found]


def _search_path() -> list[str]:
    return [str(pathlib.Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]


def run_tool(*command: str) -> None:
    environment = {**os.environ, "PATH": os.pathsep.join(_search_path())}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}")


def _link(link: pathlib.Path, target: pathlib.Path) -> None:
    if not link.is_symlink() or link.readlink() != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target)


# An editable install of the package comes before PYTHONPATH. Python imports this by its name when it starts.
SITE_CUSTOMIZE = """import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
"""


def link_package(folder: pathlib.Path) -> None:
    """The Python sources in folder/usaf_ext, where another `_C` is to stand beside them; found on PYTHONPATH."""
    package = folder / "usaf_ext"
    package.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    sources = [path for path in (REPO / "python/usaf_ext").iterdir() if path.suffix != ".so" and path.name[:2] != "__"]
    sources.append(REPO / "python/usaf_ext/__init__.py")
    for stale in package.iterdir():
        if stale.is_symlink() and not stale.exists():
            stale.unlink()
    for source in sources:
        _link(package / source.name, source)


def _add_device(folder: pathlib.Path) -> None:
    """The device's module, with its entry point."""
    _link(folder / "fake_gpu.py", HERE / "torch_device/fake_gpu.py")
    metadata = folder / "fake_gpu-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake_gpu\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nfake_gpu = fake_gpu:register\n")


def build(backend: str = "cuda", build_dir: pathlib.Path = BUILD_DIR) -> pathlib.Path:
    """Build for the sources of `backend`; the folder for PYTHONPATH. Raises RuntimeError with the compiler's output."""
    packages = build_dir / "packages"
    link_package(packages / backend)
    _add_device(packages / backend)
    flags = [f"-DUSAF_EMULATION_FLAGS_{name}={';'.join(['-O1', *compile_flags(name)])}" for name in BACKENDS]
    places = [f"-DUSAF_ROOT={REPO}", f"-DUSAF_PACKAGE_DIR={packages}", f"-DPython_EXECUTABLE={sys.executable}"]
    run_tool("cmake", "-S", str(HERE / "torch_device"), "-B", str(build_dir), "-G", "Ninja", *places, *flags)
    run_tool("cmake", "--build", str(build_dir), "--target", f"usaf_{backend}")
    return packages / backend


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", choices=BACKENDS, default="cuda")
    print(build(parser.parse_args().backend))
