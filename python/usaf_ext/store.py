"""ExpertStore: all experts of a model, quantised, one page per (layer, expert), in host memory or on disk; its folder.

The folder: `usaf_store.json` (sizes, per-page crc32, where it came from), `experts-*.safetensors` (one U8 tensor per
page, data at multiples of 4096), and, when it came from a checkpoint, that checkpoint's config, tokenizer and every
non-expert tensor byte for byte under their own names, so that transformers opens the folder too. Written whole or not
at all.
"""

from __future__ import annotations

import logging
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import _C
from .errors import StoreError, named
from .expert_page import (
    Encoded,
    check_encoded,
    decode_expert,
    describe_page,
    encode_expert,
    fill_page,
    neuron_rows,
)
from .sizes import parse_size
from .store_files import STORE_INDEX_NAME, check_files, is_store, page_places, read_index, read_page, write_folder

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource

logger = logging.getLogger(__name__)

_SHARD_BYTES = 4 << 30
TIERS = ("memory", "disk")


def _page_name(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}"


class ExpertStore:
    """Quantised experts. Make it with `create` (then `write_expert` and `seal`), `quantize` or `open`.

    In the tier "memory" the pages are in host memory; in the tier "disk" they stay in the store's files, and each use
    reads its page anew (training reads ahead, see `ExpertMemory`). What a call returns is the same in both.

    Attributes:
        layer_names: names of the experts modules, one per MoE layer.
        num_layers, num_experts, hidden_size, intermediate_size: sizes, the same for every layer.
        format: one of `_C.FORMATS`.
        down_axis: "hidden", or "intermediate" where experts were imported from bitsandbytes: what quantisation blocks
            of W_down run along. Those of gate and up run along hidden_size.
        layout: the page's layout (`_C.PageLayout`).
        source_path, fingerprint: of the checkpoint it was quantised from, or None.
    """

    def __init__(
        self,
        layer_names: list[str],
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        format: str,
        down_axis: str = "hidden",
        *,
        source_path: str | None = None,
        fingerprint: str | None = None,
    ):
        if isinstance(layer_names, str) or not all(isinstance(name, str) for name in layer_names):
            raise TypeError(f"layer_names: expected a list of texts, got {layer_names!r}")
        if not layer_names or len(set(layer_names)) != len(layer_names):
            raise ValueError(f"layer_names: expected at least one, all different, got {layer_names}")
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
        self.layer_names = list(layer_names)
        self.num_layers = len(layer_names)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.format = format
        self.down_axis = down_axis
        self.source_path = source_path
        self.fingerprint = fingerprint
        self.layout = _C.PageLayout(format, hidden_size, intermediate_size, down_axis)
        self._native: _C.ExpertStore | None = None

    @property
    def native(self) -> _C.ExpertStore:
        """The C++ object. In the tier "memory" the memory for all pages is mapped when it is first asked for."""
        return self._map() if self._native is None else self._native

    def _map(self) -> _C.ExpertStore:
        self._native = _C.ExpertStore(self.num_layers, self.num_experts, self.layout)
        return self._native

    @classmethod
    def create(
        cls,
        layer_names: list[str],
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        format: str = "nf4",
        *,
        down_axis: str = "hidden",
    ) -> ExpertStore:
        """An empty store to fill with `write_expert` or `write_encoded_expert`.

        Raises:
            ValueError: sizes below 1, an unknown format or down_axis, names that repeat.
            StoreError: the memory cannot be had; down_axis "intermediate" with another format than "nf4", or with sizes
                that are not multiples of 64.
        """
        store = cls(layer_names, num_experts, hidden_size, intermediate_size, format, down_axis)
        store._map()
        return store

    @classmethod
    def unfilled(cls, source: ModelSource, format: str) -> ExpertStore:
        """A store of a checkpoint's sizes, whose memory is not mapped yet.

        Experts that bitsandbytes quantised are imported as they are: in format "nf4" and down_axis "intermediate".

        Raises:
            ValueError: an unknown format, or another than "nf4" for such a checkpoint.
            StoreError: such a checkpoint has sizes that are not multiples of 64.
        """
        if source.packed_experts and format != "nf4":
            raise ValueError(
                f"format: {source.path} holds experts in bitsandbytes' NF4, which are imported as they are: "
                f"expected 'nf4', got {format!r}"
            )
        with named(source.path):
            return cls(
                source.layer_names,
                source.num_experts,
                source.hidden_size,
                source.intermediate_size,
                format,
                "intermediate" if source.packed_experts else "hidden",
                source_path=str(Path(source.path).resolve()),
                fingerprint=source.fingerprint,
            )

    @classmethod
    def quantize(cls, source: ModelSource, format: str = "nf4") -> ExpertStore:
        """Quantise a checkpoint's experts, reading one at a time, and seal. Shows a progress bar on a terminal.

        Raises as `unfilled`; StoreError for weights or codes that cannot be read or are not finite.
        """
        store = cls.unfilled(source, format)
        for layer, expert in store._progress():
            fill_page(store.layout, store._writable_page(layer, expert), store._encoded(source, layer, expert))
        source.close()
        store.seal()
        return store

    @classmethod
    def quantize_to(
        cls, path: str | os.PathLike, source: ModelSource, format: str = "nf4", *, shard_bytes: int = _SHARD_BYTES
    ) -> ExpertStore:
        """Quantise a checkpoint's experts straight into a store's folder, one expert in memory at a time; opened from
        there in the tier "disk". The folder is the one that `quantize` and `save` write, and raises as they do.
        """
        store = cls.unfilled(source, format)

        def encoded() -> Iterator[np.ndarray]:
            for layer, expert in store._progress():
                page = np.zeros(store.layout.page_bytes, dtype=np.uint8)
                fill_page(store.layout, page, store._encoded(source, layer, expert))
                yield page

        store._write_folder(path, source, encoded(), shard_bytes)
        source.close()
        return cls.open(path, verify=False, tier="disk")

    def _encoded(self, source: ModelSource, layer: int, expert: int) -> list[Encoded]:
        """What a checkpoint's expert becomes in this store."""
        if source.packed_experts:
            return source.packed_expert(layer, expert)
        return encode_expert(self.layout, *source.expert(layer, expert), f"layer {layer}, expert {expert}")

    @property
    def bytes(self) -> int:
        """Of all pages, wherever they are."""
        return self.num_layers * self.num_experts * self.layout.page_bytes

    @property
    def tier(self) -> str:
        """ "memory" or "disk"."""
        return "disk" if self._native is not None and self._native.on_disk else "memory"

    @property
    def sealed(self) -> bool:
        return self._native is not None and self._native.sealed

    def seal(self) -> None:
        """From now on read-only; a pager needs that."""
        self.native.seal()

    def write_expert(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        """Encode one expert into its page.

        Args:
            gate, up: [intermediate_size, hidden_size], any floating dtype. down: [hidden_size, intermediate_size].

        Raises:
            TypeError: not a tensor of a floating dtype.
            ValueError: a wrong shape, or weights that are not finite in fp32 or too large for the format (naming layer,
                expert and matrix).
            StoreError: the store is sealed, or layer or expert are out of range.
            The page is as it was after each of these.
        """
        page = self._writable_page(layer, expert)
        fill_page(self.layout, page, encode_expert(self.layout, gate, up, down, f"layer {layer}, expert {expert}"))

    def write_encoded_expert(self, layer: int, expert: int, gate: Encoded, up: Encoded, down: Encoded) -> None:
        """Put one expert that is encoded already into its page, bit for bit.

        Args:
            gate, up, down: pairs of codes (uint8) and absmax (`ops.scale_dtype(format)`), in row-major order and of any
                shape. In down_axis "intermediate" they are what bitsandbytes' quantize_4bit gives for gate, up
                [intermediate_size, hidden_size] and down [hidden_size, intermediate_size] in NF4 with blocks of 64; in
                down_axis "hidden" what `ops.quantize_blocks` gives for gate, up and the transpose of down.

        Raises:
            TypeError, ValueError: a wrong dtype or size, or an absmax that is not finite (naming layer, expert and
                matrix).
            StoreError: as `write_expert`. The page is as it was after each of these.
        """
        encoded = [gate, up, down]
        check_encoded(self.layout, encoded, f"layer {layer}, expert {expert}")
        fill_page(self.layout, self._writable_page(layer, expert), encoded)

    def _writable_page(self, layer: int, expert: int) -> np.ndarray:
        if self.sealed:
            raise StoreError("the store is sealed: its pages are read-only")
        return np.frombuffer(self.native.page(layer, expert), dtype=np.uint8)

    def _page(self, layer: int, expert: int) -> np.ndarray:
        """A page's bytes: its place in memory, or read from disk."""
        if self.tier == "memory":
            return np.frombuffer(self.native.page(layer, expert), dtype=np.uint8)
        buffer = mmap.mmap(-1, self.layout.page_bytes)  # aligned, and given back with its last reader
        self.native.read_page(layer, expert, buffer)
        return np.frombuffer(buffer, dtype=np.uint8)

    def rows(self, layer: int, expert: int, neurons: Tensor) -> tuple[Tensor, Tensor]:
        """Codes u8 [n, 3, code_bytes] and absmax [n, 3, num_blocks] of some neurons: gate, up, down^T. Copies.

        In down_axis "intermediate" the rows of down^T are decoded and encoded again along hidden_size, so they are not
        quite the weights that `read_expert` gives.

        Raises:
            TypeError: `neurons` is not a tensor of int32 or int64 numbers in one dimension.
            ValueError: one of them is no neuron of the expert.
        """
        if not isinstance(neurons, Tensor) or neurons.dtype not in (torch.int32, torch.int64) or neurons.dim() != 1:
            raise TypeError("neurons: expected an int32 or int64 tensor of one dimension")
        if neurons.numel() and not 0 <= int(neurons.min()) <= int(neurons.max()) < self.intermediate_size:
            raise ValueError(f"neurons: expected numbers in [0, {self.intermediate_size})")
        picked = neurons.cpu().numpy()
        return neuron_rows(self.layout, self._page(layer, expert), picked)

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded gate and up [intermediate_size, hidden_size] and down [hidden_size, intermediate_size]."""
        return decode_expert(self.layout, self._page(layer, expert), dtype)

    # --- the folder -------------------------------------------------------------------------------------------------

    def _page_list(self) -> list[tuple[int, int]]:
        return [(layer, expert) for layer in range(self.num_layers) for expert in range(self.num_experts)]

    def _progress(self) -> tqdm:
        verb = "Quantising" if self.down_axis == "hidden" else "Importing"
        return tqdm(self._page_list(), f"{verb} experts to {self.format}", unit="expert", disable=None)

    def save(
        self, path: str | os.PathLike, source: ModelSource | None = None, *, shard_bytes: int = _SHARD_BYTES
    ) -> None:
        """Write the store's folder, whole or not at all; an older store at `path` is replaced.

        Args:
            source: the checkpoint it was quantised from: its config, tokenizer and non-expert tensors are copied.
                Without it the folder holds experts only, and no model can be loaded from it.
            shard_bytes: largest size of one experts file.

        Raises:
            StoreError: not sealed yet, or `source` is not the checkpoint that this store came from.
            FileExistsError: something that is no store stands at `path`.
        """
        if not self.sealed:
            raise StoreError("the store is not sealed yet: fill every page, then seal()")
        if source is not None and source.fingerprint != self.fingerprint:
            raise StoreError(f"{source.path}: not the checkpoint that this store was quantised from")
        if source is None:
            logger.warning("%s: saved without its checkpoint: experts only, no config, tokenizer or dense part", path)
        self._write_folder(path, source, (self._page(*page) for page in self._page_list()), shard_bytes)

    def _write_folder(
        self, path: str | os.PathLike, source: ModelSource | None, pages: Iterator[np.ndarray], shard_bytes: int
    ) -> None:
        self.check_target(path)
        index = {
            "format": self.format,
            "layer_names": self.layer_names,
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "matrices": describe_page(self.layout),
            "page_bytes": self.layout.page_bytes,
            "source": {"path": self.source_path, "fingerprint": self.fingerprint},
        }
        names = [_page_name(*page) for page in self._page_list()]
        write_folder(Path(path), index, names, pages, source, shard_bytes)

    @staticmethod
    def check_target(path: str | os.PathLike) -> None:
        """Raise FileExistsError if something that is no store stands at `path`: `save` would refuse it too."""
        target = Path(path)
        if target.exists() and not is_store(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{target}: something that is no store stands there; remove it or name another place")

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = True, *, tier: str = "memory") -> ExpertStore:
        """Open a store's folder; sealed.

        Args:
            verify: check every page's and dense file's crc32, which reads them all once. Sizes are always checked.
            tier: "memory": read all pages into memory. "disk": leave them in their files, which stay open; a page that
                cannot be read any more is a StoreError of the call that needs it. Checksums are compared here only.

        Raises:
            ValueError: an unknown tier.
            StoreError: missing, truncated, foreign, from a newer version, or altered; names the file.
        """
        if tier not in TIERS:
            raise ValueError(f"tier: expected one of {TIERS}, got {tier!r}")
        folder = Path(path)
        index = read_index(folder)
        try:
            check_files(folder, index["files"], verify)
            if index["format"] not in _C.FORMATS:
                raise StoreError(f"{folder}: format {index['format']!r}; this usaf_ext reads {_C.FORMATS}")
            with named(folder / STORE_INDEX_NAME):
                store = cls(
                    index["layer_names"],
                    index["num_experts"],
                    index["hidden_size"],
                    index["intermediate_size"],
                    index["format"],
                    index["matrices"][2]["block_axis"].removesuffix("_size"),
                    source_path=index["source"]["path"],
                    fingerprint=index["source"]["fingerprint"],
                )
            checksums = index["page_crc32"] if verify else None
            known = index["page_bytes"] == store.layout.page_bytes and index["matrices"] == describe_page(store.layout)
            files = {name: entry["bytes"] for name, entry in index["files"].items() if name.startswith("experts-")}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{folder / STORE_INDEX_NAME}: not a store's index: {error!r}") from error
        if not known:
            raise StoreError(f"{folder / STORE_INDEX_NAME}: a page layout that this version cannot read")
        names = {_page_name(*page): page for page in store._page_list()}
        places = page_places(folder, files, set(names), store.layout.page_bytes)
        if tier == "disk":
            numbers = {name: number for number, name in enumerate(files)}
            store._native = _C.ExpertStore.from_files(
                *(store.num_layers, store.num_experts, store.layout),
                [(os.fsencode(folder / name), size) for name, size in files.items()],
                [(numbers[places[name][0].name], places[name][1]) for name in names],
            )
        for name, (file, begin) in places.items():
            if tier == "memory":
                read_page(file, name, begin, store.native.page(*names[name]))
            if checksums is not None and zlib.crc32(store._page(*names[name]).data) != checksums.get(name):
                raise StoreError(f"{file}: page {name} is damaged: its crc32 does not match")
        store.seal()
        return store

    @classmethod
    def open_within(cls, path: str | os.PathLike, host_budget: int | str | None = None) -> ExpertStore:
        """Open in the tier "memory" if all pages together fit `host_budget` bytes (None: no limit), else in "disk".

        Raises as `open`; ValueError for a budget that is no size.
        """
        if host_budget is None:
            return cls.open(path)
        on_disk = cls.open(path, verify=False, tier="disk")
        fits = on_disk.bytes <= parse_size(host_budget, "host_budget")
        return cls.open(path, tier="memory" if fits else "disk")

    def __repr__(self) -> str:
        return (
            f"ExpertStore(layers={self.num_layers}, experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, format={self.format!r}, bytes={self.bytes}, "
            f"tier={self.tier!r})"
        )
