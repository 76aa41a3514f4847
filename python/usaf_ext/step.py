"""One optimiser step's forward and backward over its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .experts import PagedLayer
from .loss import causal_lm_loss
from .router import LoadTracker, load_balancing_loss, record_routers


@dataclass
class StepLosses:
    """Sums over the micro-batches of a step: 0-dim float32 on the model's device, detached.

    Attributes:
        loss: mean next-token loss in nats over the step's targets.
        aux_loss: mean load-balancing loss of the micro-batches (without its coefficient); 0 where it is off.
    """

    loss: torch.Tensor
    aux_loss: torch.Tensor


def run_micro_batches(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    layers: Sequence[PagedLayer],
    balanced_routers: Mapping[str, nn.Module],
    aux_loss_coef: float,
    trackers: Sequence[LoadTracker],
) -> StepLosses:
    """Forward and backward of each micro-batch in turn; gradients are added to the banks, anchors and routers.

    batches: int64 [batch_size, seq_len] each. balanced_routers: those under the load-balancing loss, none for no such
    loss. trackers: each is given every micro-batch's tokens per expert.
    """
    num_targets = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    loss_sum = torch.zeros((), device=batches[0].device)
    aux_sum = torch.zeros((), device=batches[0].device)
    for input_ids in batches:
        with record_routers(balanced_routers) as routed:
            total, _count = causal_lm_loss(model, input_ids)
        for tracker in trackers:
            tracker.add([layer.token_counts for layer in layers], input_ids.numel())
        loss = total / num_targets
        loss_sum += loss.detach()
        if balanced_routers:
            aux = load_balancing_loss(routed.logits, routed.index) / len(batches)
            aux_sum += aux.detach()
            loss = loss + aux_loss_coef * aux
        loss.backward()
    return StepLosses(loss_sum, aux_sum)
