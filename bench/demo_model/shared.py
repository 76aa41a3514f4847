"""What the demo model's scripts share: the packing of texts, the batches, the loss and its evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parents[2] / "python" / "usaf_ext" / "demo_assets"
SEQUENCE_LENGTH = 256


def pack(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Token ids cut into non-overlapping rows: [sequences, SEQUENCE_LENGTH]; the last partial row is dropped."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = len(ids) // SEQUENCE_LENGTH
    return torch.tensor(ids[: rows * SEQUENCE_LENGTH], dtype=torch.long).view(rows, SEQUENCE_LENGTH)


def batches(rows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches without replacement; a new fixed-seed order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[start : start + batch_size]]


def token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; logits [batch, length, vocab], ids [batch, length]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: torch.Tensor, batch_size: int = 16) -> float:
    """Mean loss per predicted token over all rows."""
    total = 0.0
    for chunk in rows.split(batch_size):
        total += token_loss(model(input_ids=chunk, use_cache=False).logits, chunk).item() * len(chunk)
    return total / len(rows)
