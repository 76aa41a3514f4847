"""Host memory that pages are copied from, registered with a GPU: copies run at full speed and beside computing."""

from __future__ import annotations

import logging
import weakref

import torch

from . import _C
from .devices import open_device
from .sizes import format_size
from .store import ExpertStore

logger = logging.getLogger(__name__)

_stores: weakref.WeakKeyDictionary[ExpertStore, set[torch.device]] = weakref.WeakKeyDictionary()


def register_store(store: ExpertStore, device: torch.device) -> None:
    """Register the memory of a sealed store in memory with a GPU, once for the two of them, and log what came of it.

    What cannot be registered stays pageable, which works too, but slower: a warning says how much and what to do.
    """
    known = _stores.setdefault(store, set())
    if device in known:
        return
    registered, failure = store.native.register_with(open_device(device))
    known.add(device)
    _report("experts", store.bytes, registered, failure, device)


def report_buffers(pager: _C.ExpertPager, num_bytes: int, device: torch.device) -> None:
    """Log what came of registering the host buffers of a store on disk, which the pager does by itself."""
    if pager.registered_buffers is not None:
        _report("host buffers", num_bytes, *pager.registered_buffers, device)


def _report(what: str, num_bytes: int, registered: int, failure: str, device: torch.device) -> None:
    if not failure:
        logger.info("%s of %s registered with %s", format_size(registered), what, device)
        return
    logger.warning(
        "%s of the %s of %s could not be registered with %s and stay pageable (%s): copies from them are slower and do "
        "not overlap computing. Raise the limit of locked memory (ulimit -l unlimited; in a container --ulimit "
        "memlock=-1) or free host memory, and load again",
        *(format_size(num_bytes - registered), format_size(num_bytes), what, device, failure),
    )
