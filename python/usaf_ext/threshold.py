"""The dynamic activation threshold over a training run: which counts decide, and how often it struck."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .experts import PagedLayer

THRESHOLD_SCOPES = ("step", "forward")


class ActivationThreshold:
    """Sets the threshold of every layer (`PagedLayer.set_threshold`): an expert with fewer tokens than alpha times the
    mean over its layer's experts gets no weight gradient, while gradients of inputs and routers flow.

    scope "step": the counts of the previous optimiser step decide, all its micro-batches summed, so that the result
    does not depend on how a step is cut into micro-batches; in the first step no expert is left out. "forward": each
    micro-batch's own counts decide.

    Attributes:
        counts: int64 [num_layers, num_experts] on the CPU: the previous step's, in scope "step" part of a run's state.
    """

    def __init__(self, layers: Sequence[PagedLayer], alpha: float, scope: str) -> None:
        if scope not in THRESHOLD_SCOPES:
            raise ValueError(f"scope: expected one of {THRESHOLD_SCOPES}, got {scope!r}")
        self._layers = list(layers)
        self.counts = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.int64)
        for layer, counts in zip(layers, self.counts):
            layer.set_threshold(alpha, counts if scope == "step" else None)
        self._masked_before = self._num_masked()

    def end_step(self, counts: torch.Tensor) -> int:
        """Take note of a step's tokens per expert, int64 [num_layers, num_experts].

        Returns how often in the step an expert with tokens in a micro-batch was left out, over all layers.
        """
        self.counts.copy_(counts)
        before, self._masked_before = self._masked_before, self._num_masked()
        return self._masked_before - before

    def _num_masked(self) -> int:
        return sum(layer.num_masked for layer in self._layers)
