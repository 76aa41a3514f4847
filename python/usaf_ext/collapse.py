"""Collapse seen while it happens: the load of the latest steps, judged whenever it holds enough tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .router import CollapsedLayer, LoadTracker

logger = logging.getLogger(__name__)

# An even load must put this many tokens on each expert before a window is judged: only then is "below DEAD of the even
# load" less than one token, and an expert without tokens no accident.
MIN_TOKENS_PER_EXPERT = round(1 / LoadTracker.DEAD)


class CollapseMonitor:
    """Watches the load in windows of steps that follow each other.

    Attributes:
        collapsed: the layers that were collapsed in the latest full window.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._window = LoadTracker(num_layers, num_experts)
        self._judged = False
        self.collapsed: list[CollapsedLayer] = []

    def add_step(self, load: LoadTracker) -> bool:
        """Add one step's load. Returns whether it closed a window after which other layers are collapsed than before.

        Such a change is logged too: a warning for each layer that collapsed, an info for each that recovered.
        """
        self._window.counts += load.counts
        self._window.num_tokens += load.num_tokens
        num_experts = self._window.counts.shape[1]
        if int(self._window.counts.sum(1).min()) < MIN_TOKENS_PER_EXPERT * num_experts:
            return False
        return self._judge()

    def finish(self) -> list[CollapsedLayer]:
        """The layers collapsed at the end of a run; one too short for a full window is judged by what there is."""
        if not self._judged:
            self._judge()
        return self.collapsed

    def _judge(self) -> bool:
        before, self.collapsed, self._judged = self.collapsed, self._window.collapsed(), True
        num_layers, num_experts = self._window.counts.shape
        self._window = LoadTracker(num_layers, num_experts)
        known = {layer.layer for layer in before}
        for layer in self.collapsed:
            if layer.layer not in known:
                logger.warning(
                    "MoE layer %d collapsed: %d experts with next to no tokens, %d with more than half way from the "
                    "even share to all tokens (a load-balancing loss and a router warm-up work against it)",
                    layer.layer,
                    len(layer.dead),
                    len(layer.swamping),
                )
        for number in sorted(known - {layer.layer for layer in self.collapsed}):
            logger.info("MoE layer %d recovered: no expert is dead or swamped", number)
        return known != {layer.layer for layer in self.collapsed}

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "counts": self._window.counts.tolist(),
            "num_tokens": self._window.num_tokens,
            "judged": self._judged,
            "collapsed": as_json(self.collapsed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError for a state of other sizes."""
        counts = torch.tensor(state["counts"], dtype=torch.int64)
        if counts.shape != self._window.counts.shape:
            raise ValueError(f"state: expected counts {tuple(self._window.counts.shape)}, got {tuple(counts.shape)}")
        self._window.counts.copy_(counts)
        self._window.num_tokens, self._judged = state["num_tokens"], state["judged"]
        self.collapsed = [
            CollapsedLayer(layer["layer"], tuple(layer["dead"]), tuple(layer["swamping"]))
            for layer in state["collapsed"]
        ]


def as_json(collapsed: Sequence[CollapsedLayer]) -> list[dict[str, Any]]:
    """One object a layer: its number and the numbers of its dead and swamping experts."""
    return [{"layer": layer.layer, "dead": list(layer.dead), "swamping": list(layer.swamping)} for layer in collapsed]
