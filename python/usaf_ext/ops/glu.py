"""Gated activations, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import require_flags, require_optional_tensors, require_strings, require_tensors


def glu(gate_up: Tensor, activation: str = "silu", interleaved: bool = False, bias: Tensor | None = None) -> Tensor:
    """h = act(gate) * up, computed in fp32 (formulas in cpp/numerics/activation.h).

    Differentiable in `gate_up`; a bias that requires a gradient is refused (it is frozen here).

    Args:
        gate_up: [num_rows, 2 * intermediate_size], float32 or bfloat16: gate columns, then up columns.
        activation: "silu", "gelu_tanh", or "swiglu_clamped" (gpt-oss).
        interleaved: gate and up columns alternate instead.
        bias: float32 [2 * intermediate_size] in the same order, added first.

    Returns:
        h: [num_rows, intermediate_size] of gate_up's dtype.

    Raises:
        ValueError: shapes that do not fit, unknown activation, a bias that requires a gradient.
        TypeError: wrong dtypes.
    """
    require_tensors(gate_up=gate_up)
    require_optional_tensors(bias=bias)
    require_strings(activation=activation)
    require_flags(interleaved=interleaved)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("bias: expected a tensor that requires no gradient (glu is differentiable in gate_up only)")
    return torch.ops.usaf.glu(gate_up, activation, interleaved, bias)


def glu_backward(
    grad_h: Tensor,
    gate_up: Tensor,
    activation: str = "silu",
    row_weight: Tensor | None = None,
    interleaved: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `glu` inside an expert, where row p was scaled by the router weight w[p] after the down projection.

    Args:
        grad_h: [num_rows, intermediate_size], gate_up's dtype: dL/dh before the router weight (grad_out @ W_down).
        gate_up, activation, interleaved, bias: as given to `glu`.
        row_weight: float32 [num_rows], or None for ones.

    Returns:
        grad_gate_up: as gate_up, dL/d gate_up, with w.
        weighted_h: [num_rows, intermediate_size], w * h, for the gradient of the down rows.
        grad_row_weight: float32 [num_rows], <h, grad_h>, the gradient of w.

    Raises:
        ValueError: shapes that do not fit, unknown activation.
        TypeError: wrong dtypes.
    """
    require_tensors(grad_h=grad_h, gate_up=gate_up)
    require_optional_tensors(row_weight=row_weight, bias=bias)
    require_strings(activation=activation)
    require_flags(interleaved=interleaved)
    return torch.ops.usaf.glu_backward(grad_h, gate_up, activation, interleaved, bias, row_weight)


@torch.library.register_fake("usaf::glu")
def _(gate_up: Tensor, activation: str, interleaved: bool = False, bias: Tensor | None = None) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.register_fake("usaf::glu_backward")
def _(
    grad_h: Tensor,
    gate_up: Tensor,
    activation: str,
    interleaved: bool = False,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_row_weight = gate_up.new_empty((gate_up.shape[0],), dtype=torch.float32)
    return gate_up.new_empty(gate_up.shape), grad_h.new_empty(grad_h.shape), grad_row_weight


def _save(ctx: Any, inputs: tuple[Tensor, str, bool, Tensor | None], output: Tensor) -> None:
    gate_up, ctx.activation, ctx.interleaved, bias = inputs
    ctx.bias_wants_gradient = bias is not None and bias.requires_grad
    ctx.save_for_backward(gate_up, bias)


def _backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, None, None, None]:
    if ctx.bias_wants_gradient:
        raise NotImplementedError("usaf::glu: differentiable in gate_up only; bias must not require a gradient")
    gate_up, bias = ctx.saved_tensors
    grads = torch.ops.usaf.glu_backward(grad_h, gate_up, ctx.activation, ctx.interleaved, bias, None)
    return grads[0], None, None, None


torch.library.register_autograd("usaf::glu", _backward, setup_context=_save)
