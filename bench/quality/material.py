"""What every run is made of: the demo's pre-trained model, its new and old texts, and their fingerprints."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from cells import VALIDATION_SEQUENCES
from transformers import AutoTokenizer
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.data import PackedDataset
from usaf_ext.demo import ASSETS, MODEL
from usaf_ext.evaluation import evaluate


@dataclass(frozen=True)
class Texts:
    """Sequences, int64 [seq_len] each: `train` and `validation` of the new kind, the held-out `new` and `old`."""

    train: list[torch.Tensor]
    validation: list[torch.Tensor]
    new: list[torch.Tensor]
    old: list[torch.Tensor]

    def heldout(self) -> dict[str, list[torch.Tensor]]:
        return {"new": self.new, "old": self.old, "validation": self.validation}


@functools.cache
def texts(seq_len: int) -> Texts:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    new, heldout, old = (
        PackedDataset.from_files([ASSETS / "text" / f"{name}.txt"], tokenizer, seq_len).sequences
        for name in ("new_train", "new_heldout", "old_heldout")
    )
    return Texts(new[:-VALIDATION_SEQUENCES], new[-VALIDATION_SEQUENCES:], heldout, old)


@functools.cache
def source() -> ModelSource:
    return ModelSource.open(MODEL)


@functools.cache
def fingerprints(seq_len: int) -> dict[str, str]:
    """Of the checkpoint, and of every token of the four parts."""
    digest = hashlib.sha256()
    data = texts(seq_len)
    for part in (data.train, data.validation, data.new, data.old):
        digest.update(torch.stack(part).numpy().tobytes() + b"|")
    fingerprint = source().fingerprint
    assert fingerprint is not None
    return {"model_fingerprint": fingerprint, "data_fingerprint": digest.hexdigest()}


def losses(model: Any, data: Texts, when: str, batch_size: int) -> dict[str, float]:
    """Mean loss of each held-out part in nats per token, as {"new_before": ...} for `when` = "before"."""
    return {f"{name}_{when}": evaluate(model, part, batch_size) for name, part in data.heldout().items()}
