"""The folder of an `ExpertStore` around its pages: the index, its checks, the dense part copied from a checkpoint."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import _C
from .atomic import atomic_directory
from .checkpoint_folder import INDEX_NAME, SINGLE_NAME
from .checkpoint_source import STORE_INDEX_NAME, ModelSource
from .errors import StoreError
from .safetensors_io import read_safetensors_header, write_safetensors

FORMAT_VERSION = 2  # 1: every block runs along hidden_size; still written where that is so
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
    along_hidden = all(matrix["block_axis"] == "hidden_size" for matrix in contents["matrices"])
    index = {"kind": _KIND, "format_version": 1 if along_hidden else FORMAT_VERSION, **contents}
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
    names = source.copy_support_files(folder)
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


def write_folder(
    target: Path,
    index: dict[str, Any],
    names: list[str],
    pages: Iterator[np.ndarray],
    source: ModelSource | None,
    shard_bytes: int,
) -> None:
    """Write a store's folder, whole or not at all.

    Args:
        index: `usaf_store.json`, but for the files and checksums, which are added.
        names, pages: the pages in order; each page's bytes, of one size, are asked for once.
        source: the checkpoint whose dense part is copied, or None.
        shard_bytes: largest size of one experts file.
    """
    page_bytes = index["page_bytes"]
    per_shard = max(1, shard_bytes // page_bytes)
    shards = [names[i : i + per_shard] for i in range(0, len(names), per_shard)]
    files: dict[str, dict[str, int]] = {}
    checksums: dict[str, int] = {}

    def checked(shard: list[str]) -> Iterator[memoryview]:
        for name, page in zip(shard, pages):
            checksums[name] = zlib.crc32(page.data)
            yield page.data

    with atomic_directory(target) as folder:
        for number, shard in enumerate(shards, start=1):
            name = f"experts-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, tuple[str, tuple[int, ...]]] = {page: ("U8", (page_bytes,)) for page in shard}
            with (folder / name).open("wb") as file:
                write_safetensors(file, tensors, checked(shard), align=_C.PAGE_ALIGN)
            files[name] = {"bytes": (folder / name).stat().st_size}
        for name in copy_dense(source, folder) if source is not None else ():
            files[name] = {"bytes": (folder / name).stat().st_size, "crc32": file_crc(folder / name)}
        write_index(folder, {**index, "files": files, "page_crc32": checksums})


def page_places(folder: Path, files: Iterable[str], pages: set[str], page_bytes: int) -> dict[str, tuple[Path, int]]:
    """Where each of `pages` stands, as their files have them: name -> (file, first byte).

    Raises StoreError for a page that is missing, and for a tensor that is no page.
    """
    places: dict[str, tuple[Path, int]] = {}
    for path in (folder / name for name in files):
        for key, info in read_safetensors_header(path)[0].items():
            if key not in pages or key in places or info.num_bytes != page_bytes or info.dtype != "U8":
                raise StoreError(f"{path}: unexpected tensor {key!r}")
            places[key] = (path, info.begin)
    for name in sorted(pages - places.keys()):
        raise StoreError(f"{folder}: page {name} is in none of its files")
    return places


def read_page(path: Path, name: str, begin: int, page: memoryview) -> None:
    """Fill `page` from byte `begin` of `path`. Raises StoreError when the file ends before."""
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(page):
            count = os.preadv(file.fileno(), [page[done:]], begin + done)
            if count == 0:
                raise StoreError(f"{path}: truncated while reading {name!r}")
            done += count
