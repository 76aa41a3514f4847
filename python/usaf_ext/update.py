"""What becomes of a step's gradients: loss scaling, clipping, the optimiser's step, and its release inside backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .bank import share_gradients
from .devices import read_numbers
from .errors import StoreError
from .experts import PagedLayer
from .optimizer import MaskedAdam
from .step import StepLosses
from .train_config import TrainConfig

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Update:
    """Optimiser, learning rates and loss scale of a run. Made once banks and routers are there.

    A model that computes in float16 gets dynamic loss scaling (torch.amp.GradScaler). With `gradient_release`, the rows
    of a layer are updated as soon as backward is through with it, and the banks share one gradient buffer; their
    gradients are clipped layer by layer then, and the routers' together.

    Attributes:
        optimizer: updates nothing in the control, where config.optimizer is None.
        num_parameters: weights that are updated.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PagedLayer], config: TrainConfig) -> None:
        self._layers = {layer.native.handle: layer for layer in layers}
        self._device = layers[0].anchor.device
        self._max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        self._releases = config.gradient_release
        self.is_control = config.optimizer is None
        # Made for the control too: it refuses a run that trains nothing.
        self.optimizer = MaskedAdam(
            model,
            lr=config.learning_rate,
            router_lr=config.router_learning_rate,
            weight_decay=config.weight_decay,
            seed=config.seed,
            moments=config.moments,
        )
        self.num_parameters = 0 if self.is_control else self.optimizer.num_parameters
        self._scheduler = config.scheduler(self.optimizer)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=layers[0].memory.dtype == torch.float16)
        if self._releases and any(layer.bank is not None for layer in layers):
            share_gradients(layers)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What backward starts from."""
        return self._scaler.scale(loss)

    @torch.no_grad()
    def after_backward(self, handle: int) -> None:
        """Update the rows of the layer with this handle, whose gradients are complete. Only with gradient_release.

        A gradient that is not finite, or comes from a recompute that routed otherwise, changes no bit of the layer.
        """
        layer = self._layers[handle]
        if not self._releases or layer.bank is None or layer.bank.grad is None:
            return
        coefficient = 1 / self._scaler.scale(torch.ones((), dtype=torch.float64, device=self._device))
        norm = layer.bank.grad_norm() * coefficient
        if self._max_norm < math.inf:
            coefficient = coefficient * torch.clamp(self._max_norm / (norm + _CLIP_EPS), max=1.0)
        self.optimizer.step_layer(layer, coefficient, found_inf=layer.rerouted)

    def step(self, losses: StepLosses) -> dict[str, Any]:
        """Update what has a gradient, go on in the schedule, and clear all gradients; then wait for the device, once.

        Returns what to log: the step's loss and aux_loss, grad_norm (before clipping; None if not finite), skipped,
        learning_rate and router_learning_rate of this step, and loss_scale in float16.
        """
        rates = {group["name"]: 0.0 if self.is_control else group["lr"] for group in self.optimizer.param_groups}
        self._scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).to(self._device)
        clipped = [p for p in parameters if p not in self.optimizer.released]
        torch.nn.utils.clip_grad_norm_(clipped, self._max_norm)
        scale = self._scaler.scale(torch.ones((), device=self._device))
        if not self.is_control:
            self._scaler.step(self.optimizer)
            self._scheduler.step()
        self._scaler.update()
        self.optimizer.zero_grad()
        read = read_numbers(losses.loss, losses.aux_loss, norm, scale)
        record: dict[str, Any] = dict(zip(("loss", "aux_loss", "grad_norm", "loss_scale"), read))
        if not math.isfinite(record["grad_norm"]):
            record["grad_norm"] = None
        if not self._scaler.is_enabled():
            del record["loss_scale"]
        return {
            **record,
            "skipped": record["grad_norm"] is None,
            "learning_rate": rates.get("experts", 0.0),
            "router_learning_rate": rates.get("router", 0.0),
        }

    def state_dict(self) -> dict[str, Any]:
        """Of schedule and loss scale: JSON values. The optimizer has its own."""
        if self.is_control:
            return {}
        return {"scheduler": self._scheduler.state_dict(), "loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, optimizer: dict[str, Any] | None, state: dict[str, Any]) -> None:
        """Raises StoreError without an optimizer's state, unless this is the control."""
        if self.is_control:
            return
        if optimizer is None:
            raise StoreError("a checkpoint without optimizer state")
        self.optimizer.load_state_dict(optimizer)
        self._scheduler.load_state_dict(state["scheduler"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["loss_scale"])
