"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
CHUNK_TOKENS = 512  # rows of logits alive at once: 512 x 151,936 in fp32 is 0.3 GB

# Settings by which families change logits after lm_head, each with the value that means "unchanged".
_LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier_scale": 1,
}


# Models whose use of whole logits was logged.
_told: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def _chunk_loss(rows: torch.Tensor, head, labels: torch.Tensor) -> torch.Tensor:
    logits = rows if head is None else head(rows)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_cross_entropy(
    rows: torch.Tensor, labels: torch.Tensor, lm_head: torch.nn.Module | None = None, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log softmax(lm_head(rows))[label] over the rows whose label is not -100, and their number.

    rows [N, H] (or logits [N, vocab] with lm_head None), float; labels [N], int64, already aligned with the rows.
    Returns (sum, 0-dim float32; count, 0-dim int64): the mean is sum / count. Logits are made `chunk_tokens` rows at
    a time, in fp32 only within a chunk, and again in backward.
    """
    if rows.dim() != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(f"rows must be [N, width] and labels [N], got {tuple(rows.shape)} and {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    total = rows[:0].float().sum()  # zero, and part of the graph even without rows
    for start in range(0, len(rows), chunk_tokens):
        part, target = rows[start : start + chunk_tokens], labels[start : start + chunk_tokens]
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_loss, part, lm_head, target, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_loss(part, lm_head, target)
        total = total + chunk
    return total, (labels != IGNORE_INDEX).sum()


def why_not_chunked(model: Any) -> str | None:
    """Why logits are more than lm_head(last_hidden_state) in a transformers model, or None when they are just that."""
    base, head = getattr(model, "base_model", None), model.get_output_embeddings()
    if base is None or base is model:
        return "the model has no base model beside its head"
    if not isinstance(head, torch.nn.Linear):
        return "the model has no linear lm_head"
    config = model.config.get_text_config()
    for name, unchanged in _LOGIT_SETTINGS.items():
        value = getattr(config, name, unchanged)
        if value is not None and value != unchanged:
            return f"{name} = {value} changes its logits after lm_head"
    return None


def causal_lm_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss of a transformers causal language model: (sum, count), see chunked_cross_entropy.

    input_ids [B, T], int64; labels [B, T] aligned with input_ids (default: input_ids), -100 where no loss is wanted.
    The shift happens here and nowhere else: position t predicts labels[:, t + 1], so B * (T - 1) targets at most.
    A model whose logits are not lm_head(last_hidden_state) is run whole and its logits are used (logged once a model).
    """
    labels = input_ids if labels is None else labels
    if input_ids.dim() != 2 or labels.shape != input_ids.shape:
        raise ValueError(f"input_ids and labels must be [B, T], got {tuple(input_ids.shape)} and {tuple(labels.shape)}")
    if input_ids.shape[1] < 2:
        raise ValueError("input_ids must hold at least 2 tokens a row: the first has nothing before it")
    targets = labels[:, 1:].reshape(-1)
    reason = why_not_chunked(model)
    if reason is None:
        rows = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
    else:
        if model not in _told:
            logger.warning("cross-entropy uses the model's whole logits: %s", reason)
            _told.add(model)
        rows, head = model(input_ids=input_ids, use_cache=False).logits, None
    return chunked_cross_entropy(rows[:, :-1].reshape(-1, rows.shape[-1]), targets, head, chunk_tokens)
