"""Quantisation blocks as the unit of training, EMULATED: the library's unit is a neuron.

Every neuron that holds a chosen block is attached whole, and before each step the gradient of its other blocks is
zeroed. Adam from zero moments with a zero gradient and no weight decay then leaves them, their moments, masters and
codes as they are. As many parameters train as with neurons of the same density.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from usaf_ext.bank import RowBank
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.experts import PagedLayer, paged_layers
from usaf_ext.loss import causal_lm_loss
from usaf_ext.selection import Selection, attach

BLOCK = 64
# What a bank of blocks would keep beside a block's weights: (expert, row, block) as two int32, and an int32 step.
BOOKKEEPING_BYTES = 12


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """[..., H] as [..., H / BLOCK, BLOCK]."""
    if rows.shape[-1] % BLOCK:
        raise ValueError(f"rows of {rows.shape[-1]} weights have a short block: not emulated")
    return rows.unflatten(-1, (-1, BLOCK))


def block_importance(model: torch.nn.Module, batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Per layer float32 [E, I, 3, H / 64]: squared gradients of the mean loss, summed over a block and the batches."""
    layers = paged_layers(model)
    importance = []
    for layer in layers:
        experts, neurons = torch.meshgrid(
            torch.arange(layer.num_experts, dtype=torch.int32),
            torch.arange(layer.intermediate_size, dtype=torch.int32),
            indexing="ij",
        )
        everything = (experts.reshape(-1), neurons.reshape(-1))
        layer.set_bank(RowBank.from_store(layer.store, layer.index, everything, mode="in_place"))
        importance.append(torch.zeros(len(everything[0]), 3, layer.hidden_size // BLOCK))
    for input_ids in batches:
        total, count = causal_lm_loss(model, input_ids)
        (total / count).backward()
        for layer, scores in zip(layers, importance):
            scores += _blocks(layer.bank.grad).square().sum(-1)
            layer.bank.zero_grad()
            layer.anchor.grad = None
    for layer in layers:
        layer.set_bank(None)
    return [
        scores.unflatten(0, (layer.num_experts, layer.intermediate_size)) for layer, scores in zip(layers, importance)
    ]


class BlockUnit:
    """The chosen blocks of a model, attached to it.

    importance: see block_importance. density: share of all blocks, the most important over the whole model.
    masks: PagedLayer -> bool [n, 3, H / 64] over its bank's neurons.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        importance: list[torch.Tensor],
        density: float,
        *,
        originals: ModelSource | None,
        mode: str,
        master_dtype: torch.dtype,
    ) -> None:
        flat = torch.cat([scores.reshape(-1) for scores in importance])
        count = max(1, round(density * len(flat)))
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
        parts = [
            part.view(scores.shape) for part, scores in zip(chosen.split([s.numel() for s in importance]), importance)
        ]
        neurons = [part.flatten(2).any(-1).nonzero() for part in parts]
        selection = Selection(
            tuple(index[:, 0].to(torch.int32) for index in neurons),
            tuple(index[:, 1].to(torch.int32) for index in neurons),
            sum(scores.shape[0] * scores.shape[1] for scores in importance),
        )
        attach(model, selection, originals=originals, mode=mode, master_dtype=master_dtype)
        self.num_blocks = count
        self.masks: dict[PagedLayer, torch.Tensor] = {
            layer: part[index[:, 0], index[:, 1]]
            for layer, part, index in zip(paged_layers(model), parts, neurons)
            if layer.bank is not None
        }

    @property
    def num_parameters(self) -> int:
        return self.num_blocks * BLOCK

    def mask_gradients(self) -> None:
        """Before clipping: zero the gradients of the other blocks. The bank's sums of squares, and the anchor's norm
        that clipping sees, are then of what is left."""
        for layer, mask in self.masks.items():
            bank = layer.bank
            gradient = _blocks(bank.grad)
            gradient.mul_(mask[..., None])
            squares = gradient.double().square().flatten(1).sum(1)
            bank.grad_squares.zero_().index_add_(0, bank.neuron_expert.long(), squares)
            if layer.anchor.grad is not None:
                layer.anchor.grad.fill_(float(squares.sum().sqrt()))

    def check_untrained(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError if any moment of a block that was not chosen is not zero."""
        for layer, mask in self.masks.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if bool((_blocks(optimizer.state[layer.anchor][name])[~mask] != 0).any()):
                    raise ValueError(f"layer {layer.index}: a block that was not chosen has {name}")
