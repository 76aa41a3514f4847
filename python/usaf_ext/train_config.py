"""TrainConfig: the settings of a run, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from .bank import BANK_MODES, GRAD_DTYPES, MASTER_DTYPES, PLACEMENTS, ROUNDINGS
from .moments import MOMENTS
from .router import ROUTER_MODES
from .selection import SELECTION_METRICS, SELECTION_SAMPLINGS, SELECTION_SCOPES
from .step import ACCUMULATION_ORDERS
from .threshold import THRESHOLD_SCOPES

LR_SCHEDULES = ("cosine", "constant")

# What may differ when a run is resumed: nothing that changes its numbers.
_FREE_ON_RESUME = ("checkpoint_every", "evaluate_every")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`. Raises TypeError or ValueError naming the field that is wrong.

    A step is gradient_accumulation_steps micro-batches of batch_size sequences of seq_len tokens.

    Attributes:
        density: share of all expert neurons to train, over the whole model or per layer (selection_scope); 0 trains the
            router alone.
        selection_metric: importance of a neuron, measured on importance_batches batches: "gradient" (sum of g^2) or
            "gradient_weight" (sum of |g * w|); or "random": no measurement, all neurons are equally likely.
        selection_sampling: "top", or "proportional": a sample without replacement in proportion to importance.
        activation_threshold: an expert with fewer tokens than this share of its layer's mean gets no weight gradient; 0
            for off. threshold_scope: by the counts of the previous "step", or of the micro-batch's own "forward".
        router: "frozen", or trained in fp32: "topk" as the family routes, "gumbel" with noise on the choice (see
            usaf_ext.gumbel). Its first router_warmup_steps steps train it alone.
        gumbel_tau_start, gumbel_tau_end: temperature of "gumbel" in the first and the last step, geometric in between.
        aux_loss_coef: weight of the load-balancing loss while the router is trained.
        lr_warmup_steps, lr_schedule: linear rise, then "cosine" (to 0 at the last step) or "constant". The experts'
            schedule starts after the router's warm-up.
        max_grad_norm: clip by the global norm over expert rows and routers; None for no clipping.
        mode: "master", "residual", "eco" or "in_place" (see RowBank); master_dtype: "bfloat16" or "float32".
        rounding: "stochastic" or "nearest", of eco and in_place. grad_dtype: of the rows' gradients. moments: of the
            expert rows, "fp32" or "8bit". placement: "device", or "host": all but codes and gradients in host memory.
        reselect_every: steps between re-selections, 0 for none (see usaf_ext.reselection), each measured on
            importance_batches batches. reselect_fraction: share of the trained neurons that each exchanges.
        optimizer: "masked_adam", or None: everything runs and nothing is updated (the control).
        accumulation_order: "micro_batch": one micro-batch after another. "layer": all micro-batches of a step go
            through a layer together, so that its pages move once; the same bits. Activations are then held for all of
            them (with gradient_checkpointing: one layer's, and twice hidden_size values a token for the others).
        gradient_release: with accumulation_order "layer", update a layer's rows inside backward, so that only one
            layer's gradient is held. max_grad_norm then bounds each layer's rows, and the routers together, by itself.
        checkpoint_every, evaluate_every: steps; 0 means at the end only (evaluation: and at step 0, always).
    """

    steps: int = 200
    batch_size: int = 8
    seq_len: int = 256
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    router_learning_rate: float = 1e-4
    weight_decay: float = 0.0
    density: float = 0.005
    importance_batches: int = 4
    selection_scope: str = "model"
    selection_metric: str = "gradient"
    selection_sampling: str = "top"
    activation_threshold: float = 0.1
    threshold_scope: str = "step"
    router: str = "frozen"
    router_warmup_steps: int = 0
    gumbel_tau_start: float = 1.0
    gumbel_tau_end: float = 0.5
    aux_loss_coef: float = 1e-3
    lr_schedule: str = "cosine"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    mode: str = "master"
    master_dtype: str = "bfloat16"
    rounding: str = "stochastic"
    grad_dtype: str = "float32"
    moments: str = "fp32"
    placement: str = "device"
    reselect_every: int = 0
    reselect_fraction: float = 0.2
    optimizer: str | None = "masked_adam"
    seed: int = 0
    checkpoint_every: int = 0
    evaluate_every: int = 0
    gradient_checkpointing: bool = False
    accumulation_order: str = "micro_batch"
    gradient_release: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "importance_batches"):
            self._check_int(name, 1)
        for name in ("router_warmup_steps", "lr_warmup_steps", "checkpoint_every", "evaluate_every", "seed"):
            self._check_int(name, 0)
        self._check_int("reselect_every", 0)
        self._check_float("reselect_fraction", 0.0, exclusive=True)
        if self.reselect_fraction >= 1:
            raise ValueError(f"reselect_fraction: expected a number in (0, 1), got {self.reselect_fraction}")
        self._check_int("seq_len", 2)
        for name in ("learning_rate", "router_learning_rate", "weight_decay", "aux_loss_coef", "density"):
            self._check_float(name, 0.0, exclusive=False)
        for name in ("gumbel_tau_start", "gumbel_tau_end"):
            self._check_float(name, 0.0, exclusive=True)
        if self.density > 1:
            raise ValueError(f"density: expected a number in [0, 1], got {self.density}")
        self._check_float("activation_threshold", 0.0, exclusive=False)
        if self.activation_threshold >= 1:
            raise ValueError(f"activation_threshold: expected a number in [0, 1), got {self.activation_threshold}")
        if self.max_grad_norm is not None:
            self._check_float("max_grad_norm", 0.0, exclusive=True)
        for name in ("gradient_checkpointing", "gradient_release"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        choices: dict[str, tuple[str | None, ...]] = {
            "selection_scope": SELECTION_SCOPES,
            "selection_metric": SELECTION_METRICS,
            "selection_sampling": SELECTION_SAMPLINGS,
            "threshold_scope": THRESHOLD_SCOPES,
            "router": ROUTER_MODES,
            "lr_schedule": LR_SCHEDULES,
            "mode": BANK_MODES,
            "master_dtype": tuple(MASTER_DTYPES),
            "rounding": ROUNDINGS,
            "grad_dtype": tuple(GRAD_DTYPES),
            "moments": MOMENTS,
            "placement": PLACEMENTS,
            "optimizer": ("masked_adam", None),
            "accumulation_order": ACCUMULATION_ORDERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.gradient_release and self.accumulation_order != "layer":
            raise ValueError(
                "gradient_release: a layer's gradient is complete inside backward only with accumulation_order "
                f"'layer', got {self.accumulation_order!r}"
            )
        if self.gradient_release and self.optimizer is None:
            raise ValueError("gradient_release: with optimizer None nothing is updated")
        if self.density == 0 and self.router == "frozen":
            raise ValueError(
                "density, router: density 0 trains no expert neuron and a frozen router is not trained either: nothing "
                "would be; set density above 0 or router to 'topk'"
            )
        if self.selection_metric == "random" and self.selection_sampling != "top":
            raise ValueError(
                "selection_sampling: a random selection has no importance to sample by; expected 'top', got "
                f"{self.selection_sampling!r}"
            )
        if self.reselect_every and self.density == 0:
            raise ValueError("reselect_every: with density 0 there are no trained neurons to exchange; set it to 0")
        if self.reselect_every and self.selection_metric == "random":
            raise ValueError("reselect_every: a random selection has no importance to exchange neurons by; set it to 0")
        if self.router_warmup_steps and self.router == "frozen":
            raise ValueError("router_warmup_steps: a frozen router cannot warm up; set router to 'topk'")
        if self.router_warmup_steps and self.density == 0:
            raise ValueError(
                "router_warmup_steps: with density 0 the router trains alone from first to last; set it to 0"
            )
        if self.router_warmup_steps >= self.steps:
            raise ValueError(
                f"router_warmup_steps: expected fewer than steps = {self.steps}, or no expert would be trained; "
                f"got {self.router_warmup_steps}"
            )

    def _check_int(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < smallest:
            raise ValueError(f"{name}: expected at least {smallest}, got {value}")

    def _check_float(self, name: str, bound: float, *, exclusive: bool) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not math.isfinite(value) or value < bound or (exclusive and value == bound):
            raise ValueError(f"{name}: expected a finite number {'>' if exclusive else '>='} {bound}, got {value}")

    def bank_options(self) -> dict[str, Any]:
        """Keyword arguments of RowBank that a delta does not hold."""
        return {
            "rounding": self.rounding,
            "grad_dtype": GRAD_DTYPES[self.grad_dtype],
            "placement": self.placement,
        }

    def reselects_after(self, step: int) -> bool:
        """Whether neurons are exchanged once `step` steps are done: not in the router's warm-up, nor at the end."""
        return (
            self.reselect_every > 0 and self.router_warmup_steps < step < self.steps and step % self.reselect_every == 0
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Raise ValueError unless this config continues the run that was started with `saved`."""
        mine = self.to_json()
        changed = [
            f"{name} (was {saved.get(name)!r}, now {mine.get(name)!r})"
            for name in sorted(set(saved) | set(mine))
            if name not in _FREE_ON_RESUME and saved.get(name) != mine.get(name)
        ]
        if changed:
            raise ValueError(f"config: a run is resumed with the settings it began with; changed: {', '.join(changed)}")

    def rate(self, step: int, first_step: int) -> float:
        """Factor of the learning rate at `step` (from 0), for a schedule that begins at `first_step`."""
        position, length = step - first_step, self.steps - first_step
        if position < self.lr_warmup_steps:
            return max(0.0, (position + 1) / (self.lr_warmup_steps + 1))
        if self.lr_schedule == "constant":
            return 1.0
        progress = (position - self.lr_warmup_steps) / max(1, length - self.lr_warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def gumbel_tau(self, step: int) -> float:
        """Temperature of router "gumbel" at `step` (from 0)."""
        progress = step / max(1, self.steps - 1)
        return self.gumbel_tau_start * (self.gumbel_tau_end / self.gumbel_tau_start) ** progress

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """The schedule over MaskedAdam's groups: routers from the first step, experts after the router's warm-up."""

        def factor(first: int) -> Callable[[int], float]:
            return lambda step: self.rate(step, first)

        firsts = [self.router_warmup_steps if group["name"] == "experts" else 0 for group in optimizer.param_groups]
        return LambdaLR(optimizer, [factor(first) for first in firsts])
