"""One optimiser step's forward and backward over its micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .experts import PagedLayer
from .gumbel import GumbelNoise
from .layer_major import MicroBatchThreads
from .loss import causal_lm_loss
from .rng import States, rng_states, seed_generators, set_rng_states
from .router import LoadTracker, load_balancing_loss, record_routers

ACCUMULATION_ORDERS = ("micro_batch", "layer")


@dataclass
class StepLosses:
    """Sums over the micro-batches of a step: 0-dim float32 on the model's device, detached.

    Attributes:
        loss: mean next-token loss in nats over the step's targets.
        aux_loss: mean load-balancing loss of the micro-batches (without its coefficient); 0 where it is off.
    """

    loss: torch.Tensor
    aux_loss: torch.Tensor


class _RandomStreams:
    """A stream of torch's random numbers (dropout, jitter) for each micro-batch: the same ones in any order of running.

    The seeds are drawn from the global generator, once a step.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._seeds = torch.randint(2**62, (count,)).tolist()
        self._states: list[States | None] = [None] * count

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        outside, state = rng_states(self._device), self._states[number]
        if state is None:
            seed_generators(self._seeds[number], self._device)
        else:
            set_rng_states(state, self._device)
        try:
            yield
        finally:
            self._states[number] = rng_states(self._device)
            set_rng_states(outside, self._device)


def run_micro_batches(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    layers: Sequence[PagedLayer],
    balanced_routers: Mapping[str, nn.Module],
    aux_loss_coef: float,
    trackers: Sequence[LoadTracker],
    *,
    threads: MicroBatchThreads | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    gumbel: GumbelNoise | None = None,
    after_backward: Callable[[int], None] = lambda handle: None,
) -> StepLosses:
    """Forward and backward of all micro-batches; gradients are added to the banks, anchors and routers.

    One after another, or, with `threads`, layer by layer: a page then moves once up and once down for all of them, and
    activations are held for all of them (usaf_ext.layer_major). Both orders give the same bits.

    Args:
        batches: int64 [batch_size, seq_len] each.
        balanced_routers: those under the load-balancing loss, none for no such loss.
        trackers: each is given every micro-batch's tokens per expert.
        scale: from a loss to what backward starts from (loss scaling).
        gumbel: told which micro-batch runs.
        after_backward: with `threads` only: called with a layer's handle once all its gradients are in its bank.
    """
    num_targets = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)

    def run(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with record_routers(balanced_routers) as routed:
            total, _count = causal_lm_loss(model, input_ids)
        loss, aux = total / num_targets, torch.zeros((), device=input_ids.device)
        objective = loss
        if balanced_routers:
            aux = load_balancing_loss(routed.logits, routed.index) / len(batches)
            objective = loss + aux_loss_coef * aux
        scale(objective).backward()
        return loss.detach(), aux.detach()

    random_streams = _RandomStreams(len(batches), batches[0].device)

    @contextlib.contextmanager
    def while_running(number: int) -> Iterator[None]:
        with random_streams.of(number):
            if gumbel is not None:
                gumbel.micro_batch = number
            yield

    def count_tokens(num_tokens: int) -> None:
        for tracker in trackers:
            tracker.add([layer.token_counts for layer in layers], num_tokens)

    losses = []
    if threads is not None:
        bodies = [partial(run, input_ids) for input_ids in batches]
        losses = threads.run(bodies, batches[0].device, while_running, after_backward)
        count_tokens(sum(batch.numel() for batch in batches))
    else:
        for number, input_ids in enumerate(batches):
            with while_running(number):
                losses.append(run(input_ids))
            count_tokens(input_ids.numel())
    loss_sum, aux_sum = (torch.zeros((), device=batches[0].device) for _ in range(2))
    for loss, aux in losses:
        loss_sum += loss
        aux_sum += aux
    return StepLosses(loss_sum, aux_sum)
