"""Texts to packed token sequences, and the order in which training sees them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

_EPOCH_STRIDE = 1_000_003  # epochs of neighbouring seeds do not share their orders


def _json_documents(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
                raise ValueError(f"{where}: expected an object with either 'text' or 'messages'")
            if "text" in record:
                if not isinstance(record["text"], str):
                    raise ValueError(f"{where}: expected 'text' to be a string")
                yield tokenizer(record["text"], add_special_tokens=False)["input_ids"]
                continue
            messages = record["messages"]
            if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
                raise ValueError(f"{where}: expected 'messages' to be a list of objects")
            if getattr(tokenizer, "chat_template", None) is None:
                raise ValueError(f"{where}: 'messages' need a tokenizer with a chat template")
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # the template is a program of the checkpoint's: it may raise anything
                raise ValueError(f"{where}: the chat template refuses these messages ({error})") from error
            yield tokenizer(text, add_special_tokens=False)["input_ids"]


def read_documents(paths: Sequence[str | Path], tokenizer: Any) -> list[list[int]]:
    """Token ids of every document of the files, in order.

    A .txt file is one document; a .jsonl file has one on each line: {"text": ...}, or {"messages": [...]}, which go
    through the tokenizer's chat template. Empty documents are left out, and logged.

    Raises ValueError naming file and line for other suffixes, broken records and text that is no UTF-8;
    FileNotFoundError for a missing file.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError("paths: expected a list of files, got one path")
    if not paths:
        raise ValueError("paths: expected at least one file")
    documents: list[list[int]] = []
    for path in map(Path, paths):
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{path}: expected a .txt or .jsonl file")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            if path.suffix == ".txt":
                found = [tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]]
            else:
                found = list(_json_documents(path, tokenizer))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error
        kept = [document for document in found if document]
        if len(kept) < len(found):
            logger.warning("%s: %d empty documents left out", path, len(found) - len(kept))
        documents.extend(kept)
    if not documents:
        raise ValueError(f"{', '.join(map(str, paths))}: no text at all")
    return documents


def pack(documents: Iterable[Sequence[int]], seq_len: int, eos_token_id: int | None) -> torch.Tensor:
    """All documents in one int64 stream [num_tokens], with `eos_token_id` (unless None) after each.

    Raises ValueError for `seq_len` below 2 (nothing to predict).
    """
    if seq_len < 2:
        raise ValueError(f"seq_len: expected at least 2, got {seq_len}")
    stream: list[int] = []
    for document in documents:
        stream.extend(document)
        if eos_token_id is not None:
            stream.append(eos_token_id)
    return torch.tensor(stream, dtype=torch.int64)


class PackedDataset(Dataset):
    """Documents packed back to back and cut into sequences of `seq_len` tokens (int64 [seq_len] each).

    Args:
        documents: token ids of each document.
        seq_len: tokens a sequence, at least 2.
        eos_token_id: put after each document; None for a tokenizer without one.
        keep_tail: keep the tokens that do not fill a sequence as a last, shorter one (for evaluation). Otherwise they
            are left out, and how many is logged.

    Attributes:
        num_tokens: tokens in the sequences.  num_left_out: tokens of the tail that were left out.

    Raises ValueError when there is not one whole sequence (keep_tail: not 2 tokens).
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        seq_len: int,
        *,
        eos_token_id: int | None,
        keep_tail: bool = False,
    ):
        stream = pack(documents, seq_len, eos_token_id)
        whole = len(stream) // seq_len * seq_len
        self.seq_len = seq_len
        self.sequences = list(stream[:whole].split(seq_len)) if whole else []
        tail = stream[whole:]
        if keep_tail and len(tail) >= 2:  # one token alone predicts nothing
            self.sequences.append(tail)
        self.num_tokens = sum(map(len, self.sequences))
        self.num_left_out = len(stream) - self.num_tokens
        if not self.sequences:
            raise ValueError(f"the data has {len(stream)} tokens; expected at least {2 if keep_tail else seq_len}")
        if self.num_left_out:
            logger.info("%d tokens at the end fill no sequence of %d and are left out", self.num_left_out, seq_len)

    @classmethod
    def from_files(
        cls, paths: Sequence[str | Path], tokenizer: Any, seq_len: int, *, keep_tail: bool = False
    ) -> PackedDataset:
        """Read, tokenise and pack files; see `read_documents`."""
        if seq_len < 2:
            raise ValueError(f"seq_len: expected at least 2, got {seq_len}")
        documents = read_documents(paths, tokenizer)
        return cls(documents, seq_len, eos_token_id=tokenizer.eos_token_id, keep_tail=keep_tail)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sequences[index]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.sequences)


class BatchOrder:
    """An endless, seeded order of batches: every epoch is a new permutation, each sequence once.

    Each `next()` gives a list of `batch_size` sequence numbers; the last batch of an epoch is filled up with the first
    ones of the next epoch, so none is left out. The state is (seed, epoch, position) and nothing else.

    Args:
        num_sequences, batch_size: at least 1.
        seed: a non-negative int.
    """

    def __init__(self, num_sequences: int, batch_size: int, seed: int):
        limits = (("num_sequences", num_sequences, 1), ("batch_size", batch_size, 1), ("seed", seed, 0))
        for name, value, least in limits:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.position = 0  # sequences of this epoch already given out
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        # One generator per epoch, so that an epoch's order does not depend on how the earlier ones were consumed.
        generator = torch.Generator().manual_seed((self.seed * _EPOCH_STRIDE + self.epoch) % (1 << 63))
        return torch.randperm(self.num_sequences, generator=generator).tolist()

    def __iter__(self) -> BatchOrder:
        return self

    def __next__(self) -> list[int]:
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self.position == self.num_sequences:
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            taken = self._order[self.position : self.position + self.batch_size - len(batch)]
            batch.extend(taken)
            self.position += len(taken)
        return batch

    def state_dict(self) -> dict[str, int]:
        return {
            "num_sequences": self.num_sequences,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. The batch size may differ.

        Raises ValueError when it is the state of other data (another number of sequences) or no such state.
        """
        names = ("num_sequences", "seed", "epoch", "position")
        if set(state) != set(names) or not all(isinstance(state[name], int) and state[name] >= 0 for name in names):
            raise ValueError(f"state: expected non-negative ints {', '.join(names)}; got {state}")
        if state["num_sequences"] != self.num_sequences:
            raise ValueError(f"state: of {state['num_sequences']} sequences, but the data has {self.num_sequences}")
        if state["position"] > self.num_sequences:
            raise ValueError(f"state: position {state['position']} is past the end ({self.num_sequences})")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = self._permutation()
