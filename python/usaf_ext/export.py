"""Export: a plain Hugging Face checkpoint that transformers loads without usaf_ext, written whole or not at all.

base "original": the source's own bytes, but for the trained neurons (from the masters; in mode in_place decoded
codes) and the trained router. base "dequantized": what the quantised model computes with, every expert decoded.
Tensors are streamed one at a time (fused experts one expert at a time), and what was written is read back and compared
before it appears under its name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .atomic import atomic_directory
from .checkpoint_folder import INDEX_NAME, SINGLE_NAME, CheckpointFolder
from .checkpoint_source import ModelSource, checkpoint_key
from .errors import StoreError
from .safetensors_io import SAFETENSORS_DTYPES, safetensors_dtype, write_safetensors
from .store import ExpertStore

if TYPE_CHECKING:
    from .bank import RowBank

logger = logging.getLogger(__name__)

BASES = ("original", "dequantized")
DEQUANTIZED_DTYPES = (torch.float32, torch.bfloat16)
_FUSED = ("gate_up_proj", "down_proj")

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate [I, H], up [I, H], down [H, I]


@dataclass(frozen=True)
class ExportReport:
    """What was written, all of it compared bit by bit with what it should be.

    Attributes:
        path, base: the arguments.  dtype: of the expert weights.
        trained_weights: expert weights of trained neurons (3 * hidden_size each).
        untrained_weights: all other expert weights (base "original": bit for bit the source's).
        dense_tensors: tensors that are neither experts nor trained routers.
        router_tensors: trained routers.
        router_change_surviving: share of the router's learnt change that its dtype keeps, <w - o, t - o> / |t - o|^2
            over all routers, for original o, trained t and written w. None when no router changed.
    """

    path: Path
    base: str
    dtype: torch.dtype
    trained_weights: int
    untrained_weights: int
    dense_tensors: int
    router_tensors: int
    router_change_surviving: float | None


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: shape, safetensors dtype, and where it comes from."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    kind: str  # "copy", "cast", "router", or the part of the experts: "gate", "up", "down", "gate_up"
    layer: int = -1
    expert: int = -1  # -1: all experts, fused


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(_bits(tensor.detach().cpu()).reshape(-1).numpy())  # type: ignore[arg-type]


class _Export:
    """The plan of one export, and the weights it writes."""

    def __init__(
        self,
        source: CheckpointFolder,
        store: ExpertStore,
        banks: Sequence[RowBank],
        router: Mapping[str, torch.Tensor],
        base: str,
        dtype: torch.dtype | None,
    ):
        self.source, self.store, self.base = source, store, base
        self.from_source = base == "original"
        if base not in BASES:
            raise ValueError(f"base: expected one of {BASES}, got {base!r}")
        if isinstance(source, ModelSource):
            if source.fingerprint != store.fingerprint:
                raise StoreError(f"{source.path}: not the checkpoint that the store was quantised from")
        elif self.from_source:
            raise ValueError("source: base 'original' needs the original checkpoint (a ModelSource)")
        if self.from_source:
            assert isinstance(source, ModelSource)
            if dtype not in (None, source.dtype):
                raise ValueError(f"dtype: base 'original' keeps the checkpoint's {source.dtype}, got {dtype}")
            self.dtype = source.dtype
        else:
            self.dtype = torch.float32 if dtype is None else dtype
            if self.dtype not in DEQUANTIZED_DTYPES:
                raise ValueError(f"dtype: expected one of {DEQUANTIZED_DTYPES}, got {dtype}")
        self._take_banks(banks)
        self._take_router(router)
        self._cached: tuple[tuple[int, int], Expert] | None = None

    def _take_banks(self, banks: Sequence[RowBank]) -> None:
        # (layer, expert) -> the neurons' indices in the expert, their bank, and where they stand in it
        self.neurons: dict[tuple[int, int], list[tuple[torch.Tensor, RowBank, torch.Tensor]]] = {}
        for bank in banks:
            if not 0 <= bank.layer < self.store.num_layers:
                raise ValueError(f"banks: layer {bank.layer} is out of range")
            if bank.format != self.store.format:
                raise ValueError(f"banks: layer {bank.layer} is in {bank.format}, the store in {self.store.format}")
            rows = self._trained(bank, slice(None))
            if rows.shape[1:] != (3, self.store.hidden_size):
                raise ValueError(
                    f"banks: layer {bank.layer} has rows {tuple(rows.shape)}; expected [n, 3, {self.store.hidden_size}]"
                )
            if not bool(torch.isfinite(rows).all()):
                raise StoreError(f"banks: layer {bank.layer} has trained weights that are not finite in {self.dtype}")
            experts, indices = (index.to("cpu", torch.int64) for index in (bank.neuron_expert, bank.neuron_index))
            for expert in experts.unique().tolist():
                where = (experts == expert).nonzero()[:, 0]
                self.neurons.setdefault((bank.layer, expert), []).append((indices[where], bank, where))
        for (layer, _expert), found in self.neurons.items():
            index = torch.cat([index for index, _, _ in found])
            if len(index.unique()) != len(index):
                raise ValueError(f"banks: a neuron of layer {layer} is given twice")

    def _trained_of(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of an expert's trained neurons, int64 [n], and their rows [n, 3, H] in the export's dtype."""
        found = self.neurons[layer, expert]
        index = torch.cat([index for index, _, _ in found])
        return index, torch.cat([self._trained(bank, where) for _, bank, where in found])

    def _trained(self, bank: RowBank, where: torch.Tensor | slice) -> torch.Tensor:
        """Trained rows [n, 3, H] in the export's dtype."""
        rows = bank.trained_rows(torch.float32) if self.from_source else bank.decode(torch.float32)
        return rows[where].detach().cpu().to(self.dtype)

    def _take_router(self, router: Mapping[str, torch.Tensor]) -> None:
        self.router: dict[str, torch.Tensor] = {}
        kept = changed = 0.0
        for name, weight in router.items():
            key = checkpoint_key(self.source, name)
            info = self.source.tensors[key]
            if tuple(weight.shape) != info.shape or weight.dtype != torch.float32:
                raise ValueError(
                    f"router: {name} is {weight.dtype} {tuple(weight.shape)}; expected float32 {info.shape}"
                )
            if not bool(torch.isfinite(weight).all()):
                raise StoreError(f"router: {name} has weights that are not finite")
            trained = weight.detach().cpu()
            written = trained.to(info.torch_dtype) if self.from_source else trained
            self.router[key] = written
            original = self.source.read_tensor(key).double()
            change = trained.double() - original
            changed += float(change.square().sum())
            kept += float(((written.double() - original) * change).sum())
        self.router_change_surviving = kept / changed if changed else None

    # --- the plan ---------------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, list[_Entry]]:
        """File name -> its tensors in order. The source's own shards; without a ModelSource, a fused file per layer."""
        if isinstance(self.source, ModelSource):
            places = self._expert_places(self.source)
            return {
                name: [places[key] if key in places else self._dense_entry(key) for key in keys]
                for name, keys in self.source.shards.items()
            }
        files = [[self._dense_entry(key) for key in keys] for keys in self.source.shards.values()]
        dtype, e = safetensors_dtype(self.dtype), self.store.num_experts
        h, i = self.store.hidden_size, self.store.intermediate_size
        for layer, name in enumerate(self.store.layer_names):
            gate_up = _Entry(f"{name}.{_FUSED[0]}", dtype, (e, 2 * i, h), "gate_up", layer)
            files.append([gate_up, _Entry(f"{name}.{_FUSED[1]}", dtype, (e, h, i), "down", layer)])
        return {f"model-{n:05d}-of-{len(files):05d}.safetensors": entries for n, entries in enumerate(files, start=1)}

    def _expert_places(self, source: ModelSource) -> dict[str, _Entry]:
        dtype = safetensors_dtype(self.dtype)
        kinds = ("gate_up", "down") if source.layout.fused else ("gate", "up", "down")
        places = {}
        for layer in range(source.num_layers):
            for expert in range(1 if source.layout.fused else source.num_experts):
                number = -1 if source.layout.fused else expert
                for key, kind in zip(source.expert_keys(layer, expert), kinds):
                    places[key] = _Entry(key, dtype, source.tensors[key].shape, kind, layer, number)
        return places

    def _dense_entry(self, key: str) -> _Entry:
        info = self.source.tensors[key]
        if key in self.router:
            return _Entry(key, safetensors_dtype(self.router[key].dtype), info.shape, "router")
        if self.from_source or not info.torch_dtype.is_floating_point or info.torch_dtype == self.dtype:
            return _Entry(key, info.dtype, info.shape, "copy")
        return _Entry(key, safetensors_dtype(self.dtype), info.shape, "cast")

    # --- the weights ------------------------------------------------------------------------------------------------

    def base_expert(self, layer: int, expert: int) -> Expert:
        """The untrained expert, in the export's dtype."""
        if self.from_source:
            assert isinstance(self.source, ModelSource)
            return self.source.expert(layer, expert)
        return self.store.read_expert(layer, expert, self.dtype)

    def expert(self, layer: int, expert: int) -> Expert:
        """The expert with its trained neurons."""
        if self._cached is not None and self._cached[0] == (layer, expert):
            return self._cached[1]
        weights = self.base_expert(layer, expert)
        if (layer, expert) in self.neurons:
            index, rows = self._trained_of(layer, expert)
            gate, up, down = (weight.clone() for weight in weights)
            gate[index], up[index], down[:, index] = rows[:, 0], rows[:, 1], rows[:, 2].T
            weights = gate, up, down
        self._cached = (layer, expert), weights
        return weights

    def chunks(self, entry: _Entry) -> Iterator[bytes | memoryview]:
        if entry.kind == "copy":
            yield from self.source.tensor_bytes(entry.key)
        elif entry.kind == "cast":
            yield _raw(self.source.read_tensor(entry.key).to(self.dtype))
        elif entry.kind == "router":
            yield _raw(self.router[entry.key])
        else:
            experts = range(self.store.num_experts) if entry.expert < 0 else (entry.expert,)
            parts = {"gate": (0,), "up": (1,), "down": (2,), "gate_up": (0, 1)}[entry.kind]
            for expert in experts:
                weights = self.expert(entry.layer, expert)
                for part in parts:
                    yield _raw(weights[part])

    # --- reading back -----------------------------------------------------------------------------------------------

    def verify(self, folder: Path, plan: dict[str, list[_Entry]]) -> tuple[int, int]:
        """Compare every bit that was written; returns the numbers of trained and untrained expert weights.

        Raises StoreError naming the first tensor that differs.
        """
        written = ModelSource.open(folder)
        entries = {entry.key: (name, entry) for name, found in plan.items() for entry in found}
        if set(written.tensors) != set(entries):
            raise StoreError(f"{folder}: read back {len(written.tensors)} tensors, wrote {len(entries)}")
        for key, (name, entry) in entries.items():
            info = written.tensors[key]
            if (info.file, info.dtype, info.shape) != (name, entry.dtype, entry.shape):
                raise StoreError(f"{key}: read back as {info.dtype} {info.shape} in {info.file}")
            if entry.kind == "copy":
                pieces = zip(written.tensor_bytes(key), self.source.tensor_bytes(key), strict=True)
                same = all(read == meant for read, meant in pieces)
            elif entry.kind in ("cast", "router"):
                meant = (
                    self.router[key] if entry.kind == "router" else self.source.read_tensor(key).to(info.torch_dtype)
                )
                same = torch.equal(_bits(written.read_tensor(key)), _bits(meant))
            else:
                continue  # experts: below
            if not same:
                raise StoreError(f"{key}: read back other bits than were meant")
        trained = untrained = 0
        for layer in range(self.store.num_layers):
            for expert in range(self.store.num_experts):
                untrained += self._verify_expert(written, layer, expert)
                trained += 3 * self.store.hidden_size * sum(len(n) for n, _, _ in self.neurons.get((layer, expert), []))
        written.close()
        return trained, untrained

    def _verify_expert(self, written: ModelSource, layer: int, expert: int) -> int:
        untouched = torch.ones(self.store.intermediate_size, dtype=torch.bool)
        if (layer, expert) in self.neurons:
            index, rows = self._trained_of(layer, expert)
            untouched[index] = False
            if not torch.equal(_bits(written.neurons(layer, expert, index)), _bits(rows)):
                raise StoreError(f"{self.store.layer_names[layer]}, expert {expert}: a trained weight differs")
        found, base = written.expert(layer, expert), self.base_expert(layer, expert)
        for read, meant in zip((found[0], found[1], found[2].T), (base[0], base[1], base[2].T)):
            if not torch.equal(_bits(read[untouched]), _bits(meant[untouched])):
                raise StoreError(f"{self.store.layer_names[layer]}, expert {expert}: an untrained weight differs")
        return 3 * self.store.hidden_size * int(untouched.sum())


def export(
    out: str | Path,
    *,
    source: CheckpointFolder,
    store: ExpertStore,
    banks: Sequence[RowBank],
    router: Mapping[str, torch.Tensor],
    base: str = "original",
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """Write a plain Hugging Face checkpoint to the folder `out`, verify it, and say what was written.

    Args:
        out: a folder that does not exist yet, or is empty.
        source: the original checkpoint (`ModelSource`). For base "dequantized" without one, the store's folder
            (`CheckpointFolder`): experts then go under transformers' own fused names.
        store: the store that `source` was quantised into.
        banks: what was trained (`trained_banks`), no neuron twice; rows that re-selection froze are as good as others.
        router: float32 [num_experts, hidden_size] by parameter name or checkpoint key; what is missing stays.
        base: "original" or "dequantized".
        dtype: of a dequantized export, float32 (default) or bfloat16; a trained router stays float32. An original-based
            one keeps the checkpoint's.

    Raises:
        ValueError: a wrong base, dtype, bank or router.
        FileExistsError: `out` is a file or not empty.
        StoreError: source and store do not belong together, weights are not finite, or what was read back differs.
            Nothing is left behind.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists already; remove it or choose another folder")
    job = _Export(source, store, banks, router, base, dtype)
    plan = job.plan()
    with atomic_directory(target) as folder:
        source.copy_support_files(folder)
        if not job.from_source:
            _set_dtype(folder / "config.json", job.dtype)
        for name, entries in plan.items():
            tensors = {entry.key: (entry.dtype, entry.shape) for entry in entries}
            chunks = (chunk for entry in entries for chunk in job.chunks(entry))
            with (folder / name).open("wb") as shard:
                write_safetensors(shard, tensors, chunks, source.shard_metadata.get(name) or {"format": "pt"})
        if list(plan) != [SINGLE_NAME]:
            _write_index(folder / INDEX_NAME, plan)
        trained, untrained = job.verify(folder, plan)
    kinds = [entry.kind for entries in plan.values() for entry in entries]
    report = ExportReport(
        path=target,
        base=base,
        dtype=job.dtype,
        trained_weights=trained,
        untrained_weights=untrained,
        dense_tensors=kinds.count("copy") + kinds.count("cast"),
        router_tensors=kinds.count("router"),
        router_change_surviving=job.router_change_surviving,
    )
    logger.info("exported %s: %s", target, report)
    return report


def _write_index(path: Path, plan: dict[str, list[_Entry]]) -> None:
    entries = [entry for found in plan.values() for entry in found]
    total = sum(torch.Size(entry.shape).numel() * SAFETENSORS_DTYPES[entry.dtype][1] for entry in entries)
    weight_map = {entry.key: name for name, found in plan.items() for entry in found}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make transformers' dtype="auto" load what was written: old and new spelling, and nested configs."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for spelling in ("dtype", "torch_dtype"):
            if spelling in part:
                part[spelling] = name
    if "torch_dtype" not in config:
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
