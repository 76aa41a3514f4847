"""The expert layer's GEMMs on panels: shapes with tails, every format, frozen rows, and the path without panels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from expert_layers import EXPERTS, FORMATS, TOLERANCE, decoded, module_with_bank, oracle, relative_error, routing, run
from oracles import same_for_any_threads
from usaf_ext.bank import RowBank

BF16 = torch.bfloat16
# hidden_size, intermediate_size: not multiples of 64, of 32; deeper than a piece of a panel
SHAPES = [(64, 64), (72, 36), (130, 66), (320, 200), (2112, 36), (72, 1096)]

pytestmark = pytest.mark.skipif(not module_with_bank(BF16).layer.native.uses_panels, reason="needs AVX512_BF16")


def inputs(num_tokens, hidden_size, top_k=2):
    index, top_k_weights = routing(num_tokens, top_k, dtype=BF16)
    hidden, grad = torch.randn(num_tokens, hidden_size), torch.randn(num_tokens, hidden_size)
    return hidden.to(BF16), index, top_k_weights, grad.to(BF16)


def freeze_some(layer):
    """Freeze two neurons of each expert that are not trained, with twice their scales or codes."""
    bank = layer.bank
    taken = set(zip(bank.neuron_expert.tolist(), bank.neuron_index.tolist()))
    free = [(e, j) for e in range(EXPERTS) for j in range(layer.intermediate_size) if (e, j) not in taken]
    neurons = [pair for e in range(EXPERTS) for pair in [p for p in free if p[0] == e][-2:]]
    expert, index = torch.tensor(neurons, dtype=torch.int32).T
    frozen = RowBank.from_store(layer.store, 0, (expert.contiguous(), index.contiguous()), mode="in_place")
    frozen.grad = None
    if layer.store.format == "bf16":
        frozen.codes.view(BF16).mul_(2)
    else:
        frozen.absmax.mul_(2)
    layer.set_frozen_bank(frozen)
    return expert.long(), index.long()


def check_against_float64(experts, arguments):
    layer = experts.layer
    gate, up, down = decoded(layer.store)
    e, j = freeze_some(layer)
    for matrix in (gate, up):
        matrix[e, j] *= 2
    down[e, :, j] *= 2
    hidden, index, top_k_weights, grad = arguments
    out, grad_hidden, grad_weights = run(experts, *arguments)
    parameters = [p.requires_grad_() for p in (gate, up, down)]
    x, w = hidden.double().requires_grad_(), top_k_weights.double().requires_grad_()
    expected = oracle(*parameters, x, index, w)
    expected.backward(grad.double())
    e, j = layer.bank.neuron_expert.long(), layer.bank.neuron_index.long()
    rows = torch.stack([gate.grad[e, j], up.grad[e, j], down.grad[e, :, j]], dim=1)
    for actual, reference in [
        (out, expected.detach()),
        (grad_hidden, x.grad),
        (grad_weights, w.grad),
        (layer.bank.grad, rows),
    ]:
        assert relative_error(actual, reference) < TOLERANCE[BF16]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, format):
    hidden_size, intermediate_size = shape
    experts = module_with_bank(BF16, format, hidden=hidden_size, intermediate=intermediate_size)
    assert experts.layer.native.uses_panels
    check_against_float64(experts, inputs(7, hidden_size))


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 150])
def test_many_tokens_of_one_expert(num_tokens):
    """More rows than one call of torch's small GEMM takes."""
    hidden, index, top_k_weights, grad = inputs(num_tokens, 72, top_k=1)
    index[:] = 2
    check_against_float64(module_with_bank(BF16, hidden=72, intermediate=36), (hidden, index, top_k_weights, grad))


@pytest.mark.parametrize("shape", [(71, 36), (72, 37)], ids=str)
def test_odd_sizes_do_without(shape):
    hidden_size, intermediate_size = shape
    experts = module_with_bank(BF16, hidden=hidden_size, intermediate=intermediate_size)
    assert not experts.layer.native.uses_panels
    check_against_float64(experts, inputs(7, hidden_size))


def test_same_bits_for_any_thread_count():
    experts = module_with_bank(BF16, hidden=320, intermediate=200)
    arguments = inputs(40, 320)

    def results():
        experts.layer.bank.zero_grad()
        return *run(experts, *arguments), experts.layer.bank.grad, experts.layer.bank.grad_squares

    assert same_for_any_threads(results)


_WITHOUT_PANELS = """
import sys
import torch
from expert_layers import module_with_bank, run
experts = module_with_bank(torch.bfloat16, hidden=320, intermediate=200)
assert not experts.layer.native.uses_panels
results = run(experts, *torch.load(sys.argv[1]))
torch.save([*results, experts.layer.bank.grad], sys.argv[1])
"""


def test_matrices_decoded_as_a_whole_give_the_same_to_rounding(tmp_path):
    """In a process whose torch has no small GEMM for bf16."""
    experts = module_with_bank(BF16, hidden=320, intermediate=200)
    arguments = inputs(40, 320)
    results = [*run(experts, *arguments), experts.layer.bank.grad]
    path = tmp_path / "tensors.pt"
    torch.save(arguments, path)
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _WITHOUT_PANELS, path], env=environment, check=True)
    for with_panels, without in zip(results, torch.load(path)):
        assert relative_error(with_panels, without) < TOLERANCE[BF16]
