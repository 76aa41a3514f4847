"""Rows of neurons outside a bank: which neurons they are, where their first values come from, and moving them about.

A position is expert * intermediate_size + neuron, int64: positions of one layer are compared, sorted and merged. Rows
are a dict of tensors [n, 3, ..], one entry a kind of state: "codes", "absmax" and what KEPT_BY_MODE names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import ops
from .errors import StoreError

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource
    from .store import ExpertStore

logger = logging.getLogger(__name__)

ROWS_PER_NEURON = 3  # gate, up, down^T
# What each mode keeps beside codes and scales (see ops.masked_adam_), and so what a delta holds.
KEPT_BY_MODE: dict[str, str | None] = {"master": "master", "in_place": None, "residual": "residual", "eco": None}
BANK_MODES = tuple(KEPT_BY_MODE)
MASTER_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Rows = dict[str, torch.Tensor]


def check_neurons(
    neuron_expert: torch.Tensor, neuron_index: torch.Tensor, num_experts: int, intermediate_size: int
) -> None:
    """Raise TypeError or ValueError unless the two int32 [n] tensors are sorted, distinct, in range and n >= 1."""
    for name, tensor in (("neuron_expert", neuron_expert), ("neuron_index", neuron_index)):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int32 tensor, got {found}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
    if neuron_expert.shape != neuron_index.shape:
        raise ValueError(
            f"neuron_expert and neuron_index must have one length, got {len(neuron_expert)} and {len(neuron_index)}"
        )
    if len(neuron_expert) == 0:
        raise ValueError("neuron_expert is empty: a bank needs at least one neuron")
    for name, tensor, bound in (
        ("neuron_expert", neuron_expert, num_experts),
        ("neuron_index", neuron_index, intermediate_size),
    ):
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= bound:
            raise ValueError(f"{name} must lie in [0, {bound}), got {low} .. {high}")
    position = positions_of(neuron_expert, neuron_index, intermediate_size)
    if not bool((position[1:] > position[:-1]).all()):
        raise ValueError("neurons must be sorted by (expert, neuron) and distinct")


def positions_of(neuron_expert: torch.Tensor, neuron_index: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """int64 [n] positions of neurons."""
    return neuron_expert.long() * intermediate_size + neuron_index.long()


def neurons_at(positions: torch.Tensor, intermediate_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(neuron_expert, neuron_index), int32 [n] each."""
    return (positions // intermediate_size).int(), (positions % intermediate_size).int()


def overlay_rows(neuron_index: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """Where neurons' rows go in a decoded expert [3 * intermediate_size, hidden_size], gate above up above down^T:
    int64 [n, 3] = matrix * intermediate_size + neuron_index, on the device of neuron_index."""
    first = torch.arange(ROWS_PER_NEURON, device=neuron_index.device) * intermediate_size
    return neuron_index.long()[:, None] + first


def store_rows(
    store: ExpertStore,
    layer: int,
    neurons: tuple[torch.Tensor, torch.Tensor],
    *,
    originals: ModelSource | None,
    mode: str,
    master_dtype: torch.dtype,
) -> Rows:
    """Rows of untrained neurons, on the CPU; see RowBank.from_store for the arguments and what is raised."""
    if not 0 <= layer < store.num_layers:
        raise ValueError(f"layer must lie in [0, {store.num_layers}), got {layer}")
    if mode not in BANK_MODES:
        raise ValueError(f"mode must be one of {BANK_MODES}, got {mode!r}")
    if master_dtype not in MASTER_DTYPES.values():
        raise ValueError(f"master_dtype must be torch.bfloat16 or torch.float32, got {master_dtype}")
    if originals is not None and originals.fingerprint != store.fingerprint:
        raise StoreError(
            f"originals at {originals.path} are not the checkpoint this store was made of "
            f"(fingerprint {originals.fingerprint}, the store's is {store.fingerprint})"
        )
    neuron_expert, neuron_index = neurons
    check_neurons(neuron_expert, neuron_index, store.num_experts, store.intermediate_size)

    codes, absmax, original_rows = [], [], []
    experts, counts = torch.unique_consecutive(neuron_expert, return_counts=True)
    for expert, selected in zip(experts.tolist(), neuron_index.long().cpu().split(counts.tolist())):
        expert_codes, expert_absmax = store.rows(layer, expert, selected)
        codes.append(expert_codes)
        absmax.append(expert_absmax)
        if originals is not None and KEPT_BY_MODE[mode] is not None:
            original_rows.append(originals.neurons(layer, expert, selected))
    rows = {"codes": torch.cat(codes), "absmax": torch.cat(absmax)}
    if KEPT_BY_MODE[mode] is None:
        return rows
    if original_rows:
        weights = torch.cat(original_rows)
    else:
        logger.warning(
            "layer %d: no original weights given; the %ss start from the decoded %s codes", layer, mode, store.format
        )
        weights = ops.dequantize_blocks(rows["codes"], rows["absmax"], store.hidden_size, store.format)
    if mode == "master":
        return {**rows, "master": weights.to(master_dtype)}
    return {**rows, "residual": ops.quantize_residual(weights.float(), rows["codes"], rows["absmax"], store.format)}


def take_rows(rows: Rows, index: torch.Tensor) -> Rows:
    """Copies of the rows at `index`, int64 [m] on the CPU."""
    return {name: tensor[index.to(tensor.device)] for name, tensor in rows.items()}


def merge_rows(parts: Sequence[tuple[torch.Tensor, Rows]]) -> tuple[torch.Tensor, Rows]:
    """Join (positions, rows) pairs with distinct positions, at least one, into one pair sorted by position.

    The tensors come to lie where those of the first part do.
    """
    positions, order = torch.cat([part for part, _ in parts]).sort()
    first = parts[0][1]
    joined = {
        name: torch.cat([rows[name].to(tensor.device) for _, rows in parts])[order.to(tensor.device)]
        for name, tensor in first.items()
    }
    return positions, joined
