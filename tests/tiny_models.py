"""Tiny random Mixture-of-Experts checkpoints in plain Hugging Face form, with a tokenizer, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma4TextConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

LAYOUTS = ("qwen3_moe", "mixtral", "fused")
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "gemma4")
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def tiny_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255), and <eos> (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>" if eos else None)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(layout: str = "qwen3_moe", **overrides):
    """hidden 72 (a short last block), intermediate 24, 6 experts, top-2, 2 layers, a vocabulary of 260."""
    sizes = {
        "vocab_size": 260,
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    if layout == "mixtral":
        sizes |= {"intermediate_size": 24, "num_local_experts": 6, "sliding_window": None}
        return MixtralConfig(**(sizes | overrides))
    sizes |= {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 6, "norm_topk_prob": True}
    if layout == "qwen2_moe":  # a dense first layer, and shared experts after the routed ones
        return Qwen2MoeConfig(**(sizes | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [0]} | overrides))
    if layout == "deepseek_v3":  # likewise; sigmoid router with groups
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        sizes |= {"v_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16}
        sizes |= {"n_routed_experts": sizes.pop("num_experts"), "n_group": 2, "topk_group": 1}
        return DeepseekV3Config(**(sizes | {"n_shared_experts": 1, "first_k_dense_replace": 1} | overrides))
    if layout == "gemma4":  # experts beside a dense MLP, sliding and full attention
        sizes |= {"top_k_experts": sizes.pop("num_experts_per_tok"), "enable_moe_block": True, "global_head_dim": 16}
        sizes |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 8}
        return Gemma4TextConfig(**(sizes | overrides))
    return Qwen3MoeConfig(**(sizes | overrides))


def make_checkpoint(
    folder: Path,
    layout: str = "qwen3_moe",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    **overrides,
) -> Path:
    """Write a random model into `folder`, its experts under the keys of `layout`, and return the folder."""
    torch.manual_seed(1)
    config = tiny_config(layout, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default init, so that experts matter to the logits
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    if layout == "fused":
        _fuse(folder, config)
    return folder


def _fuse(folder: Path, config) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: torch.stack([tensors.pop(f"{prefix}.{e}.{name}.weight") for e in range(config.num_experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down_proj"]
    save_file(tensors, path, metadata={"format": "pt"})


def shard_paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [folder / "model.safetensors"]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in shard_paths(folder) for key, tensor in load_file(path).items()}


def reference_experts(folder: Path, dtype: torch.dtype | None = None):
    """transformers' own view of the experts: module name -> (gate_up [E, 2I, H], down [E, H, I])."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    return {
        name: (module.gate_up_proj.detach(), module.down_proj.detach())
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and hasattr(module, "is_concatenated")
    }
