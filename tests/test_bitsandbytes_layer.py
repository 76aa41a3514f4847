"""Expert layers over pages imported from bitsandbytes: oracle, banks, importance, and a whole run."""

from __future__ import annotations

import shutil

import pytest
import torch
from bnb_checkpoints import bnb_expert, make_bnb_checkpoint
from expert_layers import TOLERANCE, decoded, oracle, relative_error, routing, run, selection
from transformers import AutoModelForCausalLM
from usaf_ext import ops, paged_layers
from usaf_ext.bank import RowBank
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.cli import main
from usaf_ext.experts import PagedExperts, PagedLayer
from usaf_ext.loading import load_model
from usaf_ext.memory import ExpertMemory
from usaf_ext.store import ExpertStore

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 128, 192, 6, 2, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def imported():
    """A sealed store of one layer and its weights in fp32: gate, up, down, stacked over experts."""
    torch.manual_seed(5)
    store = ExpertStore.create(["experts"], EXPERTS, HIDDEN, INTERMEDIATE, down_axis="intermediate")
    weights = []
    for expert in range(EXPERTS):
        encoded, values = bnb_expert(HIDDEN, INTERMEDIATE)
        store.write_encoded_expert(0, expert, *encoded)
        weights.append(values)
    store.seal()
    return store, [torch.stack(parts) for parts in zip(*weights)]


def bank_of(store, neurons, **options):
    """A bank whose rows are far from the store's, and those rows decoded: [n, 3, H]."""
    bank = RowBank.from_store(store, 0, neurons, mode="in_place", **options)
    moved = bank.decode() + 0.05 * torch.randn(bank.num_neurons, 3, HIDDEN)
    codes, absmax = ops.quantize_blocks(moved, "nf4")
    bank.codes.copy_(codes)
    bank.absmax.copy_(absmax)
    return bank, bank.decode()


def overlay(weights, neurons, rows):
    gate, up, down = weights
    for expert, neuron, row in zip(*(part.tolist() for part in neurons), rows):
        gate[expert, neuron], up[expert, neuron], down[expert, :, neuron] = row


def halves(neurons):
    """(trained, frozen) neurons: every other one each."""
    return tuple(part[::2].clone() for part in neurons), tuple(part[1::2].clone() for part in neurons)


@pytest.mark.parametrize("num_tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("banks", ["none", "trained", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_equal_the_oracle(imported, dtype, banks, num_tokens):
    store, weights = imported
    weights = [part.clone() for part in weights]
    experts = PagedExperts(PagedLayer(ExpertMemory(store, "auto", dtype), 0))
    trained, frozen = halves(selection(EXPERTS, INTERMEDIATE))
    if banks != "none":
        bank, rows = bank_of(store, trained)
        experts.layer.set_bank(bank)
        overlay(weights, trained, rows)
    if banks == "both":
        frozen_bank, rows = bank_of(store, frozen, trainable=False)
        experts.layer.set_frozen_bank(frozen_bank)
        overlay(weights, frozen, rows)
    hidden = (torch.randn(num_tokens, HIDDEN)).to(dtype)
    index, top_k_weights = routing(num_tokens, TOP_K, EXPERTS, dtype)
    grad = torch.randn(num_tokens, HIDDEN).to(dtype)
    out, grad_x, grad_weights = run(experts, hidden, index, top_k_weights, grad)

    exact = [part.double().requires_grad_() for part in weights]
    x, w = hidden.double().requires_grad_(), top_k_weights.double().requires_grad_()
    expected = oracle(*exact, x, index, w)
    if num_tokens == 0:
        assert out.shape == grad_x.shape == (0, HIDDEN)
        return
    expected.backward(grad.double())
    for got, wanted in ((out, expected), (grad_x, x.grad), (grad_weights, w.grad)):
        assert relative_error(got, wanted) < TOLERANCE[dtype]
    if banks != "none":
        expert, neuron = (part.long() for part in trained)
        gate, up, down = (part.grad for part in exact)
        wanted = torch.stack([gate[expert, neuron], up[expert, neuron], down[expert, :, neuron]], dim=1)
        assert relative_error(bank.grad, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("metric", ["gradient", "gradient_weight"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_equals_the_oracle(imported, dtype, metric):
    store, weights = imported
    weights = [part.clone() for part in weights]
    experts = PagedExperts(PagedLayer(ExpertMemory(store, "auto", dtype), 0))
    neurons = selection(EXPERTS, INTERMEDIATE)
    bank, rows = bank_of(store, neurons)
    experts.layer.set_bank(bank)
    overlay(weights, neurons, rows)
    importance = experts.layer.begin_importance(metric)
    exact = [part.double().requires_grad_() for part in weights]
    total = torch.zeros(EXPERTS, INTERMEDIATE, dtype=torch.float64)
    for _ in range(2):
        hidden, (index, w) = torch.randn(TOKENS, HIDDEN).to(dtype), routing(TOKENS, TOP_K, EXPERTS, dtype)
        grad = torch.randn(TOKENS, HIDDEN).to(dtype)
        run(experts, hidden, index, w, grad)
        oracle(*exact, hidden.double(), index, w.double()).backward(grad.double())
        for part, axis in zip(exact, (2, 2, 1)):
            g = part.grad
            total += ((g * part).abs() if metric == "gradient_weight" else g.square()).detach().sum(axis)
            part.grad = None
    assert relative_error(importance, total) < 2 * TOLERANCE[dtype]


def test_every_budget_gives_the_same_bits(imported):
    store, _ = imported
    hidden, (index, w) = torch.randn(TOKENS, HIDDEN), routing(TOKENS, TOP_K, EXPERTS)
    results, neurons = [], selection(EXPERTS, INTERMEDIATE)
    for budget in ("auto", ExpertMemory.smallest_budget(store, torch.float32)):
        experts = PagedExperts(PagedLayer(ExpertMemory(store, budget, torch.float32), 0))
        experts.layer.set_bank(RowBank.from_store(store, 0, neurons, mode="in_place"))
        results.append((*run(experts, hidden, index, w, torch.ones_like(hidden)), experts.layer.bank.grad))
    assert all(map(torch.equal, *results))


def test_rows_are_the_neurons_encoded_along_hidden(imported):
    store, (gate, up, down) = imported
    picked = torch.tensor([INTERMEDIATE - 1, 3, 3, 0])
    codes, absmax = store.rows(0, 4, picked)
    for matrix, weight in enumerate((gate[4], up[4], down[4].T)):
        expected = ops.quantize_blocks(weight[picked].contiguous(), "nf4")
        assert torch.equal(codes[:, matrix], expected[0])
        assert torch.equal(absmax[:, matrix], expected[1])
    rows = ops.dequantize_blocks(codes, absmax, HIDDEN, "nf4")
    assert torch.equal(rows[:, 0], gate[4][picked])  # not rounded again
    assert torch.equal(rows[:, 1], up[4][picked])
    assert 0 < relative_error(rows[:, 2], down[4].T[picked]) < 0.15
    assert store.rows(0, 4, picked[:0])[0].shape == (0, 3, HIDDEN // 2)


def test_plain_weights_may_be_written_along_intermediate():
    store = ExpertStore.create(["experts"], 1, HIDDEN, INTERMEDIATE, down_axis="intermediate")
    gate, up, down = (
        torch.randn(INTERMEDIATE, HIDDEN),
        torch.randn(INTERMEDIATE, HIDDEN),
        torch.randn(HIDDEN, INTERMEDIATE),
    )
    store.write_expert(0, 0, gate, up, down)
    for read, weight in zip(store.read_expert(0, 0), (gate, up, down)):
        assert torch.equal(read, ops.dequantize_blocks(*ops.quantize_blocks(weight, "nf4"), weight.shape[1], "nf4"))
    assert [part.dtype for part in decoded(store)] == [torch.float64] * 3


# ---- the command line ----


def arguments(folder, model, out, *more):
    return [
        "train",
        *("--model", str(model), "--data", str(folder / "text.txt"), "--out", str(folder / out)),
        *("--eval-data", str(folder / "text.txt"), "--steps", "2", "--seq-len", "32", "--batch-size", "2"),
        *("--density", "5%", "--learning-rate", "1e-2", *more),
    ]


def evaluated(folder, model, capsys, *more):
    capsys.readouterr()
    assert main(["eval", "--model", str(model), "--data", str(folder / "text.txt"), "--seq-len", "32", *more]) == 0
    return float(capsys.readouterr().out.split()[1])


def test_quantize_train_resume_evaluate_and_export(tmp_path, capsys):
    make_bnb_checkpoint(tmp_path / "model")
    (tmp_path / "text.txt").write_text("To be trained, a text must be long enough for a few sequences. " * 40)
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "store")]) == 0
    fp32 = ("--dtype", "float32")
    before = evaluated(tmp_path, tmp_path / "store", capsys, *fp32)
    assert before == evaluated(tmp_path, tmp_path / "model", capsys, *fp32)

    assert main(arguments(tmp_path, tmp_path / "store", "run", *fp32)) == 0
    assert main(arguments(tmp_path, tmp_path / "model", "direct", *fp32)) == 0
    after = evaluated(tmp_path, tmp_path / "run", capsys, *fp32)  # from its delta
    assert after < before
    assert evaluated(tmp_path, tmp_path / "direct", capsys, *fp32) == after
    stopped = [*arguments(tmp_path, tmp_path / "store", "parts", *fp32), "--checkpoint-every", "1"]
    assert main(stopped) == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoint-000002")  # as if it had been killed in step 2
    assert main([*stopped, "--resume"]) == 0
    assert evaluated(tmp_path, tmp_path / "parts", capsys, *fp32) == after

    for base in ("dequantized", "original"):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / base), "--base", base]) == 0
    live = load_model(tmp_path / "run", dtype=torch.float32).model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized")
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        assert (live(ids).logits - plain(ids).logits).abs().max() < 1e-4
    written, source = ModelSource.open(tmp_path / "original"), ModelSource.open(tmp_path / "model")
    for layer in paged_layers(live):
        for expert in range(layer.num_experts):
            trained = layer.bank.neuron_index[layer.bank.neuron_expert == expert].long()
            untrained = torch.ones(layer.intermediate_size, dtype=torch.bool)
            untrained[trained] = False
            for found, base in zip(written.expert(layer.index, expert), source.expert(layer.index, expert)):
                neurons = 0 if len(found) == layer.intermediate_size else 1
                changed = (found != base).any(dim=1 - neurons)
                assert not changed[untrained].any()
                assert changed[trained].all()
