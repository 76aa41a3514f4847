"""What a report says of the machine and the software it was measured with."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import usaf_ext
from usaf_ext.sizes import format_size

_PACKAGES = ("torch", "transformers", "bitsandbytes", "experts4bit-qlora")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _describe(device: torch.device) -> str:
    cpu = f"{_cpu_model()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cuda":
        return cpu if device.type == "cpu" else f"{device}; {cpu}"
    gpu = torch.cuda.get_device_properties(device)
    cache = f", {gpu.L2_cache_size >> 20} MB of L2" if hasattr(gpu, "L2_cache_size") else ""
    runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    size = f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory >> 20} MiB{cache}"
    return f"{gpu.name}, {size}, {runtime}; {cpu}"


def environment(device: torch.device, command: str, copy_bytes: int, load_average: float) -> dict:
    """Head of a report. copy_bytes: of the copy that the ops are compared with. load_average: before the run."""
    return {
        "device": _describe(device),
        "versions": {
            "usaf_ext": usaf_ext.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "command": command,
        "date": datetime.date.today().isoformat(),
        "load_average_at_start": load_average,
        "copy": format_size(copy_bytes),
    }
