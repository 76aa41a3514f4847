"""Gradient checkpointing that runs each expert forward once: the experts' outputs are saved, all else is recomputed.

Costs num_tokens * hidden_size values a layer. A plain checkpoint would move every page a third time for an output that
backward does not read (the expert layer recomputes what it needs from its inputs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

logger = logging.getLogger(__name__)


def _contexts():
    return create_selective_checkpoint_contexts([torch.ops.usaf.experts_forward.default])


def save_expert_outputs(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function like `checkpoint`, which calls torch.utils.checkpoint.checkpoint, but saving these outputs.

    use_reentrant=True, bound by the caller or given, is set to False: it would drop the gradient of a load-balancing
    loss. A context_fn of the caller's would undo the saving: ValueError.
    """
    bound = getattr(checkpoint, "keywords", {})
    if "context_fn" in bound:
        raise ValueError("context_fn: paged experts bring their own; leave it out of the checkpointing arguments")
    if bound.get("use_reentrant"):
        logger.warning("gradient checkpointing: use_reentrant=True would drop the aux loss's gradient; using False")

    def saving(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, **(kwargs | {"use_reentrant": False, "context_fn": _contexts}))

    return saving
