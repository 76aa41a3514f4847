"""Routers: train them in fp32, balance them, and watch where the tokens go."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

ROUTER_MODES = ("frozen", "topk", "gumbel")
_ROUTER_NAMES = ("gate", "router")  # what families call the sibling of `experts`


class _TrainedRouter:
    """Mixin put before a family's router class: fp32 weights and fp32 logits, whatever the model's dtype or autocast.

    The family's own forward runs on fp32 hidden states, so its choice and normalisation of the top k stay its own;
    returned weights are fp32 too.
    """

    def forward(self, hidden_states, *args, **kwargs):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float(), *args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn, recurse=True):
        # model.to(bfloat16) goes through here: follow the device, keep fp32 (and its bits).
        def keep_float32(tensor):
            moved = fn(tensor)
            if tensor.dtype == torch.float32 and moved.dtype != torch.float32 and moved.is_floating_point():
                return tensor.to(device=moved.device)
            return moved

        return super()._apply(keep_float32, recurse)  # type: ignore[misc]


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers by module name, in layer order: the `gate` or `router` beside each `experts` module.

    Raises ValueError when there is none, or one has no `weight` [num_experts, hidden_size].
    """
    modules = dict(model.named_modules())
    routers: dict[str, nn.Module] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        if leaf != "experts":
            continue
        found = [f"{parent}.{child}".lstrip(".") for child in _ROUTER_NAMES]
        found = [candidate for candidate in found if candidate in modules]
        if not found:
            continue
        weight = getattr(modules[found[0]], "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            kind = type(modules[found[0]]).__name__
            raise ValueError(f"router {found[0]} ({kind}) has no weight [num_experts, hidden_size]: not supported")
        routers[found[0]] = modules[found[0]]
    if not routers:
        raise ValueError("the model has no router: no `gate` or `router` stands beside an `experts` module")
    return routers


def trained_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers that train_routers made trainable, by module name."""
    modules = dict(model.named_modules())
    return {name: module for name, module in modules.items() if issubclass(type(module), _TrainedRouter)}


def train_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Make every router trainable in fp32, in place, and return them by module name.

    Its class becomes a subclass of its own class (so isinstance hooks still find it) that computes in fp32; every
    floating-point parameter and buffer of it becomes fp32, and `weight` (only) requires grad. fp32 survives
    model.to(bfloat16). Doing it twice changes nothing.
    """
    routers = find_routers(model)
    for router in routers.values():
        if isinstance(router, _TrainedRouter):
            continue
        family = type(router)
        for name, parameter in list(router.named_parameters(recurse=False)):
            value = parameter.detach().to(torch.float32)
            setattr(router, name, nn.Parameter(value, requires_grad=name == "weight"))
        for name, buffer in list(router.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                router._buffers[name] = buffer.to(torch.float32)
        router.__class__ = type("Trained" + family.__name__, (_TrainedRouter, family), {"__module__": __name__})
    return routers


@dataclass
class RouterRecord:
    """What the routers said in one forward, in layer order: logits [T, E] and top-k experts [T, K]."""

    logits: list[torch.Tensor]
    index: list[torch.Tensor]


@contextlib.contextmanager
def record_routers(routers: Mapping[str, nn.Module]) -> Iterator[RouterRecord]:
    """Collect the routers' outputs of this thread's forward in the block (a recompute in backward falls outside it)."""
    record = RouterRecord([], [])
    thread = threading.get_ident()

    def keep(module, args, output):
        if threading.get_ident() != thread:  # another micro-batch's
            return
        record.logits.append(output[0])
        record.index.append(output[2])

    handles = [router.register_forward_hook(keep) for router in routers.values()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(logits: Sequence[torch.Tensor], index: Sequence[torch.Tensor]) -> torch.Tensor:
    """E * sum_e f_e * P_e over all tokens of all layers; 0-dim float32, differentiable in the logits.

    logits: per layer [T, E]; index: per layer [T, K], the experts chosen. f_e is the share of tokens that chose e (the
    f sum to K), P_e the mean of softmax(logits)_e: top_k when the load is uniform, up to E when it collapses. Switch
    Transformer, arXiv 2101.03961, equations (4) to (6); over top k and pooled over layers as in transformers.
    """
    if not logits or len(logits) != len(index):
        raise ValueError(f"logits and index must be as many and not empty, got {len(logits)} and {len(index)}")
    num_experts = logits[0].shape[-1]
    num_tokens = sum(layer.shape[0] for layer in logits)
    chosen = torch.zeros(num_experts, dtype=torch.float32, device=logits[0].device)
    probability = torch.zeros_like(chosen)
    for layer_logits, layer_index in zip(logits, index):
        if layer_logits.shape[-1] != num_experts:
            raise ValueError(f"layers differ in their number of experts: {num_experts} and {layer_logits.shape[-1]}")
        flat = layer_index.reshape(-1)
        chosen = chosen.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.float32))
        probability = probability + torch.softmax(layer_logits.float(), dim=-1).sum(0)
    return num_experts * torch.sum(chosen / num_tokens * (probability / num_tokens))


def check_balanceable(routers: dict[str, nn.Module]) -> None:
    """Raise ValueError for routers that a load-balancing loss over softmax does not describe."""
    for name, router in routers.items():
        if hasattr(router, "e_score_correction_bias"):
            raise ValueError(
                f"router {name} ({type(router).__name__}) scores by sigmoid and is balanced by a bias: "
                "set aux_loss_coef to 0"
            )


@dataclass(frozen=True)
class CollapsedLayer:
    """A layer whose load collapsed: experts with next to no tokens, and experts that get most of them."""

    layer: int
    dead: tuple[int, ...]
    swamping: tuple[int, ...]


class LoadTracker:
    """Tokens per expert and layer, summed over forwards; int64 [num_layers, num_experts] on the CPU."""

    # Against the uniform load u = top_k / E a token: dead below DEAD * u, swamping above half way from u to 1.
    DEAD = 0.01

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.num_tokens = 0

    def add(self, layer_counts: Sequence[torch.Tensor], num_tokens: int) -> None:
        """Add one forward: PagedLayer.token_counts of each layer, int32 [E], and the tokens that went through."""
        self.counts += torch.stack(list(layer_counts)).long()
        self.num_tokens += num_tokens

    def share(self) -> torch.Tensor:
        """Share of a layer's (token, slot) pairs per expert: float64 [L, E], rows sum to 1 (0 before any token)."""
        counts = self.counts.double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    def entropy(self) -> list[float]:
        """Per layer, the entropy of `share` over log E: 1 is uniform, 0 is one expert for all tokens."""
        share = self.share()
        return (torch.special.entr(share).sum(1) / math.log(max(share.shape[1], 2))).tolist()

    def collapsed(self) -> list[CollapsedLayer]:
        """Layers with dead or swamping experts (see DEAD); empty when all is well or nothing was counted."""
        layers = []
        for layer, counts in enumerate(self.counts.tolist()):
            if self.num_tokens == 0:
                continue
            uniform = sum(counts) / self.num_tokens / len(counts)
            load = [count / self.num_tokens for count in counts]
            dead = tuple(e for e, value in enumerate(load) if value < self.DEAD * uniform)
            swamping = tuple(e for e, value in enumerate(load) if uniform < 1 and value > (1 + uniform) / 2)
            if dead or swamping:
                layers.append(CollapsedLayer(layer, dead, swamping))
        return layers
