"""Opening what a user names as a model: a checkpoint, a store or a run folder, through transformers' own loader."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .bitsandbytes_nf4 import is_bitsandbytes
from .checkpoint_source import ModelSource, resolve_folder
from .delta import apply_delta
from .devices import check_compute_dtype, describe_device, has_bfloat16, resolve_device
from .errors import StoreError
from .integrations.transformers import UsafConfig, originals_of
from .memory import COMPUTE_DTYPES
from .run_folder import RunFolder

logger = logging.getLogger(__name__)


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
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a checkpoint (quantising its experts), a store, or a run folder (its base model with its latest delta).

    Args:
        format: of the experts; None: a store's own, the run's own, "nf4" for a checkpoint.
        device_budget: see `ExpertMemory`.
        dtype: compute dtype; None: the checkpoint's, but float16 for bfloat16 where the device has none.
        originals: folder of the original checkpoint, where a store has moved.
        host_budget: see `UsafConfig`.
        device: for the whole model; "auto": a GPU if there is one.

    Raises:
        StoreError, BudgetError, ValueError: as `UsafConfig` and the loader say; a run without a checkpoint.
    """
    place = resolve_device(device)
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
        if dtype == torch.bfloat16 and not has_bfloat16(place):
            logger.warning("%s has no bfloat16: computing in float16, with loss scaling", describe_device(place))
            dtype = torch.float16
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype} (name one)")
    check_compute_dtype(dtype, place)
    config = UsafConfig(format, device_budget, originals, host_budget, place)
    model = AutoModelForCausalLM.from_pretrained(folder, config=model_config, quantization_config=config, dtype=dtype)
    if delta is not None:
        apply_delta(model, delta, trainable=False)
    return LoadedModel(model, AutoTokenizer.from_pretrained(folder), folder, originals_of(model), run)
