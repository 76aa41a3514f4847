"""Uniform random numbers of the counter RNG, for noise on router logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import require_integers, require_tensors


def router_uniform_(out: Tensor, *, seed: int, step: int, micro_batch: int, layer: int) -> None:
    """Fill `out` with uniform numbers from the middle of (0, 1): [2^-24, 1 - 2^-24], 23 random bits each.

    out[t, e] is a function of (seed, step, micro_batch, layer, t, e) alone (Philox 4x32-10, cpp/numerics/rng.h): the
    same bits for any number of threads or tokens and on every backend, and never those of masked_adam_'s rounding.

    Args:
        out: float32 [num_tokens, num_experts], contiguous; overwritten.
        seed: any 64-bit integer.
        step, micro_batch, layer: in [0, 2^31).

    Raises:
        ValueError: a counter out of range, an `out` of another shape or more than 2^34 numbers.
        TypeError: wrong types. Nothing is written in either case.
    """
    require_tensors(out=out)
    require_integers(seed=seed, step=step, micro_batch=micro_batch, layer=layer)
    torch.ops.usaf.router_uniform_(out, seed=seed, step=step, micro_batch=micro_batch, layer=layer)


@torch.library.register_fake("usaf::router_uniform_")
def _(out: Tensor, *, seed: int, step: int, micro_batch: int, layer: int) -> None:
    return None
