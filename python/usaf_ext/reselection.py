"""Re-selection: now and then the least important trained neurons make room for others, and nothing learnt is lost.

A dropped neuron's rows stay in its layer's frozen bank (codes and, by mode, the master; no moments, no gradient), so
the model goes on computing with what it learnt. A frozen neuron may be grown again and then starts from those rows.
The model computes the same bits just before and just after.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .bank import MASTER_DTYPES, RowBank
from .bank_rows import ROWS_PER_NEURON, Rows, merge_rows, neurons_at, store_rows, take_rows
from .experts import PagedLayer, paged_layers
from .selection import SELECTION_SCOPES

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource
    from .optimizer import MaskedAdam

logger = logging.getLogger(__name__)

Part = tuple[torch.Tensor, Rows]  # positions and their rows


@dataclass(frozen=True)
class Exchange:
    """What one layer gives up and takes on: positions expert * I + neuron, int64, ascending."""

    dropped: torch.Tensor
    grown: torch.Tensor


@dataclass(frozen=True)
class Reselection:
    """What a re-selection did, in neurons: dropped = grown; regrown of them had been frozen; frozen: all that are now.

    After it, banks are other objects than before: whoever keeps references must fetch them again.
    """

    dropped: int
    regrown: int
    frozen: int


def plan_exchange(
    importance: Sequence[torch.Tensor], trained: Sequence[torch.Tensor], fraction: float, scope: str = "model"
) -> list[Exchange]:
    """Which neurons to drop and which to grow, over all layers (scope "model") or layer by layer ("layer").

    The round(fraction * n), at least 1, least important of the n trained neurons are dropped, and as many of the
    others, the most important first, are grown: only neurons with some importance, so fewer change hands where there
    are not enough. Of equals the higher (layer, expert, neuron) is dropped first, the lower grown first.

    Args:
        importance: per layer float32 [E, I], over all neurons of the model as it is now.
        trained: per layer the positions of the neurons being trained, int64 [n_l], ascending; may be empty.

    Raises:
        ValueError: a fraction outside (0, 1), an unknown scope, importance that is not finite or negative, nothing
            trained, or no neuron with importance outside the trained ones.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if scope not in SELECTION_SCOPES:
        raise ValueError(f"scope must be one of {SELECTION_SCOPES}, got {scope!r}")
    if len(importance) != len(trained):
        raise ValueError(f"importance has {len(importance)} layers, trained {len(trained)}")
    importance = [values.detach().float().cpu() for values in importance]
    for layer, values in enumerate(importance):
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"importance of layer {layer} has negative or non-finite values: the gradients overflowed")
    if not any(len(positions) for positions in trained):
        raise ValueError("trained is empty: there is nothing to exchange")
    flat = [values.reshape(-1) for values in importance]
    sizes = [len(values) for values in flat]
    if scope == "layer":
        exchanges = [_exchange(values, positions, fraction) for values, positions in zip(flat, trained)]
    else:
        starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
        everything = _exchange(torch.cat(flat), torch.cat([p + s for p, s in zip(trained, starts)]), fraction)
        exchanges = [
            Exchange(_within(everything.dropped, start, size), _within(everything.grown, start, size))
            for start, size in zip(starts, sizes)
        ]
    if not any(len(exchange.grown) for exchange in exchanges):
        raise ValueError(
            "importance is zero for every neuron that is not trained already: nothing can be grown (is the density 1, "
            "or did no gradient reach the experts?)"
        )
    return exchanges


def _within(positions: torch.Tensor, start: int, size: int) -> torch.Tensor:
    return positions[(positions >= start) & (positions < start + size)] - start


def _exchange(values: torch.Tensor, trained: torch.Tensor, fraction: float) -> Exchange:
    outside = torch.ones(len(values), dtype=torch.bool)
    outside[trained] = False
    candidates = (outside & (values > 0)).nonzero()[:, 0]
    count = min(max(1, round(fraction * len(trained))), len(candidates), len(trained))
    keep = len(trained) - count
    least = trained[torch.sort(values[trained], descending=True, stable=True).indices[keep:]]
    most = candidates[torch.sort(values[candidates], descending=True, stable=True).indices[:count]]
    return Exchange(least.sort().values, most.sort().values)


def reselect(
    model: nn.Module,
    optimizer: MaskedAdam,
    importance: Sequence[torch.Tensor],
    *,
    fraction: float,
    scope: str = "model",
    originals: ModelSource | None = None,
    master_dtype: torch.dtype = torch.bfloat16,
) -> Reselection:
    """Exchange neurons between two steps (see `plan_exchange`); survivors keep every bit, moments included.

    Neurons grown for the first time start from the store's codes, and masters from `originals` as in `attach`; frozen
    ones start from their frozen rows. Their moments and step counts are zero. All banks must be in place.

    Raises ValueError as plan_exchange does, StoreError for foreign originals; nothing is changed then.
    """
    if master_dtype not in MASTER_DTYPES.values():
        raise ValueError(f"master_dtype must be torch.bfloat16 or torch.float32, got {master_dtype}")
    layers = paged_layers(model)
    some_bank = next((layer.bank for layer in layers if layer.bank is not None), None)
    nothing = torch.empty(0, dtype=torch.int64)
    trained = [nothing if layer.bank is None else layer.bank.positions for layer in layers]
    exchanges = plan_exchange(importance, trained, fraction, scope)
    assert some_bank is not None
    # What can fail for reasons outside comes first: reading the grown neurons.
    fresh: list[Part | None] = []
    for layer, exchange in zip(layers, exchanges):
        frozen = nothing if layer.frozen_bank is None else layer.frozen_bank.positions
        new = exchange.grown[~torch.isin(exchange.grown, frozen)]
        if len(new) == 0:
            fresh.append(None)
            continue
        neurons = neurons_at(new, layer.intermediate_size)
        rows = store_rows(
            layer.store, layer.index, neurons, originals=originals, mode=some_bank.mode, master_dtype=master_dtype
        )
        fresh.append((new, rows))
    num_regrown = sum(len(exchange.grown) for exchange in exchanges) - sum(len(f[0]) for f in fresh if f is not None)
    buffer = _gradient_buffer(layers, exchanges)
    # One layer at a time: each old bank goes before the next new one is made.
    optimizer.replace_banks(
        (layer, _exchanged(layer, exchange, new_rows, some_bank, buffer))
        for layer, exchange, new_rows in zip(layers, exchanges, fresh)
        if len(exchange.dropped)
        or len(exchange.grown)
        or (layer.bank is not None and layer.bank.grad_buffer is not buffer)
    )
    result = Reselection(
        dropped=sum(len(exchange.dropped) for exchange in exchanges),
        regrown=num_regrown,
        frozen=sum(layer.frozen_bank.num_neurons for layer in layers if layer.frozen_bank is not None),
    )
    logger.info("re-selection: %s", result)
    return result


def _gradient_buffer(layers: Sequence[PagedLayer], exchanges: Sequence[Exchange]) -> torch.Tensor | None:
    """The buffer that the banks share, a larger one if a new bank needs it; None when each has its own gradient."""
    banks = [layer.bank for layer in layers]
    old = next((bank.grad_buffer for bank in banks if bank is not None and bank.grad_buffer is not None), None)
    if old is None:
        return None
    neurons = [0 if bank is None else bank.num_neurons for bank in banks]
    most = max(n + len(exchange.grown) - len(exchange.dropped) for n, exchange in zip(neurons, exchanges))
    size = most * ROWS_PER_NEURON * layers[0].hidden_size
    return old if size <= len(old) else torch.zeros(size, dtype=old.dtype, device=old.device)


def _exchanged(
    layer: PagedLayer, exchange: Exchange, fresh: Part | None, like: RowBank, buffer: torch.Tensor | None
) -> RowBank | None:
    """The layer's new trained bank; its new frozen bank is set."""
    staying, dropped = _split(layer.bank, exchange.dropped)
    frozen, regrown = _split(layer.frozen_bank, exchange.grown)
    trained = _joined(layer, like, [staying, fresh, regrown], trainable=True, buffer=buffer)
    layer.set_frozen_bank(_joined(layer, like, [frozen, dropped], trainable=False, buffer=None))
    return trained


def _split(bank: RowBank | None, leaving: torch.Tensor) -> tuple[Part | None, Part | None]:
    """(what stays, what leaves) of a bank."""
    if bank is None:
        return None, None
    leaves = torch.isin(bank.positions, leaving)
    stay, leave = ((bank.positions[at], take_rows(bank.rows, at.nonzero()[:, 0])) for at in (~leaves, leaves))
    return stay, leave


def _joined(
    layer: PagedLayer, like: RowBank, parts: Sequence[Part | None], *, trainable: bool, buffer: torch.Tensor | None
) -> RowBank | None:
    filled = [part for part in parts if part is not None and len(part[0])]
    if not filled:
        return None
    return like.like(layer.index, *merge_rows(filled), trainable=trainable, grad_buffer=buffer)
