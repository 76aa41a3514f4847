"""Chunked cross-entropy equals the plain one, shifts once, and never holds all logits."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config
from trained_models import tokens
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteMoeConfig
from usaf_ext.loss import causal_lm_loss, chunked_cross_entropy, why_not_chunked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "chunk"), [(0, 4), (1, 4), (4, 4), (23, 4), (23, 100)])
def test_equals_cross_entropy(dtype, rows, chunk):
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(16, 50, dtype=dtype)
    labels = torch.randint(0, 50, (rows,))
    labels[::5] = -100
    total, count = chunked_cross_entropy(hidden, labels, head, chunk)
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    assert int(count) == int((labels != -100).sum())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    for got, want in zip(torch.autograd.grad(total, [hidden, head.weight], allow_unused=rows == 0), wanted):
        if got is not None:
            close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}  # the head's sums round per chunk
            torch.testing.assert_close(got, want, **close)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, labels, head, chunk)[0], total)


def test_logits_live_one_chunk_at_a_time():
    sizes = []
    head = torch.nn.Linear(16, 50)
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    hidden = torch.randn(23, 16, requires_grad=True)
    total, _ = chunked_cross_entropy(hidden, torch.zeros(23, dtype=torch.int64), head, 10)
    assert sizes == [10, 10, 3]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, torch.zeros(23, dtype=torch.int64), head, 10)
    assert max(saved, default=0) < 23 * 50  # no logits kept for backward
    total.backward()
    assert sizes[6:] == [3, 10, 10]  # made again, last chunk first


def test_causal_loss_is_the_models_own(model):
    ids = tokens(3)
    labels = ids.clone()
    labels[0, 5:9] = -100
    total, count = causal_lm_loss(model, ids, labels, chunk_tokens=7)
    assert int(count) == 3 * 23 - 4
    torch.testing.assert_close(total / count, model(ids, labels=labels).loss)
    parameters = [p for p in model.parameters()]
    wanted = torch.autograd.grad(model(ids, labels=labels).loss, parameters, allow_unused=True)
    for got, want in zip(torch.autograd.grad(total / count, parameters, allow_unused=True), wanted):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_shift_happens_once(model):
    """A model that always predicts the next token has no loss; predicting the token after it has."""
    ids = torch.arange(24)[None] % 260

    class Oracle(torch.nn.Module):
        def __init__(self, ahead):
            super().__init__()
            self.ahead = ahead
            self.config = model.config

        @property
        def base_model(self):
            return self

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids, use_cache):
            logits = 50.0 * F.one_hot((input_ids + self.ahead) % 260, 260).float()
            return type("Output", (), {"logits": logits})

    assert float(causal_lm_loss(Oracle(1), ids)[0]) < 1e-3
    assert float(causal_lm_loss(Oracle(2), ids)[0]) > 100


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (GraniteMoeConfig(logits_scaling=4.0), "logits_scaling"),
        (Gemma2Config(final_logit_softcapping=0.1, head_dim=16), "final_logit_softcapping"),
    ],
)
def test_models_that_change_their_logits_use_them(config, setting, caplog):
    for name, value in {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": None,
    }.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = tokens(2, vocabulary=64)
    assert setting in why_not_chunked(other)
    with caplog.at_level(logging.WARNING, logger="usaf_ext"):
        total, count = causal_lm_loss(other, ids)
        causal_lm_loss(other, ids)
    assert len([r for r in caplog.records if setting in r.message]) == 1
    torch.testing.assert_close(total / count, other(ids, labels=ids).loss)
    plain = chunked_cross_entropy(
        other.base_model(ids).last_hidden_state[:, :-1].reshape(-1, 32), ids[:, 1:].reshape(-1), other.lm_head
    )[0]
    assert abs((plain - total).item()) > 1e-3


def test_bad_input(model):
    ids = tokens(2)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        causal_lm_loss(model, ids[0])
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        causal_lm_loss(model, ids, ids[:, 1:])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        causal_lm_loss(model, ids[:, :1])
    rows, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows must be"):
        chunked_cross_entropy(rows, labels[:3])
    with pytest.raises(TypeError, match="labels must be int64"):
        chunked_cross_entropy(rows, labels.int())
    with pytest.raises(ValueError, match="chunk_tokens"):
        chunked_cross_entropy(rows, labels, None, 0)
