"""Make the demo assets: texts, tokenizer and a small really pre-trained Qwen3-MoE checkpoint.

The old kind of text is prose (the King James Bible, printed by Debian's `bible` program), the new kind is code (the
sources of CPython's standard library). The model is trained on the prose (without any code unless --code-share says so)
and saved in bf16 under the per-expert key names that Qwen3-MoE checkpoints have on the hub.

Example:
    python bench/demo_model/pretrain.py
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sysconfig
import time
from pathlib import Path

import torch
from safetensors import safe_open
from shared import ASSETS, SEQUENCE_LENGTH, batches, evaluate, pack, token_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig

# Parts of the standard library that are tests, tables, generated, or not imported as a library.
STDLIB_SKIP = {
    "site-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings", "turtledemo",
    "distutils", "ensurepip", "__pycache__",
}  # fmt: skip


def read_bible_chapters(program: str, data_folder: str | None) -> list[tuple[str, str]]:
    """Print the whole text with Debian's `bible`; return (heading, text) of each chapter, one verse a line."""
    command = [program, "-l10000", *(["-p", data_folder] if data_folder else []), "Ge1:1-Re22:21"]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    chapters: list[list[str]] = []
    for line in printed.splitlines():
        if verse := re.fullmatch(r" {1,3}\d+ (.+)", line):
            chapters[-1].append(verse.group(1).strip())
        elif line.strip():  # "Genesis 1"
            chapters.append([line.strip()])
    if len(chapters) != 1189:
        raise SystemExit(f"expected 1189 chapters, got {len(chapters)}")
    return [(lines[0], "\n".join(lines) + "\n") for lines in chapters]


def read_stdlib_files(stdlib: Path, limit: int) -> list[tuple[str, str]]:
    """(relative path, text) of the sources of at least 2,000 and at most `limit` bytes.

    Files that carry a copyright notice of their own are left out, so that CPython's licence alone covers the rest.
    """
    files = []
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if STDLIB_SKIP & set(relative.parts) or relative.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        raw = path.read_bytes()
        if 2_000 <= len(raw) <= limit and b"copyright" not in raw.lower() and raw.isascii():
            files.append((relative.as_posix(), raw.decode("ascii").replace("\r\n", "\n")))
    return files


def take(items: list[tuple[str, str]], size: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Take (name, text) items in order while they fit in `size` bytes (of ASCII); return (taken, left)."""
    taken, left, total = [], [], 0
    for item in items:
        fits = total + len(item[1]) <= size
        (taken if fits else left).append(item)
        total += len(item[1]) if fits else 0
    return taken, left


def shuffled(items: list, seed: int) -> list:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in order]


def split_texts(args: argparse.Namespace) -> dict[str, str]:
    """The five texts; the held-out ones share no chapter or file with the training ones."""
    chapters = shuffled(read_bible_chapters(args.bible, args.bible_data), args.seed)
    files = shuffled(read_stdlib_files(Path(args.stdlib), limit=60_000), args.seed)
    parts: dict[str, list[tuple[str, str]]] = {}
    parts["old_heldout"], parts["old_train"] = take(chapters, args.heldout_bytes)
    parts["new_heldout"], files = take(files, args.heldout_bytes)
    old_code_bytes = int(args.code_share * sum(len(text) for _, text in parts["old_train"]))
    parts["old_code"], files = take(files, old_code_bytes)
    parts["new_train"], _ = take(files, args.new_train_bytes)
    texts = {name: "\n".join(text for _, text in items) for name, items in parts.items()}
    names = {f"{name}_names": " ".join(sorted(item[0] for item in items)) for name, items in parts.items()}
    return texts | names


def write_texts(texts: dict[str, str], stdlib: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("old_heldout", "new_train", "new_heldout"):
        (folder / f"{name}.txt").write_bytes(texts[name].encode("utf-8"))
    version = platform.python_version()
    licence = next((p for p in (stdlib / "LICENSE.txt", stdlib / "LICENSE") if p.exists()), None)
    if licence is None:
        raise SystemExit(f"no LICENSE.txt in {stdlib}: the code texts must ship with it")
    (folder / "LICENSE-PSF-2.0.txt").write_bytes(licence.read_bytes())
    (folder / "SOURCES.md").write_text(
        f"""# Sources of the demo texts

All three files were written by `bench/demo_model/pretrain.py`; the splits are by whole chapter and by whole file.

## `old_heldout.txt`: prose

Chapters, drawn at random, of the King James Version of the Bible, from Debian's package `bible-kjv-text` 4.38, printed
by the program `bible` of Debian's package `bible-kjv` 4.38; verse numbers removed, one verse a line.
Licence: public domain (Debian's copyright file: "The copyright for the King James Version text of the Bible is
expired"). The rest of the same text is what the demo model was pre-trained on.

## `new_train.txt`, `new_heldout.txt`: code

Sources of the standard library of CPython {version}, concatenated with a blank line between files; otherwise unchanged.
Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. Licence: PSF-2.0, in `LICENSE-PSF-2.0.txt`.
Files with a copyright notice of their own were left out.

- `new_train.txt`: {texts["new_train_names"]}
- `new_heldout.txt`: {texts["new_heldout_names"]}

The model (`../model/`) was pre-trained on the prose and on these further files: {texts["old_code_names"] or "none"}.
""",
        encoding="utf-8",
    )


def train_tokenizer(texts: dict[str, str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on both kinds of text, the same number of bytes of each (no held-out text)."""
    size = min(len(texts["old_train"]), len(texts["new_train"]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts["old_train"][:size], texts["new_train"][:size]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def build_config(args: argparse.Namespace, vocab_size: int, eos_token_id: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=max(1, args.hidden // 64),
        head_dim=32,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.moe_intermediate,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=args.aux_coef,
        tie_word_embeddings=True,
        max_position_embeddings=SEQUENCE_LENGTH * 4,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


def pretrain(model: torch.nn.Module, rows: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW, 100 steps of warm-up, then cosine to a tenth; the schedule is laid out over `args.steps`."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    stream = batches(rows, args.batch_size, args.seed)
    model.train()
    with tqdm(total=args.steps, desc="pre-training", mininterval=5) as bar:
        for step in range(args.steps):
            progress = max(0, step - 100) / max(1, args.steps - 100)
            rate = args.learning_rate * min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = next(stream)
            output = model(input_ids=ids, use_cache=False, output_router_logits=True)
            loss = token_loss(output.logits, ids)
            (loss + args.aux_coef * output.aux_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", aux=f"{output.aux_loss.item():.2f}")
            bar.update(1)


def expert_use(model: torch.nn.Module, rows: torch.Tensor) -> list[list[float]]:
    """Share of the routed tokens that each expert gets: one list per layer."""
    shares: list[list[float]] = []

    def count(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        shares.append((output[2].flatten().bincount(minlength=module.num_experts) / output[2].numel()).tolist())

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=rows[:32], use_cache=False)
    for hook in hooks:
        hook.remove()
    return shares


def use_hub_names(model_folder: Path) -> None:
    """Name the number of experts and the tokenizer class as published Qwen3-MoE checkpoints do; check the key names."""
    for name, old, new in (
        ("config.json", '"num_local_experts"', '"num_experts"'),
        ("tokenizer_config.json", '"TokenizersBackend"', '"PreTrainedTokenizerFast"'),
    ):
        path = model_folder / name
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    weights = model_folder / "model.safetensors"
    weights.chmod(0o644)
    with safe_open(weights, "pt") as checkpoint:
        keys = set(checkpoint.keys())
    for name in ("gate.weight", *(f"experts.0.{part}_proj.weight" for part in ("gate", "up", "down"))):
        if f"model.layers.0.mlp.{name}" not in keys:
            raise SystemExit(f"{weights} lacks model.layers.0.mlp.{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bible", default="bible", help="the `bible` program of Debian's package bible-kjv")
    parser.add_argument("--bible-data", help="folder of bible.data, where it is not the program's own")
    parser.add_argument("--stdlib", default=sysconfig.get_paths()["stdlib"], help="folder of the standard library")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets model/ and text/")
    parser.add_argument("--seed", type=int, default=0, help="seed of splits, initial weights and batch order")
    parser.add_argument("--heldout-bytes", type=int, default=85_000, help="most bytes of each held-out text")
    parser.add_argument("--new-train-bytes", type=int, default=1_300_000, help="most bytes of new_train.txt")
    parser.add_argument("--code-share", type=float, default=0.0, help="bytes of code per byte of prose in pre-training")
    parser.add_argument("--vocab", type=int, default=512, help="entries of the vocabulary")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--experts", type=int, default=16, help="experts per layer")
    parser.add_argument("--top-k", type=int, default=4, help="experts per token")
    parser.add_argument("--moe-intermediate", type=int, default=80, help="neurons per expert")
    parser.add_argument("--aux-coef", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    texts = split_texts(args)
    write_texts(texts, Path(args.stdlib), args.out / "text")
    model_folder = args.out / "model"
    tokenizer = train_tokenizer(texts, args.vocab)
    tokenizer.save_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = {name: pack(tokenizer, texts[name]) for name in ("old_train", "old_heldout", "new_train", "new_heldout")}
    train_rows = torch.cat([rows["old_train"], pack(tokenizer, texts["old_code"])])

    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(build_config(args, len(tokenizer), tokenizer.eos_token_id))
    started = time.perf_counter()
    pretrain(model, train_rows, args)
    seconds = time.perf_counter() - started

    model.to(torch.bfloat16).save_pretrained(model_folder)
    use_hub_names(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    bytes_per_token = {name: len(texts[name].encode()) / rows[name].numel() for name in rows}
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_parameters": sum(p.numel() for n, p in model.named_parameters() if ".experts." in n),
        "sequences": {name: len(r) for name, r in rows.items()} | {"pre-training": len(train_rows)},
        "text_bytes": {name: len(texts[name].encode()) for name in rows},
        "seconds": round(seconds, 1),
        "steps": args.steps,
        "batch_tokens": args.batch_size * SEQUENCE_LENGTH,
        "folder_bytes": sum(p.stat().st_size for p in model_folder.iterdir()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in ("old_heldout", "new_heldout"):
        loss = evaluate(model, rows[name])
        report[f"{name}_loss"] = round(loss, 4)
        report[f"{name}_bits_per_byte"] = round(loss / math.log(2) / bytes_per_token[name], 4)
    use = expert_use(model, rows["old_heldout"])
    report["expert_share_min_max"] = [[round(min(u), 4), round(max(u), 4)] for u in use]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
