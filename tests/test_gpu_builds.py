"""The builds with GPU kernels, against the torch that is here: they link, and they import without a GPU or a driver.

Nothing runs on a GPU here; the CPU's ops do.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys

import gpu_builds
import pytest

# What a GPU build must say of itself, printed as JSON; GPUs that are there are hidden from it.
PROBE = """
import json, torch, usaf_ext
from usaf_ext import _C, ops

def ops_of(key):
    names = (str(schema.name) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("usaf::"))
    return sorted({name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)})

def refusal(*device):
    try:
        _C.open_device(*device)
    except ValueError as error:
        return str(error)

weight = torch.randn(8, 128)
decoded = ops.dequantize_blocks(*ops.quantize_blocks(weight, "int8"), 128, "int8")
print(json.dumps({
    "backend": _C.GPU_BACKEND, "cpu": ops_of("CPU"), "gpu": ops_of("CUDA"),
    "error": float((decoded - weight).abs().max()),
    "refusals": {name: refusal(name, number) for name, number in (("cuda", 0), ("hip", 0))},
    "gpus": [str(device) for device in usaf_ext.devices.gpus()],
}))
"""
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}


def need(kind: str) -> None:
    """Skip without the compilers of this build, or fail with USAF_REQUIRE_COMPILERS=1."""
    tools = ["cmake", "ninja", "hipcc" if kind == "hip" else "nvcc"]
    search = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    missing = [tool for tool in tools if shutil.which(tool, path=search) is None]
    if kind == "hip" and ctypes.util.find_library("amdhip64") is None:
        missing.append("libamdhip64")
    if missing:
        message = f"to build it takes {' and '.join(missing)}"
        if os.environ.get("USAF_REQUIRE_COMPILERS") == "1":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="module", params=gpu_builds.CHOICES)
def build(request):
    need(request.param)
    return request.param, gpu_builds.build(request.param)


@pytest.mark.slow
def test_links_and_imports_without_a_gpu(build):
    kind, package = build
    environment = {**os.environ, **HIDDEN, "PYTHONPATH": str(package)}
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment)
    assert probe.returncode == 0, probe.stderr
    said = json.loads(probe.stdout)
    assert said["backend"] == ("cuda" if kind == "cuda" else "hip")
    assert len(said["cpu"]) > 15
    assert said["gpu"] == said["cpu"]
    assert said["error"] < 0.05
    assert said["gpus"] == []
    runtime = "CUDA" if kind == "cuda" else "HIP"
    assert said["refusals"]["cuda"].startswith(f"device: expected the number of a {runtime} GPU, got 0")
    assert said["refusals"]["hip"] == "device: expected 'cpu' or 'cuda', got 'hip'"


@pytest.mark.slow
def test_needs_no_cuda_library(build):
    """The CUDA runtime is linked in, so that torch may bring another, or none."""
    kind, package = build
    (library,) = (package / "usaf_ext").glob("_C*.so")
    ldd = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[0] for line in ldd.splitlines()}
    assert not [name for name in needed if name.startswith(("libcuda", "libcudart", "libnvidia"))]
    assert any(name.startswith("libamdhip64") for name in needed) == (kind == "hip")
