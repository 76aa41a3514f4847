"""What trains in the expert layer: importance, threshold, frozen rows, gradient sums, several micro-batches at once."""

from __future__ import annotations

import pytest
import torch
from expert_layers import (
    DTYPES,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOLERANCE,
    decoded,
    module_with_bank,
    oracle,
    relative_error,
    routing,
    run,
    selection,
)
from torch.library import opcheck
from usaf_ext import _C
from usaf_ext.bank import RowBank
from usaf_ext.memory import ExpertMemory

MANY_FORWARD = torch.ops.usaf.experts_forward_many
MANY_BACKWARD = torch.ops.usaf.experts_backward_many


def batch(num_tokens, dtype, top_k=2):
    index, top_k_weights = routing(num_tokens, top_k, dtype=dtype)
    return torch.randn(num_tokens, HIDDEN).to(dtype), index, top_k_weights, torch.randn(num_tokens, HIDDEN).to(dtype)


def smallest_budget(experts):
    return ExpertMemory.smallest_budget(experts.layer.store, experts.layer.memory.dtype)


def use_bf16_gradients(layer):
    """Let the layer's bank keep its gradient in bfloat16."""
    neurons = layer.bank.neuron_expert, layer.bank.neuron_index
    layer.set_bank(RowBank.from_store(layer.store, 0, neurons, grad_dtype=torch.bfloat16))


def weight_gradients(store, batches):
    """Gradients of gate, up and down in float64, summed over the batches; and the weights."""
    parameters = [p.requires_grad_() for p in decoded(store)]
    for hidden, index, top_k_weights, grad in batches:
        oracle(*parameters, hidden.double(), index, top_k_weights.double()).backward(grad.double())
    return [p.grad for p in parameters], [p.detach() for p in parameters]


@pytest.mark.parametrize("metric", ["gradient", "gradient_weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_adds_up_over_backwards(dtype, metric):
    experts = module_with_bank(dtype)
    layer = experts.layer
    layer.set_threshold(100.0)  # importance is measured all the same
    importance = layer.begin_importance(metric)
    expected = torch.zeros(EXPERTS, INTERMEDIATE, dtype=torch.float64)
    for _ in range(2):
        inputs = batch(21, dtype)
        run(experts, *inputs)
        gradients, parameters = weight_gradients(layer.store, [inputs])
        for gradient, weight, dim in zip(gradients, parameters, (-1, -1, 1)):
            expected += (gradient.square() if metric == "gradient" else (gradient * weight).abs()).sum(dim)
    layer.end_importance()
    assert relative_error(importance, expected) < 2 * TOLERANCE[dtype]
    before = importance.clone()
    run(experts, *inputs)
    assert torch.equal(importance, before)
    with pytest.raises(ValueError, match="metric"):
        layer.begin_importance("weight")


def under_threshold(counts, alpha):
    return counts.double() < alpha * counts.double().mean()


@pytest.mark.parametrize("scope", ["own counts", "given counts", "no counts yet"])
def test_threshold_leaves_out_experts_with_few_tokens(scope):
    experts, reference = (module_with_bank(torch.float32) for _ in range(2))
    hidden, index, top_k_weights, grad = batch(40, torch.float32)
    index[index == 2] = EXPERTS
    index[:2, 0] = 2  # two tokens for expert 2, the expert whose neurons are all trained
    alpha = 0.7
    counts = torch.bincount(index.flatten(), minlength=EXPERTS + 1)[:EXPERTS]
    if scope == "given counts":
        counts = torch.tensor([9, 0, 30, 1, 7, 7])
    elif scope == "no counts yet":
        counts = torch.zeros(EXPERTS, dtype=torch.int64)
    masked = under_threshold(counts, alpha)
    assert bool(masked.any()) == (scope != "no counts yet")
    experts.layer.set_threshold(alpha, None if scope == "own counts" else counts)

    results = run(experts, hidden, index, top_k_weights, grad)
    for actual, expected in zip(results, run(reference, hidden, index, top_k_weights, grad)):
        assert torch.equal(actual, expected)  # outputs, input and router gradients flow all the same
    bank, full = experts.layer.bank, reference.layer.bank
    left_out = masked[bank.neuron_expert.long()]
    assert torch.equal(bank.grad, full.grad * ~left_out[:, None, None])
    assert torch.equal(bank.expert_hit, full.expert_hit * ~masked)
    assert relative_error(experts.usaf_anchor.grad, bank.grad.double().norm()[None]) < 1e-6

    experts.layer.set_threshold(0.0)
    bank.zero_grad()
    run(experts, hidden, index, top_k_weights, grad)
    assert torch.equal(bank.grad, full.grad)


def test_bad_thresholds():
    layer = module_with_bank(torch.float32).layer
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    for error, argument, arguments in [
        (ValueError, "alpha", (-0.1,)),
        (ValueError, "alpha", (float("nan"),)),
        (TypeError, "alpha", ("0.1",)),
        (TypeError, "counts", (0.1, counts.int())),
        (TypeError, "counts", (0.1, [0] * EXPERTS)),
        (ValueError, "counts", (0.1, counts[1:])),
        (ValueError, "counts", (0.1, torch.zeros(2 * EXPERTS, dtype=torch.int64)[::2])),
    ]:
        with pytest.raises(error, match=argument):
            layer.set_threshold(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_rows_are_overlaid_and_not_trained(dtype):
    experts = module_with_bank(dtype)
    layer = experts.layer
    # Every neuron that is not trained, with twice its scale.
    trained = torch.zeros(EXPERTS, INTERMEDIATE, dtype=torch.bool)
    trained[layer.bank.neuron_expert.long(), layer.bank.neuron_index.long()] = True
    e, j = (~trained).nonzero(as_tuple=True)
    copy = RowBank.from_store(layer.store, 0, (e.int(), j.int()), mode="in_place")
    frozen = RowBank(
        layer=0,
        format="nf4",
        mode="in_place",
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        neuron_expert=copy.neuron_expert,
        neuron_index=copy.neuron_index,
        codes=copy.codes,
        absmax=2 * copy.absmax,
        master=None,
        trainable=False,
    )
    with pytest.raises(ValueError, match="expected a frozen bank"):
        layer.set_frozen_bank(copy)
    layer.set_frozen_bank(frozen)
    assert layer.frozen_bank is frozen
    hidden, index, top_k_weights, grad = batch(23, dtype)
    out, grad_hidden, _ = run(experts, hidden, index, top_k_weights, grad)

    gate, up, down = decoded(layer.store)
    for matrix in (gate, up):
        matrix[e, j] *= 2
    down[e, :, j] *= 2
    x = hidden.double().requires_grad_()
    expected = oracle(gate, up, down, x, index, top_k_weights.double())
    expected.backward(grad.double())
    assert relative_error(out, expected.detach()) < TOLERANCE[dtype]
    assert relative_error(grad_hidden, x.grad) < TOLERANCE[dtype]
    with torch.no_grad():
        with_frozen = experts(hidden, index, top_k_weights)
        layer.set_frozen_bank(None)
        assert not torch.equal(with_frozen, experts(hidden, index, top_k_weights))


def test_a_trained_row_wins_over_a_frozen_one():
    experts = module_with_bank(torch.float32)
    layer, bank = experts.layer, experts.layer.bank
    hidden, index, top_k_weights, _ = batch(23, torch.float32)
    frozen = RowBank.from_store(layer.store, 0, (bank.neuron_expert, bank.neuron_index), mode="in_place")
    frozen.grad = None  # as a frozen bank has none
    frozen.absmax.mul_(3)
    with torch.no_grad():
        before = experts(hidden, index, top_k_weights)
        layer.set_frozen_bank(frozen)
        assert torch.equal(experts(hidden, index, top_k_weights), before)
        layer.set_bank(None)
        assert not torch.equal(experts(hidden, index, top_k_weights), before)


def test_banks_of_another_shape_are_refused():
    layer = module_with_bank(torch.float32).layer
    other = RowBank.from_store(layer.store, 0, selection(), mode="in_place")
    other.grad = None
    for field, value in {"layer": 1, "format": "bf16", "hidden_size": 64}.items():
        kept = getattr(other, field)
        setattr(other, field, value)
        for setter in (layer.set_bank, layer.set_frozen_bank):
            with pytest.raises(ValueError, match="bank: expected one of layer 0"):
                setter(other)
        setattr(other, field, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bf16_gradients", [False, True], ids=["fp32 gradients", "bf16 gradients"])
def test_gradients_and_their_squares(dtype, bf16_gradients):
    experts = module_with_bank(dtype)
    if bf16_gradients:
        use_bf16_gradients(experts.layer)
    bank = experts.layer.bank
    batches = [batch(19, dtype), batch(1, dtype, top_k=1), batch(26, dtype)]
    sums = torch.zeros_like(bank.grad)
    for inputs in batches:
        run(experts, *inputs)
        if bf16_gradients:  # each call's own sum in fp32, then one rounding
            fresh = module_with_bank(dtype)
            run(fresh, *inputs)
            sums = (sums.float() + fresh.layer.bank.grad).bfloat16()
    (gate, up, down), _ = weight_gradients(experts.layer.store, batches)
    e, j = bank.neuron_expert.long(), bank.neuron_index.long()
    expected = torch.stack([gate[e, j], up[e, j], down[e, :, j]], dim=1)
    assert relative_error(bank.grad, expected) < (1e-2 if bf16_gradients else 0) + TOLERANCE[dtype]
    if bf16_gradients:
        assert torch.equal(bank.grad, sums)
    squares = torch.zeros(EXPERTS, dtype=torch.float64).index_add_(0, e, bank.grad.double().square().sum((1, 2)))
    torch.testing.assert_close(bank.grad_squares, squares, rtol=1e-12, atol=0)
    bank.zero_grad()
    assert not bank.grad_squares.any()


def many_batches(dtype):
    batches = [batch(n, dtype, top_k) for n, top_k in [(17, 2), (0, 2), (1, 1), (25, 3)]]
    batches[0][1][:, :] = torch.tensor([1, 2])  # experts 3 to 5 have tokens in later micro-batches only
    batches[2][1][:] = EXPERTS
    return batches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "bf16 gradients", "threshold", "importance"])
@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
def test_many_micro_batches_have_the_bits_of_single_calls(dtype, option, paged):
    single = module_with_bank(dtype)
    many = module_with_bank(dtype, budget=smallest_budget(single) if paged else "auto")
    batches = many_batches(dtype)
    importance = []
    for experts in (single, many):
        if option == "bf16 gradients":
            use_bf16_gradients(experts.layer)
        elif option == "threshold":
            experts.layer.set_threshold(0.9)
        elif option == "importance":
            importance.append(experts.layer.begin_importance("gradient_weight"))
    hidden, index, top_k_weights, grad = (list(column) for column in zip(*batches))
    handle = many.layer.native.handle
    for _ in range(2):  # a second time, on top of what has accumulated
        expected, counts = [], torch.zeros(EXPERTS, dtype=torch.int32)
        single.usaf_anchor.grad = None
        for inputs in batches:
            expected.append(run(single, *inputs))
            counts += single.layer.token_counts
        out = MANY_FORWARD(hidden, index, top_k_weights, handle, True)
        assert torch.equal(many.layer.token_counts, counts)
        grad_hidden, grad_weights, grad_anchor = MANY_BACKWARD(grad, hidden, index, top_k_weights, handle)
        for actual, single_call in zip(zip(out, grad_hidden, grad_weights), expected):
            for a, b in zip(actual, single_call):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
        assert torch.equal(grad_anchor, single.usaf_anchor.grad)
        for name in ("grad", "grad_squares", "expert_hit"):
            assert torch.equal(getattr(many.layer.bank, name), getattr(single.layer.bank, name))
    assert many.layer.bank.grad.any()
    if importance:
        assert importance[0].any()
        assert torch.equal(*importance)


def test_many_decode_an_expert_once():
    experts = module_with_bank(torch.float32, budget=smallest_budget(module_with_bank(torch.float32)))
    memory = experts.layer.memory
    assert memory.num_slots < EXPERTS
    hidden, index, top_k_weights, grad = (list(column) for column in zip(*[batch(30, torch.float32)] * 3))
    for op, arguments in ((MANY_FORWARD, (False,)), (MANY_BACKWARD, ())):
        memory.reset_stats()
        inputs = (hidden, index, top_k_weights, experts.layer.native.handle, *arguments)
        op(*((grad, *inputs) if op is MANY_BACKWARD else inputs))
        assert memory.stats()["page_misses"] <= EXPERTS


def test_bad_many_calls():
    experts = module_with_bank(torch.float32)
    handle = experts.layer.native.handle
    hidden, index, top_k_weights, grad = ([tensor] * 2 for tensor in batch(6, torch.float32))
    for message, arguments in [
        ("x: expected at least one micro-batch", ([], [], [])),
        ("index: expected 2 micro-batches as in x, got 1", (hidden, index[:1], top_k_weights)),
        ("weights: expected 2 micro-batches", (hidden, index, top_k_weights * 2)),
        ("x: expected shape", ([hidden[0], hidden[0][:, 1:]], index, top_k_weights)),
        ("index: expected 0 to", (hidden, [index[0], index[0] - 9], top_k_weights)),
    ]:
        if arguments[0]:  # without a tensor there is no backend to ask
            with pytest.raises(ValueError, match=message):
                MANY_FORWARD(*arguments, handle, True)
        with pytest.raises(ValueError, match=message):
            MANY_BACKWARD(grad, *arguments, handle)
    with pytest.raises(ValueError, match="grad_out: expected 2 micro-batches"):
        MANY_BACKWARD(grad[:1], hidden, index, top_k_weights, handle)
    with pytest.raises(ValueError, match="grad_out: expected the shape of x"):
        MANY_BACKWARD([grad[0], grad[0][1:]], hidden, index, top_k_weights, handle)
    with pytest.raises(TypeError, match="grad_out: expected Float"):
        MANY_BACKWARD([grad[0], grad[0].double()], hidden, index, top_k_weights, handle)
    assert not experts.layer.bank.grad.any()
    assert not experts.layer.bank.expert_hit.any()


def test_opcheck_many():
    experts = module_with_bank(torch.float32)
    handle = experts.layer.native.handle
    hidden, index, top_k_weights, grad = (list(column) for column in zip(*[batch(5, torch.float32) for _ in range(2)]))
    # Not test_aot_dispatch_dynamic: the op adds to the bank, so running it twice is not the same as once.
    for tests in ("test_schema", "test_faketensor", "test_autograd_registration"):
        opcheck(MANY_FORWARD, (hidden, index, top_k_weights, handle, True), test_utils=tests)
        opcheck(MANY_BACKWARD, (grad, hidden, index, top_k_weights, handle), test_utils=tests)


def test_native_layer_refuses():
    layer = module_with_bank(torch.float32).layer
    with pytest.raises(ValueError, match="alpha"):
        layer.native.set_threshold(float("inf"), 0)
    with pytest.raises(ValueError, match="metric"):
        layer.native.set_importance(0, "weight")
    assert isinstance(layer.bank.native, _C.RowBank)
