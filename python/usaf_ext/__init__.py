"""Fine-tune Mixture-of-Experts language models on small GPUs.

Experts stay quantised in host memory and are paged through a bounded device buffer; a chosen part of the original
expert weights and the router are trained. Start with `UsafConfig` (transformers) or `PagedExperts` (anything else).
"""

from __future__ import annotations

import importlib

import torch

from . import _C
from .errors import BudgetError, DeviceError, StoreError, UsafError

_BUILT = _C.TORCH_VERSION.split("+")[0].rsplit(".", 1)[0]
_FOUND = torch.__version__.split("+")[0].rsplit(".", 1)[0]
if _BUILT != _FOUND:
    raise ImportError(
        f"usaf_ext was built for torch {_C.TORCH_VERSION} and found {torch.__version__}; build it again with this one: "
        "pip install --force-reinstall --no-deps --no-build-isolation ."
    )

from . import ops  # noqa: E402
from .experts import PagedExperts, PagedLayer, expert_memory, expert_store, paged_layers  # noqa: E402
from .memory import ExpertMemory  # noqa: E402
from .store import ExpertStore  # noqa: E402

__version__ = "0.1.0"

# Loaded on first use: they import transformers, which takes seconds.
_LAZY = {
    "UsafConfig": ".integrations.transformers",
    "MaskedAdam": ".optimizer",
    "RowBank": ".bank",
    "ModelSource": ".checkpoint_source",
    "TrainConfig": ".training",
    "train": ".training",
}

__all__ = [
    "BudgetError",
    "DeviceError",
    "ExpertMemory",
    "ExpertStore",
    "PagedExperts",
    "PagedLayer",
    "StoreError",
    "UsafError",
    "expert_memory",
    "expert_store",
    "ops",
    "paged_layers",
    *sorted(_LAZY),
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
