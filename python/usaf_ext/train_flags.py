"""The flags of `usaf-ext train` that are settings of TrainConfig: one for each field, with the field's own default."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .bank import BANK_MODES, GRAD_DTYPES, MASTER_DTYPES, PLACEMENTS, ROUNDINGS
from .moments import MOMENTS
from .router import ROUTER_MODES
from .selection import SELECTION_METRICS, SELECTION_SAMPLINGS, SELECTION_SCOPES
from .step import ACCUMULATION_ORDERS
from .threshold import THRESHOLD_SCOPES
from .train_config import LR_SCHEDULES, TrainConfig


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a fraction or a percentage such as 0.5%, got {text!r}") from None


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else convert(text)

    parse.__name__ = f"{convert.__name__} or none"
    return parse


# Field -> (type or choices, help). Ranges are TrainConfig's to check.
_FLAGS: dict[str, tuple[Callable[[str], Any] | tuple[str, ...], str]] = {
    "steps": (int, "optimiser steps"),
    "batch_size": (int, "sequences a micro-batch"),
    "seq_len": (int, "tokens a sequence"),
    "gradient_accumulation_steps": (int, "micro-batches a step"),
    "accumulation_order": (ACCUMULATION_ORDERS, "layer: all micro-batches of a step share one sweep of the pages"),
    "learning_rate": (float, "of the expert rows"),
    "router_learning_rate": (float, "of the trained router"),
    "weight_decay": (float, "decoupled, of the expert rows"),
    "density": (_share, "share of the expert neurons to train, e.g. 0.5%%; 0 trains the router alone"),
    "importance_batches": (int, "batches on which importance is measured"),
    "selection_scope": (SELECTION_SCOPES, "choose neurons over the whole model or in each layer"),
    "selection_metric": (SELECTION_METRICS, "importance: sum of g^2, sum of |g*w|, or none"),
    "selection_sampling": (SELECTION_SAMPLINGS, "the most important neurons, or a sample in proportion to importance"),
    "activation_threshold": (
        _share,
        "no weight gradient for experts with fewer tokens than this share of the mean; 0: off",
    ),
    "threshold_scope": (THRESHOLD_SCOPES, "tokens of the previous step, or of the micro-batch itself"),
    "router": (ROUTER_MODES, "topk: trained; gumbel: trained with noise on its choice"),
    "router_warmup_steps": (int, "steps that train the router alone first"),
    "aux_loss_coef": (float, "weight of the load-balancing loss while the router is trained"),
    "gumbel_tau_start": (float, "temperature of gumbel's gradient at the first step"),
    "gumbel_tau_end": (float, "and at the last"),
    "lr_schedule": (LR_SCHEDULES, "of the learning rates"),
    "lr_warmup_steps": (int, "linear rise of the learning rates"),
    "max_grad_norm": (_or_none(float), "clip gradients by their global norm; none: no clipping"),
    "mode": (BANK_MODES, "what a trained row keeps beside its codes: a master, a residual, or nothing"),
    "master_dtype": (tuple(MASTER_DTYPES), "of the masters"),
    "rounding": (ROUNDINGS, "of new codes where nothing is kept beside them"),
    "grad_dtype": (tuple(GRAD_DTYPES), "of the trained rows' gradients"),
    "moments": (MOMENTS, "of Adam, for the trained rows"),
    "placement": (PLACEMENTS, "where masters and moments live and the update runs"),
    "reselect_every": (int, "steps between exchanges of trained neurons; 0: none"),
    "reselect_fraction": (_share, "share of the trained neurons that each exchanges"),
    "optimizer": (_or_none(str), "masked_adam, or none: run everything and update nothing"),
    "seed": (int, "of data order, sampling and noise"),
    "checkpoint_every": (int, "steps between checkpoints; 0: at the end"),
    "evaluate_every": (int, "steps between evaluations; 0: at the end"),
}

_SWITCHES = {
    "gradient_checkpointing": "recompute layers in backward",
    "gradient_release": "update a layer's rows inside backward and hold one layer's gradient (order 'layer')",
}


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of TrainConfig."""
    defaults = TrainConfig()
    for name, (kind, text) in _FLAGS.items():
        default = getattr(defaults, name)
        options: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if not isinstance(kind, tuple):
            options["metavar"] = "SHARE" if kind is _share else "N" if kind is int else "X"
        shown = "none" if default is None else default
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=default, help=f"{text} (default: {shown})", **options
        )
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"{text} (default: off)")


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The settings that the flags of add_train_flags ask for. Raises as TrainConfig."""
    return TrainConfig(**{field.name: getattr(arguments, field.name) for field in fields(TrainConfig)})
