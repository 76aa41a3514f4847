"""Tokens to experts and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import require_integers, require_optional_tensors, require_tensors


def expert_gather(x: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, slot) pairs by expert (a stable counting sort) and copy each pair's token there.

    Differentiable in `x`: its gradient is `expert_scatter(grad, inverse)`.

    Args:
        x: [num_tokens, hidden_size], float32 or bfloat16.
        index: int64 [num_tokens, top_k]: the expert of each pair, or `num_experts`, which means "not here".
        num_experts: number of experts.

    Returns:
        permuted: [num_tokens * top_k, hidden_size], x's dtype. Rows past the last expert's are zeros.
        offsets: int32 [num_experts + 1]; expert e owns rows offsets[e] to offsets[e + 1].
        inverse: int32 [num_tokens, top_k]: the pair's row in `permuted`, or -1 for "not here".

    Raises:
        ValueError: an index out of range, shapes that do not fit.
        TypeError: wrong dtypes.
    """
    require_tensors(x=x, index=index)
    require_integers(num_experts=num_experts)
    return torch.ops.usaf.expert_gather(x, index, num_experts)


def expert_scatter(permuted: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Combine rows back to tokens: out[t] = sum over k of weights[t, k] * permuted[inverse[t, k]].

    k ascends, sums are fp32 and rounded once, so the bits do not depend on threads. Differentiable in `permuted` and
    `weights`.

    Args:
        permuted: [num_rows, hidden_size], float32 or bfloat16.
        inverse: int32 [num_tokens, top_k]: distinct rows of `permuted`, or -1 (left out).
        weights: [num_tokens, top_k], float32 or bfloat16; None means ones (the adjoint of `expert_gather`).

    Returns:
        [num_tokens, hidden_size] of permuted's dtype.

    Raises:
        ValueError: a row out of range or named twice, shapes that do not fit.
        TypeError: wrong dtypes.
    """
    require_tensors(permuted=permuted, inverse=inverse)
    require_optional_tensors(weights=weights)
    return torch.ops.usaf.expert_scatter(permuted, inverse, weights)


@torch.library.register_fake("usaf::expert_gather")
def _(x: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    permuted = x.new_empty((index.numel(), x.shape[1]))
    return (
        permuted,
        index.new_empty((num_experts + 1,), dtype=torch.int32),
        index.new_empty(index.shape, dtype=torch.int32),
    )


@torch.library.register_fake("usaf::expert_scatter")
def _(permuted: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    return permuted.new_empty((inverse.shape[0], permuted.shape[1]))


@torch.library.register_fake("usaf::expert_scatter_backward")
def _(grad_out: Tensor, permuted: Tensor, inverse: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    grad_weights = weights if weights is not None else inverse.to(torch.float32)
    return permuted.new_empty(permuted.shape), grad_weights.new_empty(inverse.shape)


def _save_gather(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])


def _gather_backward(ctx: Any, grad_permuted: Tensor, _offsets: None, _inverse: None) -> tuple[Tensor, None, None]:
    (inverse,) = ctx.saved_tensors
    return torch.ops.usaf.expert_scatter(grad_permuted, inverse, None), None, None


def _save_scatter(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scatter_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, Tensor | None]:
    permuted, inverse, weights = ctx.saved_tensors
    grads = torch.ops.usaf.expert_scatter_backward(grad_out, permuted, inverse, weights)
    return grads[0], None, None if weights is None else grads[1]


torch.library.register_autograd("usaf::expert_gather", _gather_backward, setup_context=_save_gather)
torch.library.register_autograd("usaf::expert_scatter", _scatter_backward, setup_context=_save_scatter)
