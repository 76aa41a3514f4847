"""The training loop: evaluate, choose neurons, warm the router up, train, and go on after a stop, bit for bit."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from .bank import MASTER_DTYPES, RowBank
from .collapse import CollapseMonitor, as_json
from .data import BatchOrder
from .delta import apply_delta, delta_of
from .devices import describe_device, send
from .errors import StoreError, UsafError
from .evaluation import evaluate
from .experts import expert_memory, expert_store, paged_layers
from .gumbel import GumbelNoise, check_gumbel, train_gumbel_routers
from .interrupt import InterruptFlag
from .layer_major import MicroBatchThreads
from .reselection import reselect
from .rng import rng_states, set_rng_states
from .router import LoadTracker, check_balanceable, find_routers, train_routers
from .run_folder import Checkpoint, RunFolder
from .selection import Selection, attach, compute_importance, select_neurons, select_random
from .step import run_micro_batches
from .threshold import ActivationThreshold
from .train_config import TrainConfig
from .train_result import TrainResult, finish_run
from .update import Update

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource

logger = logging.getLogger(__name__)

_PROGRESS_CHECK_STEPS = 10  # how often MaskedAdam.check_progress is asked


class Sequences(Protocol):
    """Training or evaluation data: item i is int64 [seq_len]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> torch.Tensor: ...


def train(
    model: nn.Module,
    dataset: Sequences,
    config: TrainConfig,
    out_dir: str | os.PathLike,
    *,
    eval_datasets: Mapping[str, Sequences] | None = None,
    resume: bool = False,
    originals: ModelSource | None = None,
    base: str | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> TrainResult:
    """Fine-tune the chosen expert neurons (and, unless frozen, the routers) of a model with paged experts.

    Writes `out_dir` (see usaf_ext.run_folder), which must be new or empty, and plots loss.png and expert_load.png
    there. Every parameter but anchors and trained routers is frozen; torch's global generator is seeded. Each
    callback is called with a step's log record after it. On Ctrl-C or SIGTERM the step is finished, a checkpoint is
    saved and KeyboardInterrupt is raised; a second one stops at once.

    resume: continue the newest complete checkpoint of `out_dir` with the same bits as if never stopped; without any
    checkpoint the run begins anew. config must be the run's, but for steps between checkpoints and evaluations.
    originals: the original checkpoint for the masters; by default what the model's loader found.
    base: path of the model for `run.json`; by default what it was loaded from.

    Raises ValueError for data or settings that do not fit, StoreError for a damaged run or another base model,
    UsafError when training stands still or its loss is not finite.
    """
    _check_data(dataset, config)
    _check_routers(model, config)
    if originals is None:
        originals = getattr(model, "usaf_originals", None)
    run = _open_run(model, config, Path(out_dir), base, resume)
    with InterruptFlag() as interrupt:
        trainer = _Trainer(model, dataset, config, run, originals, eval_datasets or {}, callbacks, interrupt)
        checkpoint = run.latest_checkpoint() if resume else None
        last = -1 if checkpoint is None else checkpoint.step
        run.rewrite_log(lambda record: record["step"] <= last)
        if checkpoint is None:
            trainer.begin()
        else:
            trainer.restore(checkpoint)
        with MicroBatchThreads() as threads:
            trainer.threads = threads if config.accumulation_order == "layer" else None
            trainer.run_steps()
    return trainer.finish()


def _check_data(dataset: Sequences, config: TrainConfig) -> None:
    if len(dataset) == 0:
        raise ValueError("dataset: expected at least one sequence")
    first = dataset[0]
    if first.dtype != torch.int64 or tuple(first.shape) != (config.seq_len,):
        raise ValueError(f"dataset: expected int64 [{config.seq_len}] items, got {first.dtype} {tuple(first.shape)}")


def _check_routers(model: nn.Module, config: TrainConfig) -> None:
    if config.router == "frozen":
        return
    routers = find_routers(model)
    if config.router == "gumbel":
        check_gumbel(routers)
    if config.aux_loss_coef > 0:
        check_balanceable(routers)


def _open_run(model: nn.Module, config: TrainConfig, out_dir: Path, base: str | None, resume: bool) -> RunFolder:
    fingerprint = expert_store(model).fingerprint
    if not resume:
        base = base or getattr(model, "name_or_path", None) or None
        if base is not None and os.path.exists(base):
            base = os.path.abspath(base)
        return RunFolder.create(out_dir, config=config.to_json(), base=base, fingerprint=fingerprint)
    if not RunFolder.is_run(out_dir):
        raise ValueError(f"resume: {out_dir} holds no run (it has no run.json)")
    run = RunFolder.open(out_dir)
    if run.fingerprint != fingerprint:
        raise StoreError(f"{out_dir} is a run of another base model ({run.base})")
    config.check_resumes(run.config)
    return run


class _Trainer:
    """One run in progress: the model's banks and routers, the optimizer, and what is logged."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Sequences,
        config: TrainConfig,
        run: RunFolder,
        originals: ModelSource | None,
        eval_datasets: Mapping[str, Sequences],
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        interrupt: InterruptFlag,
    ) -> None:
        self.model, self.dataset, self.config, self.run = model, dataset, config, run
        self.originals, self.eval_datasets = originals, eval_datasets
        self.callbacks, self.interrupt = callbacks, interrupt
        self.layers = paged_layers(model)
        self.device = self.layers[0].device
        self.order = BatchOrder(len(dataset), config.batch_size, config.seed)
        # Loads are counted on the CPU, where the experts' work is scheduled by them.
        self.load = LoadTracker(len(self.layers), self.layers[0].num_experts)
        self.collapse = CollapseMonitor(len(self.layers), self.layers[0].num_experts)
        self.threshold = ActivationThreshold(self.layers, config.activation_threshold, config.threshold_scope)
        self.gumbel = GumbelNoise(config.seed) if config.router == "gumbel" else None
        self.threads: MicroBatchThreads | None = None  # for accumulation order "layer"
        self.had_gradient = False  # in a step since progress was last checked
        self.step = 0
        self.num_candidates = sum(layer.num_experts * layer.intermediate_size for layer in self.layers)
        model.requires_grad_(False)
        for layer in self.layers:
            layer.anchor.requires_grad_(True)
        if config.gradient_checkpointing:
            # transformers renames it. Reentrant checkpointing would drop the load-balancing loss's gradient.
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    # Beginning

    def begin(self) -> None:
        config = self.config
        self._log({"event": "start", "device": describe_device(self.device), "dtype": str(self.layers[0].memory.dtype)})
        torch.manual_seed(config.seed)
        for layer in self.layers:
            layer.set_bank(None)
            layer.set_frozen_bank(None)
        self.evaluate()  # before anything is touched
        self.model.train()
        if config.density > 0:
            selection = self._select()
            attach(
                self.model,
                selection,
                originals=self.originals,
                mode=config.mode,
                master_dtype=MASTER_DTYPES[config.master_dtype],
                **config.bank_options(),
            )
        self._prepare()
        if config.density > 0:
            record = {"neurons": selection.num_neurons, "density": selection.density}
            self._log({"event": "selection", **record, "bank_bytes": self.update.optimizer.bank_bytes()})

    def _select(self) -> Selection:
        config = self.config
        if config.selection_metric == "random":
            sizes = [(layer.num_experts, layer.intermediate_size) for layer in self.layers]
            return select_random(sizes, config.density, config.selection_scope, config.seed)
        batches = self._importance_batches(BatchOrder(len(self.dataset), config.batch_size, config.seed))
        importance = compute_importance(self.model, batches, config.selection_metric)
        return select_neurons(
            importance, config.density, config.selection_scope, config.selection_sampling, config.seed
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        apply_delta(self.model, checkpoint.delta, **self.config.bank_options())
        self.model.train()
        self._prepare()
        self.update.load_state_dict(checkpoint.optimizer, checkpoint.state)
        self.order.load_state_dict(checkpoint.state["order"])
        self.load.counts.copy_(checkpoint.tensors["expert_load"])
        self.load.num_tokens = checkpoint.state["load_tokens"]
        self.collapse.load_state_dict(checkpoint.state["collapse"])
        self.threshold.counts.copy_(checkpoint.tensors["threshold_counts"])
        self.step = checkpoint.step
        set_rng_states(checkpoint.rng, self.device)
        logger.info("resumed at step %d on %s", self.step, describe_device(self.device))

    def _prepare(self) -> None:
        """Routers and optimizer, once the banks are there."""
        config = self.config
        self.routers: dict[str, nn.Module] = {}
        if self.gumbel is not None:
            self.routers = train_gumbel_routers(self.model, self.gumbel)
        elif config.router == "topk":
            self.routers = train_routers(self.model)
        self.update = Update(self.model, self.layers, config)
        self._hold_banks()

    def _hold_banks(self) -> None:
        """Remember the banks, for the router's warm-up takes them out; and count them against the host budget."""
        self.banks: list[RowBank | None] = [layer.bank for layer in self.layers]
        if self.config.placement == "host":
            self.layers[0].memory.reserve_host(self.update.optimizer.bank_bytes()["host"])

    def _importance_batches(self, order: BatchOrder) -> Iterator[torch.Tensor]:
        for _ in tqdm(range(self.config.importance_batches), desc="importance", disable=None):
            if self.interrupt.set_by and self.step == 0:
                raise KeyboardInterrupt("stopped while measuring importance; nothing was trained yet")
            yield self._batch(next(order))

    def _batch(self, numbers: Sequence[int]) -> torch.Tensor:
        return send(torch.stack([self.dataset[i] for i in numbers]), self.device)

    # Steps

    def run_steps(self) -> None:
        config = self.config
        with tqdm(total=config.steps, initial=self.step, desc="training", unit="step", disable=None) as bar:
            while self.step < config.steps:
                record = self._one_step()
                self._log(record)
                if self.collapse.add_step(self.step_load):
                    self._log({"event": "collapse", "layers": as_json(self.collapse.collapsed)})
                bar.update()
                bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=f"{record['tokens_per_second']:.0f}")
                done = self.step == config.steps
                if config.reselects_after(self.step):
                    self._reselect()
                if done or (config.evaluate_every and self.step % config.evaluate_every == 0):
                    self.evaluate()
                if not self.update.is_control and (done or self.step % _PROGRESS_CHECK_STEPS == 0):
                    self._check_progress()
                if done or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self.save()
                for callback in self.callbacks:
                    callback(record)
                if self.interrupt.set_by and not done:
                    self._stop()

    def _reselect(self) -> None:
        config = self.config
        # An order of its own for each step: what is drawn does not depend on where the run was resumed.
        batches = self._importance_batches(BatchOrder(len(self.dataset), config.batch_size, config.seed + self.step))
        importance = compute_importance(self.model, batches, config.selection_metric, keep_banks=True)
        done = reselect(
            self.model,
            self.update.optimizer,
            importance,
            fraction=config.reselect_fraction,
            scope=config.selection_scope,
            originals=self.originals,
            master_dtype=MASTER_DTYPES[config.master_dtype],
        )
        self._hold_banks()
        self._log({"event": "reselection", **asdict(done), "bank_bytes": self.update.optimizer.bank_bytes()})

    def _check_progress(self) -> None:
        self.update.optimizer.check_progress()
        if not self.had_gradient:
            raise UsafError(
                f"step {self.step}: nothing is trained, every gradient of the latest steps was zero (no token reached "
                "an expert with chosen neurons, or the router's weights of its top k are constant)"
            )
        self.had_gradient = False

    def _stop(self) -> None:
        path = self.save()
        message = f"stopped by {self.interrupt.set_by} after step {self.step}; saved {path}. Continue with resume=True"
        logger.warning("%s (command line: usaf-ext train --out %s --resume)", message, self.run.path)
        raise KeyboardInterrupt(message)

    def _one_step(self) -> dict[str, Any]:
        config = self.config
        warming_up = self.step < config.router_warmup_steps
        self._set_banks(not warming_up)
        stats_before, start = expert_memory(self.model).stats(), time.perf_counter()
        balanced = self.routers if config.aux_loss_coef > 0 else {}
        step_load = self.step_load = LoadTracker(len(self.layers), self.layers[0].num_experts)
        batches = [self._batch(next(self.order)) for _ in range(config.gradient_accumulation_steps)]
        if self.gumbel is not None:
            self.gumbel.begin_step(self.step, config.gumbel_tau(self.step))
        losses = run_micro_batches(
            self.model,
            batches,
            self.layers,
            balanced,
            config.aux_loss_coef,
            (step_load, self.load),
            threads=self.threads,
            scale=self.update.scale,
            after_backward=self.update.after_backward,
            gumbel=self.gumbel,
        )
        masked = self.threshold.end_step(step_load.counts)
        update = self.update.step(losses)
        self.had_gradient |= update["grad_norm"] != 0
        self.step += 1
        seconds = time.perf_counter() - start
        stats = expert_memory(self.model).stats()
        if not math.isfinite(update["loss"]):
            raise UsafError(f"the training loss of step {self.step} is {update['loss']}")
        if not balanced:
            del update["aux_loss"]
        num_tokens = config.gradient_accumulation_steps * config.batch_size * config.seq_len
        record: dict[str, Any] = {
            "event": "step",
            "step": self.step,
            "phase": "router_warmup" if warming_up else "train",
            **update,
            "learning_rate": 0.0 if warming_up else update["learning_rate"],
            "tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "load_entropy": step_load.entropy(),
            "masked_experts": masked,
            **{name: stats[name] - stats_before[name] for name in stats},
        }
        if self.gumbel is not None:
            record["gumbel_tau"] = self.gumbel.tau
        return record

    def _set_banks(self, on: bool) -> None:
        """Banks out while only the router trains: no row gradients, no change. Their codes equal the pages' then."""
        for layer, bank in zip(self.layers, self.banks):
            wanted = bank if on else None
            if layer.bank is not wanted:
                layer.set_bank(wanted)

    # What is written

    def _log(self, record: dict[str, Any]) -> None:
        self.run.log({"step": self.step, **record})

    def evaluate(self) -> None:
        for name, dataset in self.eval_datasets.items():
            sequences = [dataset[i] for i in range(len(dataset))]
            loss = evaluate(self.model, sequences, self.config.batch_size)
            self._log({"event": "evaluation", "name": name, "loss": loss})
            logger.info("step %d: loss on %s is %.4f", self.step, name, loss)

    def save(self) -> Path:
        self._set_banks(True)
        state: dict[str, Any] = {
            "order": self.order.state_dict(),
            "load_tokens": self.load.num_tokens,
            "collapse": self.collapse.state_dict(),
            **self.update.state_dict(),
        }
        tensors = {"expert_load": self.load.counts, "threshold_counts": self.threshold.counts}
        optimizer = None if self.update.is_control else self.update.optimizer.state_dict()
        return self.run.save_checkpoint(
            Checkpoint(self.step, delta_of(self.model), optimizer, state, tensors, rng_states(self.device))
        )

    def finish(self) -> TrainResult:
        return finish_run(
            self.run,
            self.load,
            steps=self.step,
            trained_parameters=self.update.num_parameters,
            density=sum(bank.num_neurons for bank in self.banks if bank is not None) / self.num_candidates,
            device=describe_device(self.device),
            collapsed=self.collapse.finish(),
        )
