"""Opening what a user names as a model: a checkpoint, a store or a run folder, through transformers' own loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .bitsandbytes_nf4 import is_bitsandbytes
from .checkpoint_source import ModelSource, resolve_folder
from .delta import apply_delta
from .errors import StoreError
from .integrations.transformers import UsafConfig, originals_of
from .memory import COMPUTE_DTYPES
from .run_folder import RunFolder


@dataclass
class LoadedModel:
    """A model with paged experts and what belongs to it.

    Attributes:
        model: a transformers causal language model, in evaluation mode, everything but the anchors frozen.
        tokenizer: its tokenizer.
        base: folder of the checkpoint or store.
        originals: the original checkpoint, or None when it is not at hand.
        run: the run folder whose latest delta the model carries, or None.
    """

    model: Any
    tokenizer: Any
    base: Path
    originals: ModelSource | None
    run: RunFolder | None = None


def load_model(
    path: str | Path,
    *,
    format: str | None = None,
    device_budget: int | str = "auto",
    dtype: torch.dtype | None = None,
    originals: str | Path | None = None,
    host_budget: int | str | None = None,
) -> LoadedModel:
    """Load a checkpoint (quantising its experts), a store, or a run folder (its base model with its latest delta).

    Args:
        format: of the experts; None: a store's own, the run's own, "nf4" for a checkpoint.
        device_budget: see `ExpertMemory`. dtype: compute dtype; None: the checkpoint's.
        originals: folder of the original checkpoint, where a store has moved.
        host_budget: see `UsafConfig`.

    Raises:
        StoreError, BudgetError, ValueError: as `UsafConfig` and the loader say; a run without a checkpoint.
    """
    run = delta = None
    base: str | Path = path
    if RunFolder.is_run(path):
        run = RunFolder.open(path)
        if run.base is None:
            raise StoreError(f"{path}: a run of a model that was made in memory; load that model and apply its delta")
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            raise StoreError(f"{path}: a run without a checkpoint")
        delta, base = checkpoint.delta, run.base
        format = delta.format if format is None else format
    folder = resolve_folder(base)
    model_config = AutoConfig.from_pretrained(folder)
    if is_bitsandbytes(getattr(model_config, "quantization_config", None)):
        del model_config.quantization_config  # beside it transformers would not take ours
    if dtype is None:
        dtype = model_config.dtype or torch.float32
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype} (name one)")
    config = UsafConfig(format=format, device_budget=device_budget, originals=originals, host_budget=host_budget)
    model = AutoModelForCausalLM.from_pretrained(folder, config=model_config, quantization_config=config, dtype=dtype)
    if delta is not None:
        apply_delta(model, delta, trainable=False)
    return LoadedModel(model, AutoTokenizer.from_pretrained(folder), folder, originals_of(model), run)
