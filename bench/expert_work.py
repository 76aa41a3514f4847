"""The ops between router and experts, and the gradients of single neurons, beside torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import OpShape, Random, Work, nbytes
from torch import Tensor
from usaf_ext import ops


def _routed(shape: OpShape):
    """hidden, weights, grad_out, the pairs' order by expert, and our permuted rows, offsets and inverse."""
    hidden, index, weights, grad_out = shape.layer.inputs(device=shape.device)
    order = index.flatten().argsort(stable=True)
    return hidden, index, weights, grad_out, order, *ops.expert_gather(hidden, index, shape.layer.num_experts)


def _gather(shape: OpShape) -> Work:
    hidden, index, _, _, _, permuted, offsets, inverse = _routed(shape)
    top_k = shape.layer.top_k

    def torch_gather():
        order = index.flatten().argsort(stable=True)
        return hidden.index_select(0, order // top_k)

    return Work(
        str(shape.layer),
        nbytes(hidden, index, permuted, offsets, inverse),
        lambda: ops.expert_gather(hidden, index, shape.layer.num_experts)[0],
        {"torch": torch_gather},
    )


def _sort(shape: OpShape) -> Work:
    """The gather of 8 columns: what is left is the sort."""
    hidden, index, _, _ = shape.layer.inputs(device=shape.device)
    narrow, top_k = hidden[:, :8].contiguous(), shape.layer.top_k
    permuted, offsets, inverse = ops.expert_gather(narrow, index, shape.layer.num_experts)
    return Work(
        str(shape.layer),
        nbytes(narrow, index, permuted, offsets, inverse),
        lambda: ops.expert_gather(narrow, index, shape.layer.num_experts)[0],
        {"torch": lambda: narrow.index_select(0, index.flatten().argsort(stable=True) // top_k)},
    )


def _scatter(shape: OpShape) -> Work:
    hidden, _, weights, _, order, permuted, _, inverse = _routed(shape)
    top_k = shape.layer.top_k

    def torch_scatter():
        scaled = permuted * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add_(0, order // top_k, scaled)

    return Work(
        str(shape.layer),
        nbytes(permuted, inverse, weights, hidden),
        lambda: ops.expert_scatter(permuted, inverse, weights),
        {"torch": torch_scatter},
        0.05,  # torch rounds each addend and each partial sum to bf16
    )


def _scatter_backward(shape: OpShape) -> Work:
    _, _, weights, grad_out, order, permuted, _, inverse = _routed(shape)
    top_k = shape.layer.top_k

    def torch_backward():
        rows = grad_out.index_select(0, order // top_k)
        grad_weights = torch.empty_like(weights.flatten()).index_copy_(0, order, (rows * permuted).sum(-1))
        return rows * weights.flatten()[order, None], grad_weights.view_as(weights)

    return Work(
        str(shape.layer),
        nbytes(grad_out, permuted, inverse, weights, permuted, weights),
        lambda: torch.ops.usaf.expert_scatter_backward(grad_out, permuted, inverse, weights),
        {"torch": torch_backward},
        0.02,
    )


def _expert_activations(shape: OpShape) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up [N, 2I], grad_h [N, I] in bf16 and row_weight [N] in fp32, N = num_tokens * top_k."""
    random = Random(shape.device, seed=3)
    rows, width = shape.layer.num_tokens * shape.layer.top_k, shape.layer.intermediate_size
    gate_up = random.normal(rows, 2 * width).bfloat16()
    grad_h = random.normal(rows, width).bfloat16()
    return gate_up, grad_h, random.uniform(rows)


def _glu(shape: OpShape) -> Work:
    gate_up, grad_h, _ = _expert_activations(shape)

    def torch_glu():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    size = f"{gate_up.shape[0]} x 2 x {grad_h.shape[1]}, silu"
    return Work(size, nbytes(gate_up, grad_h), lambda: ops.glu(gate_up), {"torch": torch_glu}, 0.01)


def _glu_backward(shape: OpShape) -> Work:
    gate_up, grad_h, row_weight = _expert_activations(shape)

    def torch_backward():
        leaf = gate_up.detach().requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        h = F.silu(gate) * up
        weight = row_weight[:, None].bfloat16()
        h.backward(grad_h * weight)
        return leaf.grad, h.detach() * weight, (h.detach() * grad_h).sum(-1).float()

    size = f"{gate_up.shape[0]} x 2 x {grad_h.shape[1]}, silu"
    moved = nbytes(grad_h, gate_up, row_weight, gate_up, grad_h, row_weight)
    return Work(
        size, moved, lambda: ops.glu_backward(grad_h, gate_up, row_weight=row_weight), {"torch": torch_backward}, 0.03
    )


def _neurons(shape: OpShape) -> tuple[Tensor, Tensor]:
    """The same share of every expert's neurons: int32 neuron_expert, neuron_index."""
    width, experts = shape.layer.intermediate_size, shape.layer.num_experts
    generator = torch.Generator().manual_seed(2)
    count = max(1, round(shape.density * width))
    index = [torch.randperm(width, generator=generator)[:count].sort().values for _ in range(experts)]
    expert = torch.arange(experts, dtype=torch.int32).repeat_interleave(count)
    return expert.to(shape.device), torch.cat(index).int().to(shape.device)


def _row_gradient(shape: OpShape) -> Work:
    _, _, _, _, _, permuted, offsets, _ = _routed(shape)
    grad_gate_up, weighted_h, _ = _expert_activations(shape)
    width, hidden_size = shape.layer.intermediate_size, shape.layer.hidden_size
    grad_out = Random(shape.device, seed=4).normal(*permuted.shape).bfloat16()
    neuron_expert, neuron_index = _neurons(shape)
    grad = torch.zeros(len(neuron_expert), 3, hidden_size, device=shape.device)
    bounds, per_expert = offsets.tolist(), len(neuron_expert) // shape.layer.num_experts

    def ours():
        grad.zero_()
        ops.row_gradient_(grad, permuted, grad_out, grad_gate_up, weighted_h, offsets, neuron_expert, neuron_index)
        return grad

    def torch_rows():
        out = torch.zeros_like(grad)
        for e in range(shape.layer.num_experts):
            rows = slice(bounds[e], bounds[e + 1])
            own = slice(e * per_expert, (e + 1) * per_expert)
            j = neuron_index[own].long()
            out[own, 0] = (grad_gate_up[rows][:, j].t() @ permuted[rows]).float()
            out[own, 1] = (grad_gate_up[rows][:, width + j].t() @ permuted[rows]).float()
            out[own, 2] = (weighted_h[rows][:, j].t() @ grad_out[rows]).float()
        return out

    size = f"{len(neuron_expert)} neurons of {shape.layer}"
    # Of the activations only the trained columns are needed.
    columns = 3 * per_expert * permuted.shape[0] * 2
    return Work(size, nbytes(permuted, grad_out, grad, grad) + columns, ours, {"torch": torch_rows}, 0.02)


def _row_importance(shape: OpShape) -> Work:
    _, _, _, _, _, permuted, offsets, _ = _routed(shape)
    grad_gate_up, weighted_h, _ = _expert_activations(shape)
    width, experts = shape.layer.intermediate_size, shape.layer.num_experts
    grad_out = Random(shape.device, seed=4).normal(*permuted.shape).bfloat16()
    importance = torch.zeros(experts, width, device=shape.device)
    bounds = offsets.tolist()

    def ours():
        importance.zero_()
        ops.row_importance_(importance, permuted, grad_out, grad_gate_up, weighted_h, offsets)
        return importance

    def torch_importance():
        out = torch.zeros_like(importance)
        for e in range(experts):
            rows = slice(bounds[e], bounds[e + 1])
            gate_up = (grad_gate_up[rows].t() @ permuted[rows]).float().square().sum(-1)
            down = (weighted_h[rows].t() @ grad_out[rows]).float().square().sum(-1)
            out[e] = gate_up[:width] + gate_up[width:] + down
        return out

    moved = nbytes(permuted, grad_out, grad_gate_up, weighted_h, importance, importance)
    return Work(str(shape.layer), moved, ours, {"torch": torch_importance}, 0.02)


EXPERT_CASES: dict[str, Callable[[OpShape], Work]] = {
    "gather": _gather,
    "sort": _sort,
    "scatter": _scatter,
    "scatter_backward": _scatter_backward,
    "glu": _glu,
    "glu_backward": _glu_backward,
    "row_gradient": _row_gradient,
    "row_importance": _row_importance,
}
