"""Which neurons to train: the most important ones by a few batches' gradients, a sample by importance, or any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import _C
from .bank import RowBank
from .bank_rows import ROWS_PER_NEURON
from .experts import IMPORTANCE_METRICS, paged_layers
from .loss import causal_lm_loss
from .ops.codec import scale_dtype

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource

logger = logging.getLogger(__name__)

SELECTION_SCOPES = ("model", "layer")
SELECTION_METRICS = (*IMPORTANCE_METRICS, "random")
SELECTION_SAMPLINGS = ("top", "proportional")
FLOAT16_SCALE = 2.0**16  # the first scale of the loss in float16, as torch.amp.GradScaler's


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
    model: nn.Module, batches: Iterable[torch.Tensor], metric: str = "gradient", *, keep_banks: bool = False
) -> list[torch.Tensor]:
    """Per layer float32 [E, I]: each neuron's importance, summed over `batches`.

    metric: over a neuron's 3 * H weights w with gradients g, "gradient" is the sum of g^2 and "gradient_weight" the sum
    of |g * w| (to first order what the loss changes by without each weight: Molchanov et al., arXiv 1906.10771).

    Each batch (input_ids, int64 [B, T] on the model's device) gives one mean next-token loss, one backward and no
    update. Banks are left out meanwhile (keep_banks: they stay, so that it is the importance in the model as trained so
    far; their gradients are cleared), gradients of other parameters are cleared. A model that computes in float16 runs
    backward from a scaled loss, halved and run again where that overflows. Raises ValueError for an unknown metric,
    when `batches` is empty, a loss is not finite, or the model has no paged experts.
    """
    if metric not in IMPORTANCE_METRICS:
        raise ValueError(f"metric must be one of {IMPORTANCE_METRICS}, got {metric!r}")
    layers = paged_layers(model)
    banks = [layer.bank for layer in layers]
    num_batches = 0
    if not keep_banks:
        for layer in layers:
            layer.set_bank(None)
    importance = [layer.begin_importance(metric) for layer in layers]
    scale = _LossScale(importance, metric, FLOAT16_SCALE if layers[0].memory.dtype == torch.float16 else 1.0)
    try:
        for input_ids in batches:
            accepted = False
            while not accepted:
                total, count = causal_lm_loss(model, input_ids)
                loss = total / count
                if not bool(torch.isfinite(loss)):
                    raise ValueError(
                        f"the loss of importance batch {num_batches} is {loss.item()}, not a finite number"
                    )
                (loss * scale.factor).backward()
                accepted = scale.accept()
            num_batches += 1
        scale.remove()
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


class _LossScale:
    """Importance in the scale of a scaled loss until `remove`. All factors are powers of two, and so exact."""

    def __init__(self, importance: Sequence[torch.Tensor], metric: str, factor: float) -> None:
        self.factor = factor
        self._importance = importance
        self._power = {"gradient": 2, "gradient_weight": 1}[metric]
        self._accepted = [values.clone() for values in importance] if factor > 1 else []

    def accept(self) -> bool:
        """Whether the latest backward did not overflow. If it did, it is undone, to be run again at half the factor."""
        if self.factor == 1:
            return True
        if bool(torch.stack([torch.isfinite(values).all() for values in self._importance]).all()):
            for values, accepted in zip(self._importance, self._accepted):
                accepted.copy_(values)
            return True
        self.factor /= 2
        for values, accepted in zip(self._importance, self._accepted):
            values.copy_(accepted.mul_(0.5**self._power))
        return False

    def remove(self) -> None:
        for values in self._importance:
            values /= self.factor**self._power


def select_neurons(
    importance: Sequence[torch.Tensor], density: float, scope: str = "model", sampling: str = "top", seed: int = 0
) -> Selection:
    """round(density * total) neurons by their importance, at least 1.

    importance: per layer float32 [E, I]. scope "model": total counts all layers, "layer": each layer by itself.
    sampling "top": the most important; of equals, the lower (layer, expert, neuron). "proportional": drawn one after
    the other without replacement, each time with a probability proportional to importance (by exponential races,
    Efraimidis and Spirakis 2006), the same for the same `seed`.

    Raises ValueError for a density outside (0, 1], an unknown scope or sampling, and importance that is not finite,
    negative or zero everywhere (per layer in scope "layer"): there is then nothing to choose by.
    """
    _check_choice(density, scope, seed)
    if sampling not in SELECTION_SAMPLINGS:
        raise ValueError(f"sampling must be one of {SELECTION_SAMPLINGS}, got {sampling!r}")
    if not importance:
        raise ValueError("importance is empty: expected one tensor [num_experts, intermediate_size] a layer")
    importance = [values.detach().float().cpu() for values in importance]
    for layer, values in enumerate(importance):
        if values.dim() != 2:
            raise ValueError(f"importance of layer {layer} must be [experts, neurons], got {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"importance of layer {layer} has negative or non-finite values: the gradients overflowed")
    generator = torch.Generator().manual_seed(seed)

    def choose(values: torch.Tensor, count: int, what: str) -> torch.Tensor:
        if not bool((values > 0).any()):
            raise ValueError(
                f"importance of {what} is zero everywhere: no gradient reached an expert (is the loss constant, "
                "or the model detached?)"
            )
        if sampling == "proportional":
            # The largest of importance / Exp(1): zeros come last, as they would after everything else was drawn.
            keys = values.double() / torch.empty(len(values), dtype=torch.float64).exponential_(generator=generator)
        else:
            keys = values
        chosen = torch.sort(keys, descending=True, stable=True).indices[:count]  # of equals, the lower position
        unused = int((values[chosen] == 0).sum())
        if unused:
            logger.warning("%s: %d of %d chosen neurons had no gradient; use more batches", what, unused, count)
        return chosen

    return _select(importance, density, scope, choose)


def select_random(sizes: Sequence[tuple[int, int]], density: float, scope: str = "model", seed: int = 0) -> Selection:
    """round(density * total) neurons, at least 1, all equally likely and the same for the same `seed`.

    sizes: per layer (num_experts, intermediate_size). scope as in select_neurons. Raises ValueError as it does.
    """
    _check_choice(density, scope, seed)
    if not sizes:
        raise ValueError("sizes is empty: expected (num_experts, intermediate_size) of each layer")
    for layer, size in enumerate(sizes):
        if min(size) < 1:
            raise ValueError(f"sizes of layer {layer}: expected at least one expert and one neuron, got {tuple(size)}")
    generator = torch.Generator().manual_seed(seed)

    def choose(values: torch.Tensor, count: int, what: str) -> torch.Tensor:
        return torch.randperm(len(values), generator=generator)[:count]

    return _select([torch.ones(1, 1).expand(size) for size in sizes], density, scope, choose)


def _check_choice(density: float, scope: str, seed: int) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if scope not in SELECTION_SCOPES:
        raise ValueError(f"scope must be one of {SELECTION_SCOPES}, got {scope!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an int of at least 0, got {seed!r}")


def _select(
    layers: Sequence[torch.Tensor],
    density: float,
    scope: str,
    choose: Callable[[torch.Tensor, int, str], torch.Tensor],
) -> Selection:
    """choose(values [n], count, what for messages) gives positions, in the whole model or layer by layer."""
    flat = [values.reshape(-1) for values in layers]
    if scope == "model":
        values = torch.cat(flat)
        chosen = choose(values, max(1, round(density * len(values))), "all layers").sort().values
        ends = torch.tensor([len(part) for part in flat]).cumsum(0)
        parts = [
            chosen[(chosen >= end - len(part)) & (chosen < end)] - (end - len(part))
            for part, end in zip(flat, ends.tolist())
        ]
    else:
        parts = [
            choose(values, max(1, round(density * len(values))), f"layer {layer}").sort().values
            for layer, values in enumerate(flat)
        ]
    widths = [values.shape[1] for values in layers]
    return Selection(
        tuple((part // width).to(torch.int32) for part, width in zip(parts, widths)),
        tuple((part % width).to(torch.int32) for part, width in zip(parts, widths)),
        sum(len(values) for values in flat),
    )


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
    earlier re-selection froze are let go. Raises BudgetError when banks in host memory exceed the model's host budget.
    """
    layers = paged_layers(model)
    if len(selection.neuron_expert) != len(layers):
        raise ValueError(f"selection has {len(selection.neuron_expert)} layers, the model {len(layers)}")
    if placement == "host":  # before they are there; the optimizer's state comes on top
        store, kept = layers[0].store, {"master": master_dtype.itemsize, "residual": 1}.get(mode, 0)
        row_bytes = _C.code_bytes(store.format, store.hidden_size) + kept * store.hidden_size
        row_bytes += _C.num_blocks(store.format, store.hidden_size) * scale_dtype(store.format).itemsize
        layers[0].memory.reserve_host(selection.num_neurons * ROWS_PER_NEURON * row_bytes)
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
            device=layer.device,
            rounding=rounding,
            grad_dtype=grad_dtype,
            placement=placement,
        )
        banks.append(bank)
    for layer, new_bank in zip(layers, banks):
        layer.set_frozen_bank(None)
        layer.set_bank(new_bank)
    return [bank for bank in banks if bank is not None]
