"""Training steps of a model on the virtual-time device: what they take, copy and wait for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import virtual_time
from cards import HALF, Card, Durations, Host, Model

Routing = Sequence[Sequence[int]]  # tokens of each expert, for each layer


def random_routing(model: Model, num_tokens: int, seed: int, spread: float = 1.0, empty: float = 0.05) -> Routing:
    """Tokens per expert, from popularities exp(spread * normal); a share `empty` of the experts gets none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (model.num_layers, model.num_experts)
    popularity = torch.randn(sizes, generator=generator).mul(spread).exp()
    popularity *= torch.rand(sizes, generator=generator) >= empty
    chosen = torch.multinomial(popularity, num_tokens * model.top_k, replacement=True, generator=generator)
    return [layer.bincount(minlength=model.num_experts).tolist() for layer in chosen]


@dataclass(frozen=True)
class Phase:
    """Forward or backward of a step: its end as the compute stream sees it, and what happened in it."""

    seconds: float
    compute_seconds: float
    copy_seconds: float
    stall_seconds: float
    launch_seconds: float
    host_waits: int
    event_calls: int  # records, and waits of streams
    bytes_in: int

    @property
    def bound(self) -> float:
        return max(self.compute_seconds, self.copy_seconds)


@dataclass(frozen=True)
class Step:
    forward: Phase
    backward: Phase
    stalls: tuple[float, ...]  # of backward, by layer, the last first
    wrong_reads: int
    begin: float  # on the simulation's clock

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def bound(self) -> float:
        return self.forward.bound + self.backward.bound

    @property
    def bytes_in(self) -> int:
        return self.forward.bytes_in + self.backward.bytes_in


def slots_in(model: Model, budget: int) -> int:
    """Page slots in `budget` bytes, beside the scratch that an expert is decoded to."""
    return min((budget - model.expert_weights * HALF) // model.page_bytes, model.num_pages)


class Simulation:
    """Steps of `num_tokens` tokens, routed anew in each, with `num_slots` pages on the card."""

    def __init__(
        self, model: Model, card: Card, num_tokens: int, num_slots: int, density: float = 0.01, host: Host | None = None
    ):
        self.model, self.num_tokens, self.num_slots = model, num_tokens, num_slots
        self.work = Durations(model, card, num_tokens, density)
        host = host or Host()
        copy_seconds = model.page_bytes / card.link_bandwidth
        rates = virtual_time.Rates(
            copy_seconds, host.call_seconds, host.event_seconds, host.wake_seconds, host.queue_depth
        )
        self.schedule = virtual_time.Schedule(model.num_layers, model.num_experts, num_slots, rates)

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_) -> None:
        self.schedule.close()

    def step(self, routing: Routing) -> Step:
        work, layers = self.work, range(self.model.num_layers)
        before = self.schedule.figures()
        for layer in layers:
            seconds = [work.expert_forward(n) for n in routing[layer]]
            self._layer(layer, "training_forward", routing[layer], seconds, work.forward_calls, work.dense_forward(), 0)
        self.schedule.launch(work.head(), work.head_calls)
        middle = self.schedule.figures()
        self.schedule.launch(work.head(), work.head_calls)
        stalls, last = [], middle
        for layer in reversed(layers):
            seconds = [work.expert_backward(n) for n in routing[layer]]
            times = (work.dense_forward(), work.dense_backward())
            self._layer(layer, "backward", routing[layer], seconds, work.backward_calls, *times)
            now = self.schedule.figures()
            stalls.append(now.stall_seconds - last.stall_seconds)
            last = now
        phases = (self._phase(middle - before), self._phase(last - middle))
        return Step(*phases, tuple(stalls), last.wrong_reads, before.compute_end)

    def _layer(self, layer, phase, tokens, expert_seconds, expert_calls, before_seconds, after_seconds) -> None:
        calls = (self.work.before_calls, self.work.after_calls)
        work = virtual_time.LayerWork(
            tokens, expert_seconds, expert_calls, before_seconds, calls[0], after_seconds, calls[1]
        )
        self.schedule.run_layer(layer, phase, work)

    def _phase(self, figures: virtual_time.Figures) -> Phase:
        return Phase(
            seconds=figures.compute_end,
            compute_seconds=figures.kernel_seconds,
            copy_seconds=figures.copy_seconds,
            stall_seconds=figures.stall_seconds,
            launch_seconds=figures.launch_seconds,
            host_waits=figures.host_waits,
            event_calls=figures.event_calls,
            bytes_in=figures.page_misses * self.model.page_bytes,
        )
