"""Reading a plain Hugging Face checkpoint (safetensors, one file or sharded), one expert at a time; also one whose
linear layers bitsandbytes quantised to NF4 (transformers' `load_in_4bit`), which looks like a plain one here.

`ModelSource` never unpickles and never holds more than the slice that was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .bitsandbytes_nf4 import PackedWeight, find_packed, is_bitsandbytes
from .checkpoint_folder import CheckpointFolder, resolve_folder
from .errors import StoreError, named
from .safetensors_io import TensorInfo

STORE_INDEX_NAME = "usaf_store.json"

WEIGHT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class ExpertLayout:
    """One way to name expert weights. `key` has the groups `module`, `matrix` and, unless fused, `expert`."""

    name: str
    key: re.Pattern[str]
    matrices: tuple[str, ...]  # what `matrix` is for gate, up, down; for fused: gate_up, down
    fused: bool
    # Checkpoints of some families call the block another name than transformers' module.
    module_renames: tuple[tuple[str, str], ...] = ()

    def module_name(self, in_checkpoint: str) -> str:
        for old, new in self.module_renames:
            in_checkpoint = in_checkpoint.replace(old, new)
        return in_checkpoint


EXPERT_LAYOUTS = (
    ExpertLayout(
        "per-expert gate_proj/up_proj/down_proj",
        re.compile(r"^(?P<module>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight$"),
        ("gate_proj", "up_proj", "down_proj"),
        fused=False,
    ),
    ExpertLayout(
        "per-expert w1/w3/w2",
        re.compile(r"^(?P<module>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<matrix>w1|w2|w3)\.weight$"),
        ("w1", "w3", "w2"),
        fused=False,
        module_renames=((".block_sparse_moe.", ".mlp."),),
    ),
    ExpertLayout(
        "fused gate_up_proj/down_proj",
        re.compile(r"^(?P<module>(?:.+\.)?experts)\.(?P<matrix>gate_up_proj|down_proj)$"),
        ("gate_up_proj", "down_proj"),
        fused=True,
    ),
)
_NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
_ANY_EXPERT_KEY = re.compile(r"(?:^|\.)experts\.")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that orders the numbers between dots by value: layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def find_checkpoint_key(folder: CheckpointFolder, parameter: str) -> str | None:
    """The key under which a checkpoint holds a model's parameter, or None when it has none."""
    renames = [rename for layout in EXPERT_LAYOUTS for rename in layout.module_renames]
    keys = (parameter, *(parameter.replace(ours, theirs) for theirs, ours in renames))
    return next((key for key in keys if key in folder.tensors), None)


def checkpoint_key(folder: CheckpointFolder, parameter: str) -> str:
    """As `find_checkpoint_key`. Raises StoreError when it has none."""
    key = find_checkpoint_key(folder, parameter)
    if key is None:
        raise StoreError(f"{folder.path}: no tensor for the parameter {parameter!r}")
    return key


class ModelSource(CheckpointFolder):
    """A plain Mixture-of-Experts checkpoint. Make it with `ModelSource.open`.

    Weights that bitsandbytes quantised to NF4 ("packed") appear as plain ones: `tensors` has their decoded shape and
    dtype and not what belongs to them, reading one decodes it, and a copied config.json has no quantization_config.

    Attributes:
        layer_names: the experts modules as transformers names them, MoE layers only, in order.
        num_experts, hidden_size, intermediate_size: sizes, the same for every layer.
        dtype: torch dtype of the expert weights.
        layout: the ExpertLayout of its keys.
        packed: the NF4 weights, experts or not, by key.
        packed_experts: whether the experts are NF4 weights.
    """

    layer_names: list[str]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    layout: ExpertLayout
    packed: dict[str, PackedWeight]
    packed_experts: bool
    _stored: dict[str, TensorInfo]  # the tensors that the files really have
    _keys: list[list[list[str]]]  # [layer][expert] -> keys in the layout's order
    _expert_keys: set[str]

    @classmethod
    def open(cls, path: str | Path) -> ModelSource:
        """Open a checkpoint folder or hub id. Reads headers only.

        Raises StoreError when files or experts are missing, shapes differ, the checkpoint is pickled, already
        quantised (but by bitsandbytes to NF4), a usaf store, or has no experts in a known layout.
        """
        folder = resolve_folder(path)
        if (folder / STORE_INDEX_NAME).exists():
            raise StoreError(f"{folder}: a usaf store; the original checkpoint is needed here")
        source = super().open(folder)
        source.packed, source._stored = {}, source.tensors
        quantization = source.config.get("quantization_config")
        if is_bitsandbytes(quantization):
            source._unpack()
        elif quantization is not None:
            method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
            raise StoreError(f"{source.path}: already quantised ({method}); a plain checkpoint is needed")
        source._find_experts()
        return source

    def _unpack(self) -> None:
        """Let packed weights stand in `tensors` as what they decode to."""
        with named(self.path):
            self.packed, parts = find_packed(self.tensors, self._read_stored)
        self.tensors = {
            key: self.packed[key].info if key in self.packed else info
            for key, info in self._stored.items()
            if key not in parts
        }

    def _read_stored(self, key: str) -> torch.Tensor:
        return self._handle(self._stored[key].file).get_tensor(key)

    def _find_experts(self) -> None:
        found: dict[str, dict[tuple[int, str], str]] = {}  # module -> (expert, matrix) -> key
        layout: ExpertLayout | None = None
        self._expert_keys = set()
        for key in self.tensors:
            if not _ANY_EXPERT_KEY.search(key):
                continue
            matched = next(((known, m) for known in EXPERT_LAYOUTS if (m := known.key.match(key))), None)
            if matched is None or (layout is not None and matched[0] is not layout):
                raise StoreError(f"{self.path}: tensor {key!r} is not in a known expert layout")
            layout, match = matched
            if len(self.tensors[key].shape) != (3 if layout.fused else 2):
                raise StoreError(
                    f"{key}: shape {list(self.tensors[key].shape)}; expected {3 if layout.fused else 2} axes"
                )
            expert = -1 if layout.fused else int(match["expert"])
            module = layout.module_name(match["module"])
            found.setdefault(module, {})[expert, match["matrix"]] = key
            self._expert_keys.add(key)
        if layout is None:
            raise StoreError(f"{self.path}: no expert weights; not a Mixture-of-Experts checkpoint in a known layout")
        self.layout = layout
        self.layer_names = sorted(found, key=natural_key)
        if layout.fused:
            self.num_experts = self.tensors[min(self._expert_keys)].shape[0]
            experts = [-1] * self.num_experts
        else:
            self.num_experts = 1 + max(expert for keys in found.values() for expert, _ in keys)
            experts = list(range(self.num_experts))
        if any(0 in self.tensors[key].shape for key in self._expert_keys):
            raise StoreError(f"{self.path}: empty expert weights")
        text_config = self.config.get("text_config") or self.config
        for name in _NUM_EXPERTS_NAMES:
            if text_config.get(name) not in (None, self.num_experts):
                raise StoreError(
                    f"{self.path}: {self.num_experts} experts, but config.json has {name} = {text_config[name]}"
                )
        self._keys = [
            [[self._expert_key(found[name], name, e, m) for m in layout.matrices] for e in experts]
            for name in self.layer_names
        ]
        num_packed = len(self._expert_keys & self.packed.keys())
        self.packed_experts = num_packed > 0
        if num_packed not in (0, len(self._expert_keys)):
            plain = min(self._expert_keys - self.packed.keys())
            raise StoreError(f"{self.path}: some experts are in NF4, {plain} is not; expected all of them, or none")
        if self.packed_experts and layout.fused:
            raise StoreError(f"{self.path}: fused experts in NF4; only per-expert ones can be imported")
        self._check_shapes()

    def _expert_key(self, keys: dict[tuple[int, str], str], module: str, expert: int, matrix: str) -> str:
        key = keys.get((expert, matrix))
        if key is None:
            which = f"{module}.{matrix}" if expert < 0 else f"expert {expert}, {matrix} of {module}"
            raise StoreError(f"{self.path}: {which} is missing")
        return key

    def _check_shapes(self) -> None:
        first = [self.tensors[key] for key in self._keys[0][0]]
        if first[0].dtype not in WEIGHT_DTYPES:
            raise StoreError(
                f"{self._keys[0][0][0]}: dtype {first[0].dtype}; expected one of {', '.join(WEIGHT_DTYPES)}"
            )
        self.hidden_size, self.intermediate_size = first[-1].shape[-2:]
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        expected = ((e, 2 * i, h), (e, h, i)) if self.layout.fused else ((i, h), (i, h), (h, i))
        self.dtype = first[0].torch_dtype
        for layer in self._keys:
            for keys in layer:
                for key, shape in zip(keys, expected):
                    info = self.tensors[key]
                    if info.shape != shape or info.dtype != first[0].dtype:
                        raise StoreError(
                            f"{key}: {info.dtype} {list(info.shape)} in {info.file}; "
                            f"expected {first[0].dtype} {list(shape)}"
                        )

    @property
    def num_layers(self) -> int:
        return len(self.layer_names)

    def is_expert_key(self, key: str) -> bool:
        return key in self._expert_keys

    def dense_keys(self) -> list[str]:
        """Every other tensor, in shard and data order."""
        return [key for key in self.tensors if key not in self._expert_keys]

    def expert_keys(self, layer: int, expert: int) -> list[str]:
        """Keys that hold this expert, in the order gate, up, down (fused: gate_up, down, shared by all experts)."""
        self._check_index(layer, expert)
        return list(self._keys[layer][expert])

    def expert(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(gate [I, H], up [I, H], down [H, I]) in the checkpoint's dtype. Reads that slice only.

        Raises StoreError naming the key for non-finite weights, IndexError for a layer or expert out of range.
        """
        return self._expert(layer, expert, self.dtype)

    def _expert(
        self, layer: int, expert: int, packed_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._check_index(layer, expert)
        keys = self._keys[layer][expert]
        if self.layout.fused:
            parts = [self._slice(key)[expert] for key in keys]
        elif self.packed_experts:
            parts = [self._decode(key, packed_dtype) for key in keys]
        else:
            parts = [self._slice(key)[:] for key in keys]
        for key, part in zip(keys, parts):
            if not bool(torch.isfinite(part).all()):
                raise StoreError(f"{self.path}: {key} has non-finite weights (expert {expert})")
        if self.layout.fused:
            gate, up = parts[0].split(self.intermediate_size)
            return gate, up, parts[1]
        return parts[0], parts[1], parts[2]

    def packed_expert(self, layer: int, expert: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes uint8 [I * H / 2] and absmax float32 [I * H / 64] of gate, up and down, where experts are packed.

        Raises as `expert`.
        """
        self._check_index(layer, expert)
        with named(self.path):
            return [self.packed[key].encoded(self._read_stored) for key in self._keys[layer][expert]]

    def _decode(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        with named(self.path):
            return self.packed[key].decode(self._read_stored, dtype)

    def read_tensor(self, key: str) -> torch.Tensor:
        return self._decode(key, self.packed[key].dtype) if key in self.packed else super().read_tensor(key)

    def tensor_bytes(self, key: str, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        if key not in self.packed:
            yield from super().tensor_bytes(key, chunk_bytes)
            return
        raw = self.read_tensor(key).reshape(-1).view(torch.uint8).numpy()
        for begin in range(0, raw.size, chunk_bytes):
            yield raw[begin : begin + chunk_bytes].tobytes()

    def _support_bytes(self, file: Path) -> bytes:
        if not self.packed or file.name != "config.json":
            return super()._support_bytes(file)
        config: dict[str, Any] = {key: value for key, value in self.config.items() if key != "quantization_config"}
        return (json.dumps(config, indent=2) + "\n").encode()

    def neurons(self, layer: int, expert: int, neurons: torch.Tensor) -> torch.Tensor:
        """Rows [n, 3, H] (gate, up, down^T) of the given neurons (int tensor [n]), in the checkpoint's dtype.

        Of packed experts in float32, as their codes decode: what the model computes with before it rounds.
        """
        if neurons.dtype not in (torch.int32, torch.int64) or neurons.dim() != 1:
            raise TypeError(f"neurons: expected a 1-dimensional int32 or int64 tensor, got {neurons.dtype}")
        if neurons.numel() and not 0 <= int(neurons.min()) <= int(neurons.max()) < self.intermediate_size:
            raise IndexError(f"neurons: expected values in [0, {self.intermediate_size})")
        gate, up, down = self._expert(layer, expert, torch.float32)
        picked = neurons.to("cpu", torch.int64)
        return torch.stack([gate[picked], up[picked], down[:, picked].T], dim=1)

    def _check_index(self, layer: int, expert: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer {layer}: expected a value in [0, {self.num_layers})")
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert}: expected a value in [0, {self.num_experts})")

    def __repr__(self) -> str:
        return (
            f"ModelSource({str(self.path)!r}, layers={self.num_layers}, experts={self.num_experts}, "
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, dtype={self.dtype})"
        )
