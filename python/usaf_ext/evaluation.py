"""Held-out loss: one sweep of the model's pages for each batch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .devices import read_numbers, send
from .loss import causal_lm_loss


def evaluate(model: nn.Module, sequences: Iterable[torch.Tensor], batch_size: int) -> float:
    """Mean next-token cross-entropy in nats per predicted token, over all tokens of all sequences.

    Args:
        model: a causal language model of transformers. Its training flags are as before afterwards.
        sequences: int64 [num_tokens] on the CPU each (a `PackedDataset`); neighbours of one length share a batch.
        batch_size: sequences in one forward.

    Raises ValueError for no sequences or a batch size below 1, UsafError from the model's experts, and
    FloatingPointError for a loss that is not finite.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive int, got {batch_size!r}")
    everything = list(sequences)
    if not everything:
        raise ValueError("sequences: expected at least one")
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    try:
        model.eval()
        with torch.no_grad():
            for batch in _batches(everything, batch_size):
                loss, targets = causal_lm_loss(model, send(batch, device))
                total += loss
                count += targets
    finally:
        for module, training in modes.items():
            module.training = training
    loss_sum, num_targets = read_numbers(total, count)
    mean = loss_sum / num_targets
    if not math.isfinite(mean):
        raise FloatingPointError(f"the evaluation loss is {mean}")
    return mean


def _batches(sequences: list[torch.Tensor], batch_size: int) -> Iterable[torch.Tensor]:
    batch: list[torch.Tensor] = []
    for sequence in sequences:
        if batch and (len(batch) == batch_size or len(sequence) != len(batch[0])):
            yield torch.stack(batch)
            batch = []
        batch.append(sequence)
    yield torch.stack(batch)
