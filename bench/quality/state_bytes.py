"""The bytes of what a method keeps for its trained parameters, read off the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

# codes and scales are part of the model; the rest is what training keeps beside it. weights: trained fp32 weights
# that are no expert codes (LoRA, router, full fine-tuning). bookkeeping: which rows, and their step counts.
PARTS = ("codes", "scales", "master", "residual", "moments", "gradient", "weights", "bookkeeping")


def empty_state() -> dict[str, float]:
    return dict.fromkeys(PARTS, 0)


def add_banks(state: dict[str, float], banks: Iterable[Any]) -> None:
    for bank in banks:
        state["codes"] += bank.codes.nbytes
        state["scales"] += bank.absmax.nbytes
        state["gradient"] += bank.grad.nbytes
        state["bookkeeping"] += bank.neuron_expert.nbytes + bank.neuron_index.nbytes
        for name in ("master", "residual"):
            tensor = getattr(bank, name, None)
            if tensor is not None:
                state[name] += tensor.nbytes


def add_weights(state: dict[str, float], parameters: Iterable[torch.nn.Parameter]) -> None:
    """Trained fp32 weights with a gradient as large as they are."""
    for parameter in parameters:
        state["weights"] += parameter.nbytes
        state["gradient"] += parameter.nbytes


def add_moments(state: dict[str, float], optimizer_state: Mapping[Any, Mapping[str, torch.Tensor]]) -> None:
    """optimizer_state: of a torch optimizer, or its state_dict's "state"."""
    for entry in optimizer_state.values():
        for name, tensor in entry.items():
            if name.startswith("exp_avg"):
                state["moments"] += tensor.nbytes
            elif name == "step":
                state["bookkeeping"] += tensor.nbytes
            else:
                raise ValueError(f"the optimizer keeps {name!r}, which this study does not know how to count")
