"""The delta: what a run learnt (bank rows, frozen rows and fp32 routers), as one small safetensors file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .atomic import atomic_file
from .bank import RowBank
from .bank_rows import KEPT_BY_MODE
from .errors import StoreError
from .experts import PagedLayer, expert_store, paged_layers, trained_banks
from .router import find_routers, train_routers, trained_routers

DELTA_FORMAT_VERSION = 2  # 1: without frozen rows
DELTA_KIND = "usaf_delta"
_METADATA_KEY = "usaf"
_ROWS = ("neuron_expert", "neuron_index", "codes", "absmax")


def _digest(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over the metadata and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checked(
    path: Path, kind: str, format_version: int, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write tensors and JSON metadata as a safetensors file that carries its kind, version and sha256.

    Not atomic: callers give a temporary path (usaf_ext.atomic).
    """
    header = {"kind": kind, "format_version": format_version, **metadata}
    header["sha256"] = _digest(header, tensors)
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(flat, path, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})


def read_checked(path: Path, kind: str, format_version: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what write_checked wrote: (metadata, tensors on the CPU).

    Raises StoreError naming the file when it is missing, truncated, of another kind, newer, or altered.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(_METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = None if raw is None else json.loads(raw)
    except (SafetensorError, ValueError, OSError) as error:
        raise StoreError(f"{path}: truncated or damaged ({error})") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise StoreError(f"{path}: not a {kind} file")
    version = header.get("format_version")
    if not isinstance(version, int) or version > format_version:
        raise StoreError(f"{path}: format version {version}; this usaf_ext reads up to {format_version}")
    expected = header.pop("sha256", None)
    if _digest(header, tensors) != expected:
        raise StoreError(f"{path}: damaged: its sha256 does not match")
    return header, tensors


@dataclass(frozen=True)
class Delta:
    """A delta in memory.

    Attributes:
        fingerprint: of the base model (None: a store made from plain tensors). format, mode: as in RowBank.
        banks: layer name -> {"neuron_expert", "neuron_index", "codes", "absmax"[, "master" or "residual"]}, as in
            RowBank, on the CPU.
        routers: router name -> float32 weight [num_experts, hidden_size].
        frozen: as banks, of the rows that re-selection froze; layers without any are not in it.
    """

    fingerprint: str | None
    format: str
    mode: str
    banks: dict[str, dict[str, torch.Tensor]]
    routers: dict[str, torch.Tensor]
    frozen: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def delta_of(model: nn.Module) -> Delta:
    """The trained state of a model; its tensors share memory with the model's where that is on the CPU.

    Raises ValueError when the model has neither a bank nor a trained router.
    """
    store, layers = expert_store(model), paged_layers(model)
    banks = {layer.name: _bank_rows(layer.bank) for layer in layers if layer.bank is not None}
    frozen = {layer.name: _bank_rows(layer.frozen_bank) for layer in layers if layer.frozen_bank is not None}
    modes = {bank.mode for bank in trained_banks(model)}
    routers = {name: module.get_parameter("weight").detach().cpu() for name, module in trained_routers(model).items()}
    if not modes and not routers:
        raise ValueError("model: nothing was trained: no layer has a bank and no router is trained")
    if len(modes) > 1:
        raise ValueError(f"model: its banks differ in mode: {sorted(modes)}")
    return Delta(store.fingerprint, store.format, modes.pop() if modes else "master", banks, routers, frozen)


def _bank_rows(bank: RowBank) -> dict[str, torch.Tensor]:
    rows = {"neuron_expert": bank.neuron_expert, "neuron_index": bank.neuron_index, **bank.rows}
    return {name: tensor.cpu() for name, tensor in rows.items()}


def write_delta(path: str | Path, delta: Delta) -> None:
    """Write a delta file, whole or not at all; an older one at `path` is replaced."""
    metadata = {
        "fingerprint": delta.fingerprint,
        "format": delta.format,
        "mode": delta.mode,
        "layers": list(delta.banks),
        "frozen": list(delta.frozen),
        "routers": list(delta.routers),
    }
    tensors = {f"{layer}.{name}": tensor for layer, rows in delta.banks.items() for name, tensor in rows.items()}
    tensors |= {f"{layer}.frozen.{name}": t for layer, rows in delta.frozen.items() for name, t in rows.items()}
    tensors |= {f"{name}.weight": weight for name, weight in delta.routers.items()}
    with atomic_file(path) as temporary:
        write_checked(temporary, DELTA_KIND, DELTA_FORMAT_VERSION, metadata, tensors)


def read_delta(path: str | Path) -> Delta:
    """Read a delta file. Raises StoreError when it is missing, truncated, foreign, newer, altered or incomplete."""
    header, tensors = read_checked(Path(path), DELTA_KIND, DELTA_FORMAT_VERSION)
    try:
        mode = header["mode"]
        if mode not in KEPT_BY_MODE:
            raise StoreError(f"{path}: mode {mode!r} is unknown to this usaf_ext")
        kept = KEPT_BY_MODE[mode]
        rows = _ROWS if kept is None else (*_ROWS, kept)
        banks = {layer: {name: tensors[f"{layer}.{name}"] for name in rows} for layer in header["layers"]}
        frozen = {
            layer: {name: tensors[f"{layer}.frozen.{name}"] for name in rows} for layer in header.get("frozen", [])
        }
        routers = {name: tensors[f"{name}.weight"] for name in header["routers"]}
        return Delta(header["fingerprint"], header["format"], mode, banks, routers, frozen)
    except KeyError as error:
        raise StoreError(f"{path}: incomplete: {error} is missing") from error


def apply_delta(model: nn.Module, delta: Delta, *, trainable: bool = True, **options: Any) -> None:
    """Give a model the banks and routers of `delta`, in place of its present ones.

    trainable False holds no gradients (for evaluation and generation). options: rounding, grad_dtype and placement of
    the banks, as in RowBank. Raises StoreError, before anything is changed, when the delta belongs to another base
    model, format or shape.
    """
    store, layers = expert_store(model), paged_layers(model)
    if delta.fingerprint != store.fingerprint:
        raise StoreError(
            f"the delta was trained on another base model (fingerprint {delta.fingerprint}, this one has "
            f"{store.fingerprint})"
        )
    if delta.format != store.format:
        raise StoreError(f"the delta has format {delta.format}, the store {store.format}")
    unknown = (set(delta.banks) | set(delta.frozen)) - {layer.name for layer in layers}
    if unknown:
        raise StoreError(f"the delta has layers that the model lacks: {', '.join(sorted(unknown))}")
    found = find_routers(model) if delta.routers else {}
    for name, weight in delta.routers.items():
        if name not in found or weight.shape != found[name].get_parameter("weight").shape:
            raise StoreError(f"the delta's router {name} {tuple(weight.shape)} does not fit the model")
    if delta.routers and set(found) != set(delta.routers):
        raise StoreError("the delta holds only some of the model's routers")
    banks = [
        (
            _bank_of(layer, delta, delta.banks.get(layer.name), trainable=trainable, **options),
            _bank_of(layer, delta, delta.frozen.get(layer.name), trainable=False, **options),
        )
        for layer in layers
    ]
    for layer, (bank, frozen) in zip(layers, banks):
        layer.set_bank(bank)
        layer.set_frozen_bank(frozen)
    if delta.routers:
        for name, router in train_routers(model).items():
            with torch.no_grad():
                router.get_parameter("weight").copy_(delta.routers[name])


def _bank_of(layer: PagedLayer, delta: Delta, rows: dict[str, torch.Tensor] | None, **options: Any) -> RowBank | None:
    if rows is None:
        return None
    own: dict[str, Any] = {name: tensor.clone() for name, tensor in rows.items()}
    try:
        return RowBank(
            layer=layer.index,
            format=delta.format,
            mode=delta.mode,
            num_experts=layer.num_experts,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            device=layer.device,
            **own,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise StoreError(f"the delta's rows of {layer.name} do not fit the model: {error}") from error
