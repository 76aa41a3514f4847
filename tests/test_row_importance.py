"""row_importance_ in bfloat16, through GEMMs on panels where the CPU has them and through the kernel elsewhere: tails
in every direction, experts without tokens, any number of threads."""

from __future__ import annotations

import oracles
import pytest
import torch
from devices import cpu_only, ops
from test_ops_row_gradient import all_gradients, operands

pytestmark = pytest.mark.usefixtures("device")

# tokens per expert, hidden_size, intermediate_size
CASES = [
    ([33, 0, 1, 64], 200, 70),
    ([0, 31, 0], 64, 64),  # whole panels, an odd number of tokens
    ([5], 129, 1),
    ([7, 32], 63, 65),
    ([513, 0, 1030], 65, 66),  # more tokens than one GEMM takes
    ([600, 40], 2048, 8),
    ([9, 4], 0, 6),
]
METRICS = ["gradient", "gradient_weight"]


def importance_inputs(case, metric):
    """importance to add to, the op's activations and weights (None for the metric "gradient")."""
    tokens, hidden_size, intermediate_size = case
    importance = torch.rand(len(tokens), intermediate_size)
    weights = torch.randn(len(tokens), 3, intermediate_size, hidden_size).bfloat16()
    return importance, operands(*case, torch.bfloat16), weights if metric == "gradient_weight" else None


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(isa, case, metric):
    importance, inputs, weights = importance_inputs(case, metric)
    gradients = all_gradients(*inputs)
    terms = gradients.square() if weights is None else (gradients * weights.double().transpose(1, 2)).abs()
    expected = importance.double() + terms.sum((2, 3))
    before = importance.clone()
    ops.row_importance_(importance, *inputs, weights)
    torch.testing.assert_close(importance.double(), expected, rtol=3e-6, atol=0)
    empty = torch.tensor([count == 0 for count in case[0]])
    assert torch.equal(importance[empty], before[empty])


@cpu_only
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_for_any_thread_count(isa, case, metric):
    importance, inputs, weights = importance_inputs(case, metric)

    def run():
        result = importance.clone()
        ops.row_importance_(result, *inputs, weights)
        return [result]

    assert oracles.same_for_any_threads(run)


@pytest.mark.parametrize("metric", METRICS)
def test_an_expert_alone_has_the_same_bits(metric):
    """As the expert layer calls it. The offsets need not start at 0."""
    importance, (*activations, offsets), weights = importance_inputs(CASES[0], metric)
    whole, apart = importance.clone(), importance.clone()
    ops.row_importance_(whole, *activations, offsets, weights)
    for expert in range(len(offsets) - 1):
        rows = [tensor[int(offsets[expert]) : int(offsets[expert + 1])] for tensor in activations]
        own = weights if weights is None else weights[expert : expert + 1]
        ops.row_importance_(apart[expert : expert + 1], *rows, offsets[expert : expert + 2], own)
    assert torch.equal(apart, whole)
