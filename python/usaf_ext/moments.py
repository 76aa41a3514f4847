"""Adam's state of a bank's rows: moments in fp32 or 8 bits and a step count a row, where the bank's update runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import ops
from .bank import RowBank
from .bank_rows import ROWS_PER_NEURON
from .experts import PagedLayer
from .host_updates import staging_bytes

MOMENTS = ("fp32", "8bit")

State = dict[str, torch.Tensor]


def new_state(bank: RowBank, num_neurons: int, moments: str) -> State:
    """State of rows without a step: step int32 [n, 3], exp_avg and exp_avg_sq float32 [n, 3, H], or, moments "8bit",
    uint8 with float32 exp_avg_absmax and exp_avg_sq_absmax (ops.empty_moments8)."""
    shape = (num_neurons, ROWS_PER_NEURON, bank.hidden_size)
    device = bank.state_device
    state = {"step": torch.zeros(shape[:2], dtype=torch.int32, device=device)}
    for name in ("exp_avg", "exp_avg_sq"):
        if moments == "8bit":
            state[name], state[f"{name}_absmax"] = ops.empty_moments8(shape, device)
        else:
            state[name] = torch.zeros(shape, dtype=torch.float32, device=device)
    return state


def carried_state(state: State, old: RowBank, new: RowBank, moments: str) -> State:
    """State of `new`: neurons that `old` has too keep every bit of `state`, the others begin anew."""
    both = torch.isin(new.positions, old.positions)
    source = torch.searchsorted(old.positions, new.positions[both])
    carried = new_state(new, new.num_neurons, moments)
    for name, tensor in carried.items():
        tensor[both.to(tensor.device)] = state[name][source.to(tensor.device)]
    return carried


def loaded_state(saved: State, bank: RowBank, moments: str, what: str) -> State:
    """A copy of `saved` for `bank`. Raises ValueError, beginning with `what`, when it does not fit."""
    like = new_state(bank, 1, moments)
    if set(saved) != set(like):
        raise ValueError(f"{what} has {sorted(saved)}, expected {sorted(like)}: its moments are of another kind")
    for name, example in like.items():
        wanted, found = (bank.num_neurons, *example.shape[1:]), tuple(saved[name].shape)
        if found != wanted or saved[name].dtype != example.dtype:
            raise ValueError(
                f"{what}: {name} is {saved[name].dtype} {found}, expected {example.dtype} {wanted}: it belongs to "
                "another selection, or its moments are of another kind"
            )
    return {name: tensor.to(bank.state_device, copy=True) for name, tensor in saved.items()}


def bank_bytes(layers: Iterable[PagedLayer], moments: str) -> dict[str, int]:
    """Bytes for training the rows of `layers`; see MaskedAdam.bank_bytes."""
    total = {"device": 0, "host": 0}
    shared, staged = 0, []
    for layer in layers:
        for bank in (layer.bank, layer.frozen_bank):
            if bank is not None:
                total["device"] += bank.device_bytes
                total["host"] += bank.host_bytes
        if layer.bank is None or layer.bank.grad is None:
            continue
        row = sum(tensor.nbytes for tensor in new_state(layer.bank, 1, moments).values())
        total[layer.bank.placement] += row * layer.bank.num_neurons
        if layer.bank.grad_buffer is not None:
            shared = layer.bank.grad_buffer.nbytes
        if layer.bank.placement == "host" and layer.bank.device.type != "cpu":
            staged.append(layer.bank)
    return {"device": total["device"] + shared, "host": total["host"] + staging_bytes(staged)}
