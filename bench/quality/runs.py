"""One run: load, measure before, train, measure after. Library cells go through usaf_ext.train; the emulated block
unit, the LoRA peer and full fine-tuning through the loop below, which does what usaf_ext.train does without a router.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from block_unit import BOOKKEEPING_BYTES, BlockUnit, block_importance
from lora import add_lora
from material import MODEL, Texts, losses, source, texts
from state_bytes import add_banks, add_moments, add_weights, empty_state
from torch import nn
from transformers import AutoModelForCausalLM
from usaf_ext import MaskedAdam, TrainConfig, paged_layers, train
from usaf_ext.bank import MASTER_DTYPES
from usaf_ext.data import BatchOrder
from usaf_ext.errors import UsafError
from usaf_ext.loading import load_model
from usaf_ext.loss import causal_lm_loss
from usaf_ext.router import trained_routers
from usaf_ext.run_folder import RunFolder
from usaf_ext.selection import attach, compute_importance, select_neurons

# What a run may come to instead of a loss; any other error is a defect and stops its cell.
_OUTCOMES = {
    "the training loss of step": "diverged",
    "the evaluation loss is": "diverged",
    "steps were skipped": "diverged",
    "changed no trained weight": "stalled",
}

# What the loop below does not do.
_HANDLED = {
    "router": "frozen",
    "activation_threshold": 0.0,
    "gradient_accumulation_steps": 1,
    "reselect_every": 0,
    "placement": "device",
}


@dataclass
class Trained:
    """What a kind of run hands back."""

    loss: dict[str, float]
    state: dict[str, float]
    num_parameters: int
    density: float | None  # share of the expert weights
    training_seconds: float


def perform(settings: dict[str, Any], rates: dict[str, float], seed: int) -> dict[str, Any]:
    """The run's record but for its key; see cells.Cell.settings and README.md beside this file."""
    started, load_average = time.perf_counter(), os.getloadavg()[0]
    chosen = {name: value for name, value in rates.items() if name != "lora_learning_rate"}
    config = TrainConfig(**settings["config"], **chosen, seed=seed)
    data = texts(config.seq_len)
    record: dict[str, Any] = {"config": asdict(config), "load_average_at_start": load_average}
    try:
        trained = _KINDS[settings["kind"]](settings, config, rates, data)
    except (UsafError, FloatingPointError) as error:
        outcome = next((name for part, name in _OUTCOMES.items() if part in str(error)), None)
        if outcome is None:
            raise
        return {**record, "outcome": outcome, "error": str(error), "seconds": time.perf_counter() - started}
    return {
        **record,
        "outcome": "ok",
        "loss": trained.loss,
        "trained_parameters": trained.num_parameters,
        "density": trained.density,
        "state_bytes": trained.state,
        "seconds": time.perf_counter() - started,
        "training_seconds": trained.training_seconds,
    }


def _quantised(settings: dict[str, Any]) -> nn.Module:
    return load_model(MODEL, format=settings["format"], dtype=torch.float32).model


def _neurons(settings: dict[str, Any], config: TrainConfig, rates: dict[str, float], data: Texts) -> Trained:
    model = _quantised(settings)
    with tempfile.TemporaryDirectory() as scratch:
        result = train(
            model, data.train, config, Path(scratch) / "run", eval_datasets=data.heldout(), originals=source()
        )
        run = RunFolder.open(result.out_dir)
        training_seconds = sum(r["seconds"] for r in run.log_records() if r["event"] == "step")
        checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.optimizer is not None
    state = empty_state()
    add_banks(state, (layer.bank for layer in paged_layers(model) if layer.bank is not None))
    add_weights(state, (router.get_parameter("weight") for router in trained_routers(model).values()))
    add_moments(state, checkpoint.optimizer["state"])
    loss = {
        f"{name}_{when}": result.evaluations[name][step]
        for name in data.heldout()
        for when, step in (("before", 0), ("after", config.steps))
    }
    return Trained(loss, state, result.trained_parameters, result.density, training_seconds)


def _batch(sequences: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    return torch.stack([sequences[number] for number in numbers])


def _importance_batches(config: TrainConfig, data: Texts) -> list[torch.Tensor]:
    order = BatchOrder(len(data.train), config.batch_size, config.seed)
    return [_batch(data.train, next(order)) for _ in range(config.importance_batches)]


def fit(
    model: nn.Module,
    sequences: Sequence[torch.Tensor],
    config: TrainConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    before_clipping: Callable[[], None] | None = None,
) -> float:
    """Train; returns the seconds taken. Parameter groups need a "name" (their learning-rate schedule's)."""
    order = BatchOrder(len(sequences), config.batch_size, config.seed)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    schedulers = [config.scheduler(optimizer) for optimizer in optimizers]
    started = time.perf_counter()
    for step in range(1, config.steps + 1):
        total, count = causal_lm_loss(model, _batch(sequences, next(order)))
        loss = total / int(count)
        loss.backward()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the training loss of step {step} is {loss.item()}")
        if before_clipping is not None:
            before_clipping()
        assert config.max_grad_norm is not None
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], config.max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return time.perf_counter() - started


def _prepare(model: nn.Module, config: TrainConfig) -> None:
    for name, handled in _HANDLED.items():
        if getattr(config, name) != handled:
            raise ValueError(f"{name}: the study's own loop handles {handled!r} only, got {getattr(config, name)!r}")
    torch.manual_seed(config.seed)
    model.requires_grad_(False)
    model.train()


def _enable_anchors(model: nn.Module) -> None:
    for layer in paged_layers(model):
        layer.anchor.requires_grad_(True)


def _attach_neurons(model: nn.Module, config: TrainConfig, data: Texts) -> MaskedAdam:
    _enable_anchors(model)
    importance = compute_importance(model, _importance_batches(config, data), config.selection_metric)
    selection = select_neurons(
        importance, config.density, config.selection_scope, config.selection_sampling, config.seed
    )
    attach(
        model,
        selection,
        originals=source(),
        mode=config.mode,
        master_dtype=MASTER_DTYPES[config.master_dtype],
        **config.bank_options(),
    )
    return _masked_adam(model, config)


def _masked_adam(model: nn.Module, config: TrainConfig) -> MaskedAdam:
    return MaskedAdam(
        model, lr=config.learning_rate, weight_decay=config.weight_decay, moments=config.moments, seed=config.seed
    )


def _adamw(parameters: Sequence[nn.Parameter], lr: float, name: str, config: TrainConfig) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters), "name": name}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay)


def _lora(settings: dict[str, Any], config: TrainConfig, rates: dict[str, float], data: Texts) -> Trained:
    model = _quantised(settings)
    loss = losses(model, data, "before", config.batch_size)
    _prepare(model, config)
    optimizers: list[torch.optim.Optimizer] = []
    if settings["kind"] == "lora+neurons":
        optimizers.append(_attach_neurons(model, config, data))
    parameters = add_lora(model, settings["lora_rank"])
    optimizers.append(_adamw(parameters, rates["lora_learning_rate"], "lora", config))
    seconds = fit(model, data.train, config, optimizers)
    banks = [layer.bank for layer in paged_layers(model) if layer.bank is not None]
    state = empty_state()
    add_banks(state, banks)
    add_weights(state, parameters)
    for optimizer in optimizers:
        add_moments(state, optimizer.state)
    in_banks = sum(bank.num_parameters for bank in banks)
    return Trained(
        loss | losses(model, data, "after", config.batch_size),
        state,
        in_banks + sum(p.numel() for p in parameters),
        in_banks / _expert_weights(model),
        seconds,
    )


def _expert_weights(model: nn.Module) -> int:
    return sum(3 * layer.num_experts * layer.intermediate_size * layer.hidden_size for layer in paged_layers(model))


def _block(settings: dict[str, Any], config: TrainConfig, rates: dict[str, float], data: Texts) -> Trained:
    model = _quantised(settings)
    loss = losses(model, data, "before", config.batch_size)
    _prepare(model, config)
    _enable_anchors(model)
    unit = BlockUnit(
        model,
        block_importance(model, _importance_batches(config, data)),
        config.density,
        originals=source(),
        mode=config.mode,
        master_dtype=MASTER_DTYPES[config.master_dtype],
    )
    optimizer = _masked_adam(model, config)
    seconds = fit(model, data.train, config, [optimizer], unit.mask_gradients)
    unit.check_untrained(optimizer)
    state = empty_state()
    add_banks(state, (layer.bank for layer in unit.masks))
    add_moments(state, optimizer.state)
    share = unit.num_parameters / optimizer.num_parameters
    state = {part: value * share for part, value in state.items()}
    state["bookkeeping"] = BOOKKEEPING_BYTES * unit.num_blocks
    return Trained(
        loss | losses(model, data, "after", config.batch_size),
        state,
        unit.num_parameters,
        unit.num_parameters / _expert_weights(model),
        seconds,
    )


def _full(settings: dict[str, Any], config: TrainConfig, rates: dict[str, float], data: Texts) -> Trained:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    loss = losses(model, data, "before", config.batch_size)
    _prepare(model, config)
    parameters = [p.requires_grad_(True) for name, p in model.named_parameters() if ".experts." in name]
    optimizer = _adamw(parameters, config.learning_rate, "experts", config)
    seconds = fit(model, data.train, config, [optimizer])
    state = empty_state()
    add_weights(state, parameters)
    add_moments(state, optimizer.state)
    return Trained(
        loss | losses(model, data, "after", config.batch_size), state, sum(p.numel() for p in parameters), 1.0, seconds
    )


_KINDS = {"neurons": _neurons, "blocks": _block, "lora": _lora, "lora+neurons": _lora, "full": _full}
