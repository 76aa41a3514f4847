"""Tiny checkpoints whose linear layers bitsandbytes quantised to NF4, as transformers 4 saved them."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, shard_paths

HIDDEN, INTERMEDIATE, EXPERTS = 128, 64, 4
STATE = "quant_state.bitsandbytes__nf4"


def quantization_config(double: bool) -> dict:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["lm_head"],
    }


def quantise(folder: Path, *, double: bool, storage=torch.uint8, wanted=lambda key: True, **options) -> dict:
    """Quantise a plain checkpoint's linear weights in place; key -> (codes, bnb.QuantState)."""
    packed = {}
    for path in shard_paths(folder):
        tensors = {}
        for key, weight in load_file(path).items():
            linear = key.endswith(".weight") and weight.dim() == 2 and "embed" not in key and "lm_head" not in key
            if not linear or not wanted(key):
                tensors[key] = weight
                continue
            settings = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": double, "quant_storage": storage}
            codes, state = bnb.quantize_4bit(weight, **(settings | options))
            packed[key] = codes, state
            tensors[key] = codes
            tensors |= {f"{key}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = {key: path.name for path in shard_paths(folder) for key in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config(double)}))
    return packed


def make_bnb_checkpoint(folder: Path, *, double=True, dtype=torch.bfloat16, layout="qwen3_moe", sizes=None, **options):
    """(folder, what `quantise` returns) of a random model with hidden 128, intermediate 64 and 4 experts."""
    sizes = sizes or {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
    shard = options.pop("max_shard_size", "5GB")
    make_checkpoint(folder, layout, dtype=dtype, max_shard_size=shard, **sizes)
    return folder, quantise(folder, double=double, **options)


def scales(state: bnb.QuantState) -> torch.Tensor:
    """The fp32 scales that bitsandbytes decodes with."""
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def decoded(codes: torch.Tensor, state: bnb.QuantState, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A packed weight's values in `dtype`; where bitsandbytes gets them right, they are also its own.

    Its CPU kernel (0.50.2) decodes wrongly where a row is not a multiple of a block.
    """
    flat = codes.view(torch.uint8).flatten().long()
    values = state.code[torch.stack([flat >> 4, flat & 15], dim=1).flatten()][: state.shape.numel()]
    values = values * scales(state).repeat_interleave(state.blocksize)[: len(values)]
    values = values.to(dtype).view(state.shape)
    if state.shape[-1] % state.blocksize == 0:
        own, state.dtype = state.dtype, dtype
        assert torch.equal(bnb.dequantize_4bit(codes, state), values)
        state.dtype = own
    return values


def dequantised(packed: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Key -> values in `dtype`."""
    return {key: decoded(codes, state, dtype) for key, (codes, state) in packed.items()}


def bnb_expert(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, scale: float = 0.1):
    """A random expert: (codes, scales) of gate, up and down, and their values in fp32."""
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    packed = [bnb.quantize_4bit(torch.randn(shape) * scale, blocksize=64, quant_type="nf4") for shape in shapes]
    return [(codes, state.absmax) for codes, state in packed], [decoded(codes, state) for codes, state in packed]
