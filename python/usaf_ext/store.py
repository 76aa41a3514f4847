"""ExpertStore: all experts of a model, quantised, one page per (layer, expert) in host memory; and its folder on disk.

The folder: `usaf_store.json` (sizes, per-page crc32, where it came from), `experts-*.safetensors` (one U8 tensor per
page, data at multiples of 4096), and, when it came from a checkpoint, that checkpoint's config, tokenizer and every
non-expert tensor byte for byte under their own names, so that transformers opens the folder too. Written whole or not
at all.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import _C, ops
from .atomic import atomic_directory
from .errors import StoreError
from .safetensors_io import read_safetensors_header, write_safetensors
from .store_files import STORE_INDEX_NAME, check_files, copy_dense, file_crc, is_store, read_index, write_index

if TYPE_CHECKING:
    from .checkpoint_source import ModelSource

logger = logging.getLogger(__name__)

_SHARD_BYTES = 4 << 30
_MATRICES = ("gate", "up", "down")


def _page_name(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}"


class ExpertStore:
    """Quantised experts in host memory. Make it with `create` (then `write_expert` and `seal`) or `open`.

    Attributes:
        layer_names: names of the experts modules, one per MoE layer.
        num_layers, num_experts, hidden_size, intermediate_size: sizes, the same for every layer.
        format: one of `_C.FORMATS`.
        layout: the page's layout (`_C.PageLayout`).
        native: the C++ object (`_C.ExpertStore`).
        source_path, fingerprint: of the checkpoint it was quantised from, or None.
    """

    def __init__(
        self,
        layer_names: list[str],
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        format: str,
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
        self.source_path = source_path
        self.fingerprint = fingerprint
        self.layout = _C.PageLayout(format, hidden_size, intermediate_size)
        self.native = _C.ExpertStore(self.num_layers, num_experts, self.layout)

    @classmethod
    def create(
        cls, layer_names: list[str], num_experts: int, hidden_size: int, intermediate_size: int, format: str = "nf4"
    ) -> ExpertStore:
        """An empty store to fill with `write_expert`.

        Raises:
            ValueError: sizes below 1, an unknown format, names that repeat.
            StoreError: the memory cannot be had.
        """
        return cls(layer_names, num_experts, hidden_size, intermediate_size, format)

    @classmethod
    def quantize(cls, source: ModelSource, format: str = "nf4") -> ExpertStore:
        """Quantise a checkpoint's experts, reading one at a time, and seal. Shows a progress bar on a terminal."""
        store = cls(
            source.layer_names,
            source.num_experts,
            source.hidden_size,
            source.intermediate_size,
            format,
            source_path=str(Path(source.path).resolve()),
            fingerprint=source.fingerprint,
        )
        for layer, expert in tqdm(store._page_list(), f"Quantising experts to {format}", unit="expert", disable=None):
            store.write_expert(layer, expert, *source.expert(layer, expert))
        source.close()
        store.seal()
        return store

    @property
    def bytes(self) -> int:
        return self.native.bytes

    @property
    def sealed(self) -> bool:
        return self.native.sealed

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
        if self.sealed:
            raise StoreError("the store is sealed: its pages are read-only")
        page = np.frombuffer(self.native.page(layer, expert), dtype=np.uint8)
        rows, cols = self.intermediate_size, self.hidden_size
        encoded = []
        for name, weight, shape in zip(_MATRICES, (gate, up, down), ((rows, cols), (rows, cols), (cols, rows))):
            where = f"{name} of layer {layer}, expert {expert}"
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
                raise TypeError(f"{where}: expected a tensor of a floating dtype, got {found}")
            if tuple(weight.shape) != shape:
                raise ValueError(f"{where}: expected shape {shape}, got {tuple(weight.shape)}")
            if weight.dtype != torch.bfloat16:
                weight = weight.float()
            weight = weight.detach().cpu()
            try:
                encoded.append(ops.quantize_blocks((weight.T if name == "down" else weight).contiguous(), self.format))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        for matrix, (codes, absmax) in enumerate(encoded):
            for start, part in ((self.layout.codes_offset, codes), (self.layout.absmax_offset, absmax)):
                raw = part.contiguous().view(torch.uint8).numpy().reshape(-1)
                page[start[matrix] : start[matrix] + raw.size] = raw

    def _matrix(self, layer: int, expert: int, matrix: int) -> tuple[np.ndarray, np.ndarray]:
        """codes u8 [intermediate_size, code_bytes] and absmax [.., num_blocks]: views of the page."""
        page = np.frombuffer(self.native.page(layer, expert), dtype=np.uint8)
        views = []
        for start, width, dtype in (
            (self.layout.codes_offset, _C.code_bytes(self.format, self.hidden_size), np.uint8),
            (self.layout.absmax_offset, _C.num_blocks(self.format, self.hidden_size), _C.scale_dtype(self.format)),
        ):
            size = self.intermediate_size * width * np.dtype(dtype).itemsize
            raw = page[start[matrix] : start[matrix] + size]
            views.append(raw.view(dtype).reshape(self.intermediate_size, width))
        return views[0], views[1]

    def rows(self, layer: int, expert: int, neurons: Tensor) -> tuple[Tensor, Tensor]:
        """Codes u8 [n, 3, code_bytes] and absmax [n, 3, num_blocks] of some neurons: gate, up, down^T. Copies.

        Raises:
            TypeError: `neurons` is not a tensor of int32 or int64 numbers in one dimension.
            ValueError: one of them is no neuron of the expert.
        """
        if not isinstance(neurons, Tensor) or neurons.dtype not in (torch.int32, torch.int64) or neurons.dim() != 1:
            raise TypeError("neurons: expected an int32 or int64 tensor of one dimension")
        if neurons.numel() and not 0 <= int(neurons.min()) <= int(neurons.max()) < self.intermediate_size:
            raise ValueError(f"neurons: expected numbers in [0, {self.intermediate_size})")
        picked = neurons.cpu().numpy()
        parts = [self._matrix(layer, expert, matrix) for matrix in range(len(_MATRICES))]
        codes, absmax = (np.stack([part[which][picked] for part in parts], axis=1) for which in (0, 1))
        return torch.from_numpy(codes), torch.from_numpy(absmax)

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded gate and up [intermediate_size, hidden_size] and down [hidden_size, intermediate_size]."""
        decoded = []
        for matrix in range(len(_MATRICES)):
            codes, absmax = (torch.from_numpy(part.copy()) for part in self._matrix(layer, expert, matrix))
            decoded.append(ops.dequantize_blocks(codes, absmax, self.hidden_size, self.format, dtype))
        gate, up, down = decoded
        return gate, up, down.T.contiguous()

    # --- the folder -------------------------------------------------------------------------------------------------

    def _page_list(self) -> list[tuple[int, int]]:
        return [(layer, expert) for layer in range(self.num_layers) for expert in range(self.num_experts)]

    def _matrices(self) -> list[dict[str, Any]]:
        """What stands in a page, for readers that know the safetensors file only."""
        return [
            {
                "name": name,
                "transposed": name == "down",
                "format": self.format,
                "block_axis": "hidden_size",
                "codes_offset": self.layout.codes_offset[matrix],
                "absmax_offset": self.layout.absmax_offset[matrix],
            }
            for matrix, name in enumerate(_MATRICES)
        ]

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
        target = Path(path)
        if not self.sealed:
            raise StoreError("the store is not sealed yet: fill every page, then seal()")
        if source is not None and source.fingerprint != self.fingerprint:
            raise StoreError(f"{source.path}: not the checkpoint that this store was quantised from")
        self.check_target(target)
        if source is None:
            logger.warning("%s: saved without its checkpoint: experts only, no config, tokenizer or dense part", target)
        pages = self._page_list()
        per_shard = max(1, shard_bytes // self.layout.page_bytes)
        shards = [pages[i : i + per_shard] for i in range(0, len(pages), per_shard)]
        with atomic_directory(target) as folder:
            files: dict[str, dict[str, int]] = {}
            checksums: dict[str, int] = {}
            for number, shard in enumerate(shards, start=1):
                name = f"experts-{number:05d}-of-{len(shards):05d}.safetensors"
                tensors: dict[str, tuple[str, tuple[int, ...]]] = {
                    _page_name(*page): ("U8", (self.layout.page_bytes,)) for page in shard
                }
                with (folder / name).open("wb") as file:
                    write_safetensors(file, tensors, self._pages(shard, checksums), align=_C.PAGE_ALIGN)
                files[name] = {"bytes": (folder / name).stat().st_size}
            for name in copy_dense(source, folder) if source is not None else ():
                files[name] = {"bytes": (folder / name).stat().st_size, "crc32": file_crc(folder / name)}
            index = {
                "format": self.format,
                "layer_names": self.layer_names,
                "num_experts": self.num_experts,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "matrices": self._matrices(),
                "page_bytes": self.layout.page_bytes,
                "source": {"path": self.source_path, "fingerprint": self.fingerprint},
                "files": files,
                "page_crc32": checksums,
            }
            write_index(folder, index)

    @staticmethod
    def check_target(path: str | os.PathLike) -> None:
        """Raise FileExistsError if something that is no store stands at `path`: `save` would refuse it too."""
        target = Path(path)
        if target.exists() and not is_store(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{target}: something that is no store stands there; remove it or name another place")

    def _pages(self, pages: list[tuple[int, int]], checksums: dict[str, int]) -> Iterator[memoryview]:
        for page in pages:
            view = self.native.page(*page)
            checksums[_page_name(*page)] = zlib.crc32(view)
            yield view

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = True) -> ExpertStore:
        """Read a store's folder into memory; sealed.

        Args:
            verify: check every page's and dense file's crc32 (reads the dense files too). Sizes are always checked.

        Raises:
            StoreError: missing, truncated, foreign, from a newer version, or altered; names the file.
        """
        folder = Path(path)
        index = read_index(folder)
        try:
            check_files(folder, index["files"], verify)
            if index["format"] not in _C.FORMATS:
                raise StoreError(f"{folder}: format {index['format']!r}; this usaf_ext reads {_C.FORMATS}")
            store = cls(
                index["layer_names"],
                index["num_experts"],
                index["hidden_size"],
                index["intermediate_size"],
                index["format"],
                source_path=index["source"]["path"],
                fingerprint=index["source"]["fingerprint"],
            )
            checksums = index["page_crc32"] if verify else None
            known = index["page_bytes"] == store.layout.page_bytes and index["matrices"] == store._matrices()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{folder / STORE_INDEX_NAME}: not a store's index: {error!r}") from error
        if not known:
            raise StoreError(f"{folder / STORE_INDEX_NAME}: a page layout that this version cannot read")
        missing = {_page_name(*page): page for page in store._page_list()}
        for name in (name for name in index["files"] if name.startswith("experts-")):
            store._read_pages(folder / name, missing, checksums)
        if missing:
            raise StoreError(f"{folder}: page {next(iter(missing))} is in none of its files")
        store.seal()
        return store

    def _read_pages(self, path: Path, missing: dict[str, tuple[int, int]], checksums: dict[str, int] | None) -> None:
        tensors, _, _ = read_safetensors_header(path)
        with path.open("rb", buffering=0) as file:
            for key, info in tensors.items():
                page = missing.pop(key, None)
                if page is None or info.num_bytes != self.layout.page_bytes or info.dtype != "U8":
                    raise StoreError(f"{path}: unexpected tensor {key!r}")
                view = self.native.page(*page)
                done = 0
                while done < info.num_bytes:
                    count = os.preadv(file.fileno(), [view[done:]], info.begin + done)
                    if count == 0:
                        raise StoreError(f"{path}: truncated while reading {key!r}")
                    done += count
                if checksums is not None and zlib.crc32(view) != checksums.get(key):
                    raise StoreError(f"{path}: page {key} is damaged: its crc32 does not match")

    def __repr__(self) -> str:
        return (
            f"ExpertStore(layers={self.num_layers}, experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, format={self.format!r}, bytes={self.bytes})"
        )
