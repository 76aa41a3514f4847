"""The folder of an `ExpertStore` around its pages: the index, its checks, the dense part copied from a checkpoint."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from .checkpoint_folder import INDEX_NAME, SINGLE_NAME
from .checkpoint_source import STORE_INDEX_NAME, ModelSource
from .errors import StoreError
from .safetensors_io import write_safetensors

FORMAT_VERSION = 1
_KIND = "usaf_store"
_CHUNK_BYTES = 16 << 20


def is_store(path: str | os.PathLike) -> bool:
    """Is `path` the folder of a store?"""
    return (Path(path) / STORE_INDEX_NAME).is_file()


def _index_crc(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in index.items() if k != "crc32"}, sort_keys=True).encode())


def file_crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_index(folder: Path, contents: dict[str, Any]) -> None:
    """Write `usaf_store.json` with its own checksum."""
    index = {"kind": _KIND, "format_version": FORMAT_VERSION, **contents}
    index["crc32"] = _index_crc(index)
    (folder / STORE_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any]:
    """`usaf_store.json`. Raises StoreError when it is missing, foreign, from a newer version, or damaged."""
    path = folder / STORE_INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{folder}: not a store: it has no {STORE_INDEX_NAME}") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if not isinstance(index, dict) or index.get("kind") != _KIND:
        raise StoreError(f"{path}: not the index of a usaf store")
    version = index.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise StoreError(f"{path}: format_version {version!r}; this usaf_ext reads 1 to {FORMAT_VERSION}")
    if index.get("crc32") != _index_crc(index):
        raise StoreError(f"{path}: damaged: its crc32 does not match")
    return index


def check_files(folder: Path, files: dict[str, dict[str, int]], verify: bool) -> None:
    """Raise StoreError unless every file has its size and, to `verify`, its crc32 where one is given."""
    for name, expected in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            found = "it is missing" if size is None else f"it has {size}"
            raise StoreError(f"{file}: expected {expected['bytes']} bytes, {found}")
        if verify and "crc32" in expected and file_crc(file) != expected["crc32"]:
            raise StoreError(f"{file}: damaged: its crc32 does not match")


def copy_dense(source: ModelSource, folder: Path) -> list[str]:
    """Copy everything of a checkpoint but its experts; returns the names of the files written."""
    names = []
    for support in source.support_files():
        (folder / support.name).write_bytes(support.read_bytes())
        names.append(support.name)
    weight_map: dict[str, str] = {}
    for shard, keys in source.shards.items():
        dense = [key for key in keys if not source.is_expert_key(key)]
        if not dense:
            continue
        tensors = {key: (source.tensors[key].dtype, source.tensors[key].shape) for key in dense}
        chunks = (chunk for key in dense for chunk in source.tensor_bytes(key))
        with (folder / shard).open("wb") as file:
            write_safetensors(file, tensors, chunks, source.shard_metadata[shard])
        weight_map |= dict.fromkeys(dense, shard)
        names.append(shard)
    if list(source.shards) != [SINGLE_NAME]:
        total = sum(source.tensors[key].num_bytes for key in weight_map)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
        names.append(INDEX_NAME)
    return names
