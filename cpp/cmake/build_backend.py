"""scikit-build-core, plus one rule: ask for the pinned CPU torch at build time only where the environment has none."""

import pathlib
import sys

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403  the hooks of PEP 517

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from torch_info import find_torch

TORCH_PIN = "torch==2.13.0"


def _torch() -> list[str]:
    return [] if find_torch() else [TORCH_PIN]


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_torch()]
