"""The files of a plain Hugging Face checkpoint folder: config, shards, and where every byte of every tensor stands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from .errors import StoreError
from .safetensors_io import TensorInfo, read_safetensors_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Files that make the folder usable beside its tensors. Everything else (README, images, .bin) is left behind.
SUPPORT_FILE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises StoreError when missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{path}: expected a JSON object")
    return config


def resolve_folder(path: str | Path) -> Path:
    """A local folder as it is; anything else as a hub id, fetched (safetensors, JSON and tokenizer files) or cached.

    Raises StoreError when it is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text in (".", ".."):
        raise StoreError(f"{path}: no such checkpoint folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", INDEX_NAME, *SUPPORT_FILE_PATTERNS]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StoreError(f"{path}: no such local folder, and not available from the hub ({reason})") from error


Folder = TypeVar("Folder", bound="CheckpointFolder")


class CheckpointFolder:
    """A folder with config.json and safetensors weights, opened read-only. Make it with `open`.

    Attributes:
        path: the folder.  config: its config.json.
        tensors: every tensor, in shard and data order.  shard_metadata: file name -> its safetensors metadata.
        fingerprint: sha256 (hex) over config.json and each shard's name, size and safetensors header.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shard_metadata: dict[str, dict[str, str]]
    fingerprint: str
    _handles: dict[str, Any]  # open safetensors files

    @classmethod
    def open(cls: type[Folder], path: str | Path) -> Folder:
        """Open a folder or hub id. Reads headers only.

        Raises StoreError when files are missing or damaged, or the weights are pickled.
        """
        opened = cls()
        opened.path = resolve_folder(path)
        opened.config = read_config(opened.path)
        opened._handles = {}
        opened._open_shards()
        return opened

    def _open_shards(self) -> None:
        index_path = self.path / INDEX_NAME
        single = self.path / SINGLE_NAME
        weight_map: dict[str, str] | None = None
        if single.exists():
            names = [SINGLE_NAME]
        elif index_path.exists():
            try:
                weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
                names = sorted(set(weight_map.values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(f"{index_path}: damaged index ({error})") from error
        elif any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")) or any(self.path.glob("*.pth")):
            raise StoreError(f"{self.path}: only pickled weights; convert them to safetensors first")
        else:
            raise StoreError(f"{self.path}: neither {SINGLE_NAME} nor {INDEX_NAME}")
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        self.tensors = {}
        self.shard_metadata = {}
        for name in names:
            if Path(name).name != name:
                raise StoreError(f"{index_path}: shard name {name!r} leads out of the folder")
            shard = self.path / name
            if not shard.exists():
                raise StoreError(f"{self.path}: shard {name} is missing")
            tensors, metadata, raw = read_safetensors_header(shard)
            digest.update(f"\0{name}\0{shard.stat().st_size}\0".encode())
            digest.update(raw)
            for key in tensors:
                if key in self.tensors:
                    raise StoreError(f"{shard}: tensor {key!r} stands in {self.tensors[key].file} too")
            self.tensors.update(tensors)
            self.shard_metadata[name] = metadata
        for key, name in (weight_map or {}).items():
            if key not in self.tensors or self.tensors[key].file != name:
                raise StoreError(f"{self.path}: tensor {key!r} is missing from shard {name}")
        self.fingerprint = digest.hexdigest()

    @property
    def shards(self) -> dict[str, list[str]]:
        """File name -> its tensor keys, in the order of their data."""
        result: dict[str, list[str]] = {name: [] for name in self.shard_metadata}
        for key, info in self.tensors.items():
            result[info.file].append(key)
        return result

    def support_files(self) -> list[Path]:
        """config, tokenizer and licence files of the folder."""
        found = {path for pattern in SUPPORT_FILE_PATTERNS for path in self.path.glob(pattern) if path.is_file()}
        return sorted(found)

    def copy_support_files(self, folder: Path) -> list[str]:
        """Write `support_files` into `folder`; returns their names."""
        files = self.support_files()
        for file in files:
            (folder / file.name).write_bytes(self._support_bytes(file))
        return [file.name for file in files]

    def _support_bytes(self, file: Path) -> bytes:
        return file.read_bytes()

    def read_tensor(self, key: str) -> torch.Tensor:
        """One whole tensor in the checkpoint's dtype. Raises KeyError for an unknown key."""
        if key not in self.tensors:
            raise KeyError(key)
        return self._handle(self.tensors[key].file).get_tensor(key)

    def tensor_bytes(self, key: str, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """The tensor's bytes as they stand in the file, in pieces of at most `chunk_bytes`."""
        info = self.tensors[key]
        with (self.path / info.file).open("rb") as file:
            file.seek(info.begin)
            left = info.num_bytes
            while left:
                piece = file.read(min(left, chunk_bytes))
                if not piece:
                    raise StoreError(f"{self.path / info.file}: truncated while reading {key!r}")
                left -= len(piece)
                yield piece

    def close(self) -> None:
        """Drop the open files. Later reads open them again."""
        self._handles.clear()

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise StoreError(f"cannot read {self.path / file}: {error}") from error
        return self._handles[file]

    def _slice(self, key: str) -> Any:
        return self._handle(self.tensors[key].file).get_slice(key)
