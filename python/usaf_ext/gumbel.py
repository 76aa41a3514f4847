"""Gumbel routing: the trained router explores by noise on its logits, and its gradient is that of the relaxed choice.

Straight-through Gumbel top-k (Jang et al., arXiv 1611.01144; Kool et al., arXiv 1903.06059), with logits z, Gumbel
noise g and temperature tau, for one token:

    chosen   = top k of (z + g) / tau             a sample of k experts without replacement from softmax(z)
    forward  = the family's own weights of the chosen experts, from z without noise: as in evaluation
    backward = m * softmax over the chosen experts of (z + g) / tau, where m is the sum of the forward weights

so a token is mixed as evaluation would mix it, had it chosen the same experts. m is 1 for a family that renormalises
its top k; it is held constant in backward, so experts that were not computed get no gradient. At tau = 1 without noise
the gradient is the family's own, with m held constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from . import ops
from .errors import UsafError
from .router import find_routers, train_routers

_PROBE_TOKENS = 64


class GumbelNoise:
    """The noise of a model's routers: a function of (seed, step, micro-batch, layer, token, expert) alone.

    A recompute under gradient checkpointing, and a run that was resumed, therefore draw the same noise; torch's
    generators are never touched. Call `begin_step` before each optimiser step, and set `micro_batch` before each
    forward of it (and before its backward, where that does not follow at once).

    Attributes:
        seed: any 64-bit int. step: of the latest begin_step; None before the first. tau: temperature of the gradient.
        micro_batch: number within the step, from 0.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {seed!r}")
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed: expected a 64-bit int, got {seed}")
        self.seed = seed
        self.step: int | None = None
        self.micro_batch = 0
        self.tau = 1.0

    def begin_step(self, step: int, tau: float) -> None:
        """Draw the noise of `step` (from 0) from now on. Raises ValueError unless tau is finite and above 0."""
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step: expected an int, got {step!r}")
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        if not 0 < tau < math.inf:
            raise ValueError(f"tau: expected a finite number > 0, got {tau}")
        self.step, self.micro_batch, self.tau = step, 0, tau

    def draw(self, layer: int, like: torch.Tensor) -> torch.Tensor:
        """Gumbel noise -log(-log u) for the logits `like` [num_tokens, num_experts]: float32, on their device."""
        if self.step is None:
            raise UsafError("a gumbel router runs in training mode, but GumbelNoise.begin_step was never called")
        uniform = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        ops.router_uniform_(uniform, seed=self.seed, step=self.step, micro_batch=self.micro_batch, layer=layer)
        return -torch.log(-torch.log(uniform))


def gumbel_top_k(
    logits: torch.Tensor, noise: torch.Tensor, top_k: int, tau: float, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, top_k] and experts int64 [T, top_k] of the estimator above; differentiable in `logits`.

    logits, noise: [T, E], float32. renormalise: the family's forward weights are a softmax over the chosen experts;
    else they are the chosen entries of the softmax over all. Raises ValueError for shapes or a top_k that do not fit.
    """
    if logits.dim() != 2 or noise.shape != logits.shape:
        raise ValueError(f"logits and noise must be [T, E], got {tuple(logits.shape)} and {tuple(noise.shape)}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: expected 1 to {logits.shape[1]}, got {top_k}")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau: expected a finite number > 0, got {tau}")
    perturbed = logits + noise
    index = perturbed.detach().topk(top_k, dim=-1).indices
    forward = torch.softmax(logits.detach(), dim=-1).gather(-1, index)
    if renormalise:
        forward = forward / forward.sum(-1, keepdim=True)
    relaxed = forward.sum(-1, keepdim=True) * torch.softmax(perturbed.gather(-1, index) / tau, dim=-1)
    return forward + (relaxed - relaxed.detach()), index


class _GumbelRouter:
    """Mixin put before a trained router's class: in training mode its choice and weights are `gumbel_top_k`'s."""

    gumbel_noise: GumbelNoise
    gumbel_layer: int
    gumbel_renormalises: bool
    training: bool

    def forward(self, hidden_states, *args, **kwargs):
        logits, weights, index = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if not self.training:
            return logits, weights, index
        noise = self.gumbel_noise.draw(self.gumbel_layer, logits)
        weights, index = gumbel_top_k(logits, noise, index.shape[-1], self.gumbel_noise.tau, self.gumbel_renormalises)
        return logits, weights, index


def family_renormalises(name: str, router: nn.Module) -> bool:
    """Whether a router's weights are a softmax over its top k (True) or the top k of a softmax over all (False).

    Found by running it on random tokens, so that no list of families is needed. Raises ValueError, naming its class,
    for any other router (sigmoid scores, a choice within groups, a scale) and for a top k of 1, where the softmax
    over the chosen experts is constant and no gradient reaches the router.
    """
    kind = next(base.__name__ for base in type(router).__mro__ if not base.__module__.startswith("usaf_ext."))
    state = {key: value.detach().float() for key, value in [*router.named_parameters(), *router.named_buffers()]}
    num_experts, hidden_size = state["weight"].shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_experts, hidden_size, generator=generator) * hidden_size**-0.5
    hidden = torch.randn(_PROBE_TOKENS, hidden_size, generator=generator).to(state["weight"])
    with torch.no_grad():
        output = torch.func.functional_call(router, state | {"weight": weight.to(state["weight"])}, (hidden,))
    if not isinstance(output, tuple) or len(output) != 3 or tuple(output[0].shape) != (_PROBE_TOKENS, num_experts):
        raise ValueError(f"router {name} ({kind}) does not return (logits, weights, experts): 'gumbel' needs them")
    logits, weights, index = output
    if index.shape[-1] == 1:
        raise ValueError(f"router {name} ({kind}) chooses one expert a token: 'gumbel' needs a top k of at least 2")
    top = logits.topk(index.shape[-1], dim=-1).indices
    chosen = torch.softmax(logits, dim=-1).gather(-1, index)
    if torch.equal(index.sort(-1).values, top.sort(-1).values):
        if torch.allclose(weights, chosen / chosen.sum(-1, keepdim=True), rtol=1e-4, atol=0.0):
            return True
        if torch.allclose(weights, chosen, rtol=1e-4, atol=0.0):
            return False
    raise ValueError(
        f"router {name} ({kind}) is not a softmax over a plain top k (it scores by sigmoid, chooses within groups, or "
        "scales its weights): 'gumbel' does not describe it; use 'topk'"
    )


def check_gumbel(routers: Mapping[str, nn.Module]) -> dict[str, bool]:
    """`family_renormalises` of each router that has no Gumbel routing yet."""
    return {
        name: family_renormalises(name, router)
        for name, router in routers.items()
        if not isinstance(router, _GumbelRouter)
    }


def train_gumbel_routers(model: nn.Module, noise: GumbelNoise) -> dict[str, nn.Module]:
    """`train_routers`, with Gumbel routing by `noise` in training mode; in evaluation the routers are the family's.

    Doing it again replaces the noise. Raises ValueError as `family_renormalises`, before anything is changed.
    """
    routers = find_routers(model)
    renormalises = check_gumbel(routers)
    train_routers(model)
    for layer, (name, router) in enumerate(routers.items()):
        router.gumbel_noise, router.gumbel_layer = noise, layer  # type: ignore[assignment]
        if name in renormalises:
            router.gumbel_renormalises = renormalises[name]  # type: ignore[assignment]
            trained = type(router)
            router.__class__ = type("Gumbel" + trained.__name__, (_GumbelRouter, trained), {"__module__": __name__})
    return routers
