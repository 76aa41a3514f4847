"""The expert kernels' emulated libraries, built once a test session, and their cases under sanitizers."""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
import tempfile

import build_emulation
from expert_calls import Device

# HIP runs with both wave sizes: the sources are for wave32, and must be right on any.
TARGETS = {"cuda": ("expert_cuda", 32), "hip_wave32": ("expert_hip", 32), "hip_wave64": ("expert_hip", 64)}
SANITIZED_TARGETS = ("cuda", "hip_wave32")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="usaf_emulated_")


@functools.cache
def _library(target: str, sanitize: bool) -> pathlib.Path:
    name, wave_size = TARGETS[target]
    return build_emulation.build_library(pathlib.Path(_folder().name), name, sanitize=sanitize, wave_size=wave_size)


def device(target: str) -> Device:
    return Device(str(_library(target, False)))


def run_sanitized(target: str, program: str) -> subprocess.CompletedProcess[str]:
    """`program LIBRARY` under the address and undefined-behaviour sanitizers."""
    command = [sys.executable, program, str(_library(target, True))]
    environment = build_emulation.sanitizer_environment()
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
