"""The folder of a training run: run.json, log.jsonl, and checkpoints that are complete or not there.

run.json                      what was asked: config, base model, its fingerprint
log.jsonl                     one JSON object a line
checkpoint-000100/            delta.safetensors (what was learnt), optimizer.safetensors (moments), state.json
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .atomic import atomic_directory, atomic_file
from .delta import Delta, read_checked, read_delta, write_checked, write_delta
from .errors import StoreError

logger = logging.getLogger(__name__)

RUN_FORMAT_VERSION = 1
RUN_KIND = "usaf_run"
STATE_KIND = "usaf_training_state"
OPTIMIZER_KIND = "usaf_optimizer"
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
_OPTIMIZER_NAME = re.compile(r"(\d+)\.(\w+)")


def _write_json(path: Path, kind: str, content: dict[str, Any]) -> None:
    header = {"kind": kind, "format_version": RUN_FORMAT_VERSION, **content}
    header["sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(header, indent=1, sort_keys=True) + "\n")


def _read_json(path: Path, kind: str) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: missing, truncated or damaged ({error})") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise StoreError(f"{path}: not a {kind} file")
    version = header.get("format_version")
    if not isinstance(version, int) or version > RUN_FORMAT_VERSION:
        raise StoreError(f"{path}: format version {version}; this usaf_ext reads up to {RUN_FORMAT_VERSION}")
    expected = header.pop("sha256", None)
    if hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest() != expected:
        raise StoreError(f"{path}: damaged: its sha256 does not match")
    return header


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on.

    Attributes:
        step: optimizer steps done. delta: see usaf_ext.delta.
        optimizer: MaskedAdam.state_dict(), or None (a run without an optimizer).
        state: JSON values: data order, scheduler, and so on. tensors: small ones beside the moments.
        rng: states of torch's generators, see usaf_ext.rng.
    """

    step: int
    delta: Delta
    optimizer: dict[str, Any] | None
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]


class RunFolder:
    """A run's folder; see the module's docstring. Use `create` or `open`."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info

    @classmethod
    def create(
        cls, path: str | Path, *, config: dict[str, Any], base: str | None, fingerprint: str | None
    ) -> RunFolder:
        """Start a run in `path`, which must be absent or empty (else FileExistsError).

        config: JSON values. base: path of the store or checkpoint, None for a model made in memory.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "holds a run already: resume it, or choose another folder" if cls.is_run(path) else "is not empty"
            raise FileExistsError(f"{path} {what}")
        path.mkdir(parents=True, exist_ok=True)
        info = {"config": config, "base": base, "fingerprint": fingerprint}
        with atomic_file(path / "run.json") as temporary:
            _write_json(Path(temporary), RUN_KIND, info)
        return cls(path, info)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run. Raises StoreError when run.json is missing, foreign, newer or damaged."""
        path = Path(path)
        info = _read_json(path / "run.json", RUN_KIND)
        return cls(path, info)

    @staticmethod
    def is_run(path: str | Path) -> bool:
        return (Path(path) / "run.json").is_file()

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    @property
    def base(self) -> str | None:
        return self.info["base"]

    @property
    def fingerprint(self) -> str | None:
        return self.info["fingerprint"]

    # Checkpoints

    def checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending."""
        found = [_CHECKPOINT.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then delete the older ones: until it is complete, the previous one stays."""
        target = self.checkpoint_path(checkpoint.step)
        with atomic_directory(target) as temporary:
            folder = Path(temporary)
            write_delta(folder / "delta.safetensors", checkpoint.delta)
            tensors = {f"extra.{name}": tensor for name, tensor in checkpoint.tensors.items()}
            groups = None
            if checkpoint.optimizer is not None:
                groups = checkpoint.optimizer["param_groups"]
                for position, entry in checkpoint.optimizer["state"].items():
                    tensors |= {f"state.{position}.{name}": tensor for name, tensor in entry.items()}
            write_checked(
                folder / "optimizer.safetensors", OPTIMIZER_KIND, RUN_FORMAT_VERSION, {"param_groups": groups}, tensors
            )
            rng = {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in checkpoint.rng.items()}
            state = {"step": checkpoint.step, "rng": rng, "state": checkpoint.state}
            _write_json(folder / "state.json", STATE_KIND, state)
        for step in self.checkpoint_steps():
            if step != checkpoint.step:
                shutil.rmtree(self.checkpoint_path(step), ignore_errors=True)
        return target

    def load_checkpoint(self, step: int) -> Checkpoint:
        """Read the checkpoint of `step`. Raises StoreError when a part is missing, damaged, foreign or newer."""
        folder = self.checkpoint_path(step)
        delta = read_delta(folder / "delta.safetensors")
        if delta.fingerprint != self.fingerprint:
            raise StoreError(f"{folder}: belongs to another base model than {self.path / 'run.json'}")
        header, tensors = read_checked(folder / "optimizer.safetensors", OPTIMIZER_KIND, RUN_FORMAT_VERSION)
        content = _read_json(folder / "state.json", STATE_KIND)
        if content["step"] != step:
            raise StoreError(f"{folder}: state.json is of step {content['step']}")
        optimizer = None
        if header["param_groups"] is not None:
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                section, _, rest = name.partition(".")
                if section == "state" and (match := _OPTIMIZER_NAME.fullmatch(rest)):
                    entries.setdefault(int(match[1]), {})[match[2]] = tensor
            groups = [{**group, "betas": tuple(group["betas"])} for group in header["param_groups"]]
            optimizer = {"state": entries, "param_groups": groups}
        extra = {name.removeprefix("extra."): t for name, t in tensors.items() if name.startswith("extra.")}
        rng = {
            name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
            for name, text in content["rng"].items()
        }
        return Checkpoint(step, delta, optimizer, content["state"], extra, rng)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint; broken ones are skipped with a warning. None when there is none at all.

        Raises StoreError when there are checkpoints and every one is broken.
        """
        steps = self.checkpoint_steps()
        for step in reversed(steps):
            try:
                return self.load_checkpoint(step)
            except StoreError as error:
                logger.warning("skipping checkpoint of step %d: %s", step, error)
        if steps:
            raise StoreError(f"{self.path}: none of its checkpoints can be read (steps {steps})")
        return None

    # Log

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object as a line. Raises ValueError for a NaN or infinity, which JSON does not have."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.log_path.open("a") as file:
            file.write(line)

    def log_records(self) -> list[dict[str, Any]]:
        """All records; a last line cut off by a kill is left out."""
        if not self.log_path.exists():
            return []
        records = []
        for line in self.log_path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                logger.warning("%s: a line is not JSON and was skipped", self.log_path)
        return records

    def rewrite_log(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the records that `keep` accepts (a resumed run drops those after its checkpoint)."""
        records = [record for record in self.log_records() if keep(record)]
        with atomic_file(self.log_path) as temporary:
            Path(temporary).write_text("".join(json.dumps(record) + "\n" for record in records))
