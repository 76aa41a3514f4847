"""Which neurons to train: gradient importance over a few batches, then the top fraction."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .bank import RowBank
from .experts import paged_layers
from .loss import causal_lm_loss

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource

logger = logging.getLogger(__name__)

SELECTION_SCOPES = ("model", "layer")


@dataclass(frozen=True)
class Selection:
    """Chosen neurons per MoE layer, each int32 [n_l], sorted by (expert, neuron); n_l may be 0 in scope "model"."""

    neuron_expert: tuple[torch.Tensor, ...]
    neuron_index: tuple[torch.Tensor, ...]
    num_candidates: int

    @property
    def num_neurons(self) -> int:
        return sum(len(experts) for experts in self.neuron_expert)

    @property
    def density(self) -> float:
        """Chosen share of all expert neurons of the model."""
        return self.num_neurons / self.num_candidates


def compute_importance(
    model: nn.Module, batches: Iterable[torch.Tensor], *, keep_banks: bool = False
) -> list[torch.Tensor]:
    """Per layer float32 [E, I]: for each neuron, the squared gradients of its 3 * H weights, summed over `batches`.

    Each batch (input_ids, int64 [B, T]) gives one mean next-token loss, one backward and no update. Banks are left out
    meanwhile (keep_banks: they stay, so that it is the importance in the model as trained so far; their gradients are
    cleared), gradients of other parameters are cleared. Raises ValueError when `batches` is empty, a loss is not
    finite, or the model has no paged experts.
    """
    layers = paged_layers(model)
    banks = [layer.bank for layer in layers]
    num_batches = 0
    if not keep_banks:
        for layer in layers:
            layer.set_bank(None)
    importance = [layer.begin_importance() for layer in layers]
    try:
        for input_ids in batches:
            total, count = causal_lm_loss(model, input_ids)
            loss = total / count
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss of importance batch {num_batches} is {loss.item()}, not a finite number")
            loss.backward()
            num_batches += 1
    finally:
        for layer, bank in zip(layers, banks):
            layer.end_importance()
            if not keep_banks:
                layer.set_bank(bank)
            elif bank is not None:
                bank.zero_grad()
        model.zero_grad(set_to_none=True)
    if num_batches == 0:
        raise ValueError("batches is empty: importance needs at least one batch")
    return importance


def select_neurons(importance: Sequence[torch.Tensor], density: float, scope: str = "model") -> Selection:
    """The round(density * total) most important neurons, at least 1; of equals, the lower (layer, expert, neuron).

    importance: per layer float32 [E, I]. scope "model": total counts all layers, "layer": each layer by itself.
    Raises ValueError for a density outside (0, 1], an unknown scope, and importance that is not finite, negative or
    zero everywhere (per layer in scope "layer"): there is then nothing to choose by.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if scope not in SELECTION_SCOPES:
        raise ValueError(f"scope must be one of {SELECTION_SCOPES}, got {scope!r}")
    if not importance:
        raise ValueError("importance is empty: expected one tensor [num_experts, intermediate_size] a layer")
    for layer, values in enumerate(importance):
        if values.dim() != 2:
            raise ValueError(f"importance of layer {layer} must be [experts, neurons], got {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"importance of layer {layer} has negative or non-finite values: the gradients overflowed")
    flat = [values.detach().float().cpu().reshape(-1) for values in importance]
    if scope == "model":
        chosen = _top(torch.cat(flat), density, "all layers")
        ends = torch.tensor([len(values) for values in flat]).cumsum(0)
        parts = [
            chosen[(chosen >= end - len(values)) & (chosen < end)] - (end - len(values))
            for values, end in zip(flat, ends.tolist())
        ]
    else:
        parts = [_top(values, density, f"layer {layer}") for layer, values in enumerate(flat)]
    widths = [values.shape[1] for values in importance]
    return Selection(
        tuple((part // width).to(torch.int32) for part, width in zip(parts, widths)),
        tuple((part % width).to(torch.int32) for part, width in zip(parts, widths)),
        sum(len(values) for values in flat),
    )


def _top(values: torch.Tensor, density: float, what: str) -> torch.Tensor:
    """Ascending positions of the largest values; a stable sort keeps the lower position of equals."""
    if not bool((values > 0).any()):
        raise ValueError(
            f"importance of {what} is zero everywhere: no gradient reached an expert (is the loss constant, "
            "or the model detached?)"
        )
    count = max(1, round(density * len(values)))
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    unused = int((values[order] == 0).sum())
    if unused:
        logger.warning("%s: %d of %d chosen neurons had no gradient; use more batches", what, unused, count)
    return order.sort().values


def attach(
    model: nn.Module,
    selection: Selection,
    *,
    originals: ModelSource | None = None,
    mode: str = "master",
    master_dtype: torch.dtype = torch.bfloat16,
    rounding: str = "stochastic",
    grad_dtype: torch.dtype = torch.float32,
    placement: str = "device",
) -> list[RowBank]:
    """Build a RowBank for each layer with chosen neurons and set it; layers without any get none.

    See RowBank and its from_store for the settings. All banks are built before the first one is set; rows that an
    earlier re-selection froze are let go.
    """
    layers = paged_layers(model)
    if len(selection.neuron_expert) != len(layers):
        raise ValueError(f"selection has {len(selection.neuron_expert)} layers, the model {len(layers)}")
    banks: list[RowBank | None] = []
    for layer, neuron_expert, neuron_index in zip(layers, selection.neuron_expert, selection.neuron_index):
        if len(neuron_expert) == 0:
            banks.append(None)
            continue
        bank = RowBank.from_store(
            layer.store,
            layer.index,
            (neuron_expert, neuron_index),
            originals=originals,
            mode=mode,
            master_dtype=master_dtype,
            device=layer.anchor.device,
            rounding=rounding,
            grad_dtype=grad_dtype,
            placement=placement,
        )
        banks.append(bank)
    for layer, new_bank in zip(layers, banks):
        layer.set_frozen_bank(None)
        layer.set_bank(new_bank)
    return [bank for bank in banks if bank is not None]
