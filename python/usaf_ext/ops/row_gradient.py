"""Gradients of single neurons. Neuron j of an expert is gate row j, up row j and down column j: three rows of length
hidden_size (DESIGN section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import require_integers, require_tensors


def row_gradient_(
    grad: Tensor,
    x: Tensor,
    grad_out: Tensor,
    grad_gate_up: Tensor,
    weighted_h: Tensor,
    offsets: Tensor,
    neuron_expert: Tensor,
    neuron_index: Tensor,
    first_expert: int = 0,
) -> None:
    """Add the gradients of the selected neurons of a group of experts to `grad`, in place.

    For neuron i, number j of its expert, over that expert's tokens, summed in fp32 and added with one rounding:
    grad[i, 0] += grad_gate[:, j]^T x, grad[i, 1] += grad_up[:, j]^T x, grad[i, 2] += weighted_h[:, j]^T grad_out.
    Neurons of experts outside the group keep their bits. No double backward: refuses to be differentiated.

    Args:
        grad: float32 or bfloat16 [num_neurons, 3, hidden_size], contiguous.
        x, grad_out: [num_rows, hidden_size], float32 or bfloat16: tokens in permuted order, and the gradient of the
            layer's output for each.
        grad_gate_up: [num_rows, 2 * intermediate_size], same dtype: gate columns, then up columns.
        weighted_h: [num_rows, intermediate_size], same dtype: router weight times hidden activation.
        offsets: int32 [num_experts + 1], ascending: rows offsets[e] - offsets[0] to offsets[e + 1] - offsets[0] belong
            to expert first_expert + e.
        neuron_expert: int32 [num_neurons], ascending, counted over the whole layer.
        neuron_index: int32 [num_neurons], each in [0, intermediate_size).
        first_expert: the group's first expert.

    Raises:
        ValueError: shapes that do not fit, values out of range or order. Nothing is written then.
        TypeError: wrong dtypes.
    """
    require_tensors(grad=grad, x=x, grad_out=grad_out, grad_gate_up=grad_gate_up, weighted_h=weighted_h)
    require_tensors(offsets=offsets, neuron_expert=neuron_expert, neuron_index=neuron_index)
    require_integers(first_expert=first_expert)
    torch.ops.usaf.row_gradient_(
        grad, x, grad_out, grad_gate_up, weighted_h, offsets, neuron_expert, neuron_index, first_expert
    )


def row_importance_(
    importance: Tensor,
    x: Tensor,
    grad_out: Tensor,
    grad_gate_up: Tensor,
    weighted_h: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
) -> None:
    """Add each neuron's importance to `importance`, without keeping a gradient.

    Over the neuron's 3 * hidden_size weights w and their gradients g: the sum of g^2, or, with `weights`, of |g * w|
    (how much a first-order expansion expects the loss to change if the neuron goes).

    Args:
        importance: float32 [num_experts, intermediate_size], contiguous.
        x, grad_out, grad_gate_up, weighted_h, offsets: as for `row_gradient_`.
        weights: [num_experts, 3, intermediate_size, hidden_size] in the dtype of x: gate, up and down^T as the model
            computes with them.

    Raises:
        ValueError: shapes that do not fit, offsets out of range or order. Nothing is written then.
        TypeError: wrong dtypes.
    """
    require_tensors(importance=importance, x=x, grad_out=grad_out, grad_gate_up=grad_gate_up)
    require_tensors(weighted_h=weighted_h, offsets=offsets)
    if weights is not None:
        require_tensors(weights=weights)
    torch.ops.usaf.row_importance_(importance, x, grad_out, grad_gate_up, weighted_h, offsets, weights)


@torch.library.register_fake("usaf::row_gradient_")
def _(
    grad: Tensor,
    x: Tensor,
    grad_out: Tensor,
    grad_gate_up: Tensor,
    weighted_h: Tensor,
    offsets: Tensor,
    neuron_expert: Tensor,
    neuron_index: Tensor,
    first_expert: int = 0,
) -> None:
    return None


@torch.library.register_fake("usaf::row_importance_")
def _(
    importance: Tensor,
    x: Tensor,
    grad_out: Tensor,
    grad_gate_up: Tensor,
    weighted_h: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
) -> None:
    return None
