"""MaskedAdam: Adam on the row banks and the fp32 routers of a model, as an ordinary torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from . import ops
from .bank import RowBank
from .devices import read_numbers
from .errors import UsafError
from .experts import PagedLayer, check_routes, paged_layers
from .host_updates import HostUpdates
from .moments import MOMENTS, bank_bytes, carried_state, loaded_state, new_state
from .router import trained_routers

MAX_SKIPPED_STEPS = 10  # non-finite gradients this often in a row are no accident
# An anchor's gradient is a sum of fp32 increments, so without clipping it is the bank's norm but for rounding.
_UNCLIPPED = 2.0**-17


def _coefficient(clipped: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """What clipping made of a gradient of norm `norm` (both float64, 0-dim): exactly 1 when it left it alone."""
    ratio = clipped / norm
    untouched = (torch.abs(ratio - 1) <= _UNCLIPPED) | ((norm == 0) & (clipped == 0))
    return torch.where(untouched, 1.0, ratio)


def _not_finite(*values: torch.Tensor) -> torch.Tensor:
    """float32, 0-dim: 1 if any of the 0-dim tensors is infinite or NaN."""
    return (~torch.isfinite(torch.stack([value.double() for value in values])).all()).float()


class MaskedAdam(torch.optim.Optimizer):
    """AdamW on the selected expert rows (a step count per row) and on the trained routers.

    Parameter groups: "experts" holds the anchors of the layers with a bank, "router" the fp32 router weights (absent
    when no router is trained); learning-rate schedulers see both. Moments live in `state`, allocated at the first step
    where the bank's placement says; in placement "host" the update runs on the CPU, and gradients cross once
    (usaf_ext.host_updates).

    torch.nn.utils.clip_grad_norm_ over both groups works: an anchor's gradient is the norm of its bank's gradient, and
    what clipping made of it is applied to the bank as anchor.grad / ||bank.grad|| (0/0 counts as 1, and so does a ratio
    that is 1 but for rounding).

    Rows of experts without tokens since the last step keep every bit. If any gradient is not finite, the whole step is
    skipped and no bit changes. `step` clears bank gradients and anchor gradients; router gradients are left to
    zero_grad. Rounding noise is keyed by `seed`.

    Args:
        model: a model with paged experts, or its PagedLayers (then no router is trained).
        lr: learning rate of the expert rows. router_lr: of the routers, `lr` when None.
        betas, eps, weight_decay: as torch.optim.AdamW; the decay is decoupled and applies to expert rows only.
        moments: "fp32", or "8bit": block-wise 8-bit moments of the expert rows (ops.empty_moments8; the routers' stay
            fp32).
    """

    def __init__(
        self,
        model: nn.Module | Iterable[PagedLayer],
        lr: float = 1e-3,
        router_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        moments: str = "fp32",
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments: expected one of {MOMENTS}, got {moments!r}")
        router_lr = lr if router_lr is None else router_lr
        for name, value in (("lr", lr), ("router_lr", router_lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if isinstance(model, nn.Module):
            layers, routers = paged_layers(model), trained_routers(model)
        else:
            layers, routers = list(model), {}
        self.moments = moments
        self._all_layers = layers
        self._layers = self._trained_layers()
        if betas[0] == 0 and any(layer.bank is not None and layer.bank.mode == "eco" for layer in layers):
            raise ValueError("betas: mode 'eco' keeps its rounding errors in exp_avg, so betas[0] must be above 0")
        weights = [router.get_parameter("weight") for router in routers.values()]
        if not self._layers and not weights:
            raise ValueError(
                "model: nothing to train: no layer has a trainable bank (select neurons and attach them first) and no "
                "router is trained"
            )
        groups: list[dict[str, Any]] = []
        if self._layers:
            groups.append({"params": list(self._layers), "name": "experts", "lr": lr, "weight_decay": weight_decay})
        if weights:
            groups.append({"params": weights, "name": "router", "lr": router_lr, "weight_decay": 0.0})
        self._step_supports_amp_scaling = True  # GradScaler.step then waits for nothing; see step
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": 0.0, "seed": seed})
        device = groups[0]["params"][0].device
        self._changed = torch.zeros((), dtype=torch.int32, device=device)
        self._expected = torch.zeros((), dtype=torch.bool, device=device)
        self._skipped = torch.zeros((), dtype=torch.int32, device=device)
        self._changed_in_host = torch.zeros((), dtype=torch.int32)  # by updates of placement "host"
        self._host_updates: HostUpdates | None = None  # made by the first of them beside a GPU
        self._released: set[nn.Parameter] = set()  # anchors of the layers that step_layer updated in this step
        self._released_inf = torch.zeros((), dtype=torch.float32, device=device)

    def _trained_layers(self) -> dict[nn.Parameter, PagedLayer]:
        return {
            layer.anchor: layer for layer in self._all_layers if layer.bank is not None and layer.bank.grad is not None
        }

    @property
    def num_parameters(self) -> int:
        """Trained weights: bank rows and router weights."""
        rows = sum(layer.bank.num_parameters for layer in self._layers.values() if layer.bank is not None)
        return rows + sum(
            p.numel() for group in self.param_groups if group["name"] == "router" for p in group["params"]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every row whose expert had tokens and of every router weight with a gradient.

        No host wait but for banks in placement "host" and, after gradient checkpointing, for the flags that say whether
        a recompute routed otherwise.

        Layers that `step_layer` updated since the last step are done; were their gradients not finite, the rest is
        skipped too.

        Raises UsafError, changing nothing, when a recompute (gradient checkpointing) routed otherwise than its forward.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_routes(self._all_layers)
        coefficients: dict[nn.Parameter, torch.Tensor] = {}
        found_inf = self._released_inf.clone()
        # torch.amp.GradScaler.step sets these two for the call; grad_scale where gradients are not unscaled yet.
        scaler_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if scaler_inf is not None:
            found_inf = torch.maximum(found_inf, scaler_inf.to(found_inf.device).reshape(()))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter in self._released:
                    continue
                if grad_scale is not None:
                    parameter.grad /= grad_scale
                if group["name"] == "router":
                    found_inf = torch.maximum(found_inf, (~torch.isfinite(parameter.grad).all()).float())
                    continue
                bank = self._layers[parameter].bank
                if bank is None or bank.grad is None:  # taken out for a router warm-up
                    continue
                norm = bank.grad_norm()
                coefficients[parameter] = _coefficient(parameter.grad.double().reshape(()), norm)
                found_inf = torch.maximum(found_inf, _not_finite(norm, coefficients[parameter]))
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["name"] == "experts":
                    if parameter in coefficients:
                        self._step_bank(parameter, group, coefficients[parameter], found_inf)
                elif parameter.grad is not None:
                    self._step_router(parameter, group, found_inf)
        self._skipped.copy_(torch.where(found_inf != 0, self._skipped + 1, 0))
        self._begin_step()
        return loss

    def _begin_step(self) -> None:
        if self._host_updates is not None:
            self._host_updates.finish()
        self._released.clear()
        self._released_inf.zero_()
        self._clear_banks()

    @property
    def released(self) -> frozenset[nn.Parameter]:
        """Anchors of the layers that `step_layer` has updated since the last step."""
        return frozenset(self._released)

    @torch.no_grad()
    def step_layer(
        self, layer: PagedLayer, coefficient: float | torch.Tensor = 1.0, found_inf: torch.Tensor | None = None
    ) -> None:
        """Update one layer's rows now, inside a backward, and clear their gradient (gradient release); no host wait
        in placement "device".

        The same update as `step` makes, which must still be called at the end of the step: it passes over this layer
        and steps what is left. A gradient that is not finite changes no bit of this layer.

        Args:
            layer: one with a bank in place, all of whose micro-batches have gone through backward.
            coefficient: the bank's gradient is multiplied by it: the factor of clipping, over the loss scale. A number
                or a tensor of one element.
            found_inf: float32 of one element; not 0 skips the update. None: as the gradient is.

        Raises:
            ValueError: the layer is not one of this optimizer's, has no bank in place, or was stepped already.
        """
        bank = layer.bank
        if self._layers.get(layer.anchor) is not layer or bank is None or bank.grad is None:
            raise ValueError(f"layer: expected one of this optimizer with its bank in place, got layer {layer.index}")
        if layer.anchor in self._released:
            raise ValueError(f"layer: layer {layer.index} was stepped already since the last step()")
        group = next(group for group in self.param_groups if group["name"] == "experts")
        norm = bank.grad_norm()
        if isinstance(coefficient, torch.Tensor):
            scale = coefficient.to(norm.device, torch.float64).reshape(())
        else:
            scale = torch.full_like(norm, coefficient)
        skip = _not_finite(norm, scale)
        if found_inf is not None:
            skip = torch.maximum(skip, (found_inf.reshape(()) != 0).float())
        self._step_bank(layer.anchor, group, scale, skip)
        self._released.add(layer.anchor)
        self._released_inf = torch.maximum(self._released_inf, skip)
        bank.zero_grad()

    def _step_bank(
        self, anchor: nn.Parameter, group: dict[str, Any], coefficient: torch.Tensor, found_inf: torch.Tensor
    ) -> None:
        layer = self._layers[anchor]
        bank = layer.bank
        assert bank is not None
        state = self.state[anchor]
        if not state:
            state.update(new_state(bank, bank.num_neurons, self.moments))
        if group["lr"] > 0:
            self._expected |= (bank.grad_norm() * coefficient != 0) & (found_inf == 0)
        in_host = bank.placement == "host"
        update = partial(
            ops.masked_adam_,
            bank.state_codes,
            bank.state_absmax,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            format=bank.format,
            mode=bank.mode,
            master=bank.master,
            residual=bank.residual,
            exp_avg_absmax=state.get("exp_avg_absmax"),
            exp_avg_sq_absmax=state.get("exp_avg_sq_absmax"),
            active=bank.active_rows(),
            changed=self._changed_in_host if in_host else self._changed,
            stochastic=bank.rounding == "stochastic",
            seed=group["seed"],
            # All candidates of the layers below: the noise depends neither on their banks nor on the order of stepping.
            first_element=layer.index * bank.num_candidates,
        )

        def run(grad: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
            update(grad, grad_scale=grad_scale, found_inf=skip)

        if in_host and bank.device.type != "cpu":
            if self._host_updates is None:
                self._host_updates = HostUpdates(bank.device)
            self._host_updates.submit(bank, coefficient, found_inf, run)
            return
        assert bank.grad is not None
        run(bank.grad, coefficient.float(), found_inf)
        bank.publish()

    @torch.no_grad()
    def replace_banks(self, banks: Iterable[tuple[PagedLayer, RowBank | None]]) -> None:
        """Give layers of this optimizer's model new banks between steps (re-selection), and set them, one by one.

        Neurons that a layer's present bank has too keep their moments and step counts bit for bit; the others start
        anew. Raises ValueError for a layer of another model.
        """
        for layer, bank in banks:
            if not any(layer is known for known in self._all_layers):
                raise ValueError(f"banks: layer {layer.index} does not belong to the model of this optimizer")
            state = self.state.pop(layer.anchor, {})
            if state and bank is not None:
                assert layer.bank is not None
                self.state[layer.anchor] = carried_state(state, layer.bank, bank, self.moments)
            layer.set_bank(bank)
        self._layers = self._trained_layers()
        for group in self.param_groups:
            if group["name"] == "experts":
                group["params"] = list(self._layers)

    def bank_bytes(self) -> dict[str, int]:
        """Bytes for training the expert rows, {"device": .., "host": ..}: banks, frozen rows, moments (those to come
        at the first step too) and the gradient's copy in host memory."""
        return bank_bytes(self._all_layers, self.moments)

    def _step_router(self, weight: nn.Parameter, group: dict[str, Any], found_inf: torch.Tensor) -> None:
        state = self.state[weight]
        on_gpu = weight.device.type != "cpu"  # the step count too, so that a skipped step needs no host wait
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        touched = [weight, state["exp_avg"], state["exp_avg_sq"], state["step"]]
        before = [tensor.clone() for tensor in touched]
        adamw(
            [weight],
            [weight.grad],  # type: ignore[list-item]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            capturable=on_gpu,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for tensor, old in zip(touched, before):
            tensor.copy_(torch.where(found_inf != 0, old, tensor))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of the banks included, and begin a step anew."""
        super().zero_grad(set_to_none)
        self._begin_step()

    def _clear_banks(self) -> None:
        for anchor, layer in self._layers.items():
            anchor.grad = None
            if layer.bank is not None:
                layer.bank.zero_grad()

    def check_progress(self) -> None:
        """Raise UsafError if training stands still; reads device flags in one wait, so call it where you log.

        Either no bit of any code, scale or master changed since the last call although a step had lr > 0 and a finite
        gradient that was not zero, or MAX_SKIPPED_STEPS steps in a row were skipped for non-finite gradients.
        """
        expected, changed, skipped = read_numbers(self._expected, self._changed, self._skipped)
        changed += int(self._changed_in_host)
        for flag in (self._expected, self._changed, self._changed_in_host):
            flag.zero_()
        if skipped >= MAX_SKIPPED_STEPS:
            raise UsafError(f"the last {skipped:.0f} steps were skipped: their gradients were not finite")
        if expected and not changed:
            raise UsafError(
                "steps with a gradient changed no trained weight: the learning rate is below the weights' resolution "
                "(raise it, or train with float32 masters)"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Raises ValueError, changing nothing, when a moment does not fit its bank or router."""
        params = [p for group in self.param_groups for p in group["params"]]
        rows: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
        for position, entry in state_dict["state"].items():
            if not 0 <= position < len(params):
                raise ValueError(f"state_dict: entry {position}, but there are {len(params)} parameters")
            layer = self._layers.get(params[position])
            bank = None if layer is None else layer.bank
            if bank is not None:
                rows[params[position]] = loaded_state(entry, bank, self.moments, f"state_dict: parameter {position}")
                continue
            wanted = tuple(params[position].shape)
            for name in ("exp_avg", "exp_avg_sq"):
                if tuple(entry[name].shape) != wanted:
                    raise ValueError(
                        f"state_dict: {name} of parameter {position} has shape {tuple(entry[name].shape)}, expected "
                        f"{wanted}: it belongs to another router"
                    )
        of_routers = {n: entry for n, entry in state_dict["state"].items() if params[n] not in rows}
        super().load_state_dict({**state_dict, "state": of_routers})
        for weight, entry in self.state.items():  # torch leaves step counts on the CPU
            entry["step"] = entry["step"].to(weight.device)
        for anchor, entry in rows.items():  # torch's own loading would cast them to the anchor's dtype and device
            self.state[anchor] = entry
