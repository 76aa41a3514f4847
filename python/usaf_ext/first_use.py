"""The first use of a GPU: are its results right at all? A driver or a chip can say "done" and have written nothing."""

from __future__ import annotations

import logging
import time

import torch

from .errors import DeviceError
from .self_check import checks, run_check

logger = logging.getLogger(__name__)

# One of each op; `usaf-ext info --check` tests every format and mode.
_CHECKS = (
    "codec nf4",
    "masked_adam master nf4 fp32 moments",
    "gather, scatter, backward",
    "glu silu",
    "row gradient, importance",
    "router noise",
    "paged expert layer",
)
_tested: set[torch.device] = set()


def ensure_works(device: torch.device) -> None:
    """Compare the ops on `device` with the CPU, once a process. It takes well under a second.

    Raises DeviceError, naming the op, where a result is wrong or an op fails.
    """
    if device in _tested:
        return
    _tested.add(device)  # at once: the checks use the device in the same way
    start = time.perf_counter()
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        for check in checks():
            if check.name not in _CHECKS:
                continue
            outcome = run_check(check, device)
            if outcome.status != "pass":
                _tested.remove(device)
                raise DeviceError(
                    f"{device}: the self-test of {check.name!r} failed: {outcome.detail}. Nothing was loaded onto it; "
                    "usaf-ext info --check tests all ops"
                )
    logger.info("%s: self-test passed in %.2f s", device, time.perf_counter() - start)
