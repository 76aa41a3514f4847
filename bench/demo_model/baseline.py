"""Independent reference for the demo: plain torch and transformers, nothing of usaf_ext.

`full` fine-tunes ALL expert weights in fp32 with Adam; everything else is frozen. `sparse` emulates training the top
share of neurons: a neuron j of an expert is row j of gate_proj, row j of up_proj and column j of down_proj; the
neurons are chosen once, over the whole model, by the sum of squared gradients over a few batches before training. The
forward pass sees NF4 weights (blocks of 64 along hidden); Adam updates master copies of the chosen rows, which are
quantised to NF4 again after each step (straight-through gradient). Each run appends one JSON line.

Example:
    python bench/demo_model/baseline.py --method full sparse --learning-rate 1e-3 3e-3 1e-2 3e-2
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from shared import ASSETS, SEQUENCE_LENGTH, batches, evaluate, pack, token_loss
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "demo_baseline.jsonl"
BLOCK = 64
# The 16 values of the NormalFloat4 data type (Dettmers et al. 2023, QLoRA), as in bitsandbytes.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
NF4_EDGES = (NF4[1:] + NF4[:-1]) / 2


def nf4(rows: torch.Tensor) -> torch.Tensor:
    """Quantise and dequantise fp32 rows [..., hidden]: absmax scale per block of 64 along the last dimension."""
    blocks = rows.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    return (NF4[torch.bucketize(blocks / scale, NF4_EDGES)] * scale).view(rows.shape)


def neuron_rows(experts: torch.nn.Module, gradient: bool = False) -> torch.Tensor:
    """The weights (or their gradients) by neuron: [experts, neurons, 3 (gate, up, down), hidden]; a copy."""
    gate_up, down = experts.gate_up_proj, experts.down_proj  # [E, 2I, H], [E, H, I]
    gate_up, down = (gate_up.grad, down.grad) if gradient else (gate_up.detach(), down.detach())
    gate, up = gate_up.chunk(2, dim=1)
    return torch.stack([gate, up, down.transpose(1, 2)], dim=2)


def set_neuron_rows(experts: torch.nn.Module, rows: torch.Tensor) -> None:
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([rows[:, :, 0], rows[:, :, 1]], dim=1))
        experts.down_proj.copy_(rows[:, :, 2].transpose(1, 2))


class SparseNeurons:
    """Master copies of the chosen neurons, one leaf tensor [chosen, 3, hidden] per layer."""

    def __init__(self, layers: list[torch.nn.Module], importance: list[torch.Tensor], density: float) -> None:
        flat = torch.cat([scores.flatten() for scores in importance])
        threshold = flat.topk(max(1, round(density * flat.numel()))).values[-1]
        self.layers = layers
        self.chosen = [(scores >= threshold).nonzero(as_tuple=True) for scores in importance]
        self.masters: list[torch.Tensor] = []
        for experts, chosen in zip(layers, self.chosen, strict=True):
            rows = neuron_rows(experts)
            self.masters.append(rows[chosen].clone())
            set_neuron_rows(experts, nf4(rows))

    def round_masters(self, dtype: torch.dtype) -> None:
        """Keep the masters at the precision of `dtype` (Adam's own arithmetic stays fp32)."""
        for master in self.masters:
            master.data.copy_(master.data.to(dtype))

    def gather_gradients(self) -> None:
        for experts, chosen, master in zip(self.layers, self.chosen, self.masters, strict=True):
            master.grad = neuron_rows(experts, gradient=True)[chosen]

    def scatter(self) -> None:
        """Write the masters, quantised, into the model."""
        with torch.no_grad():
            for experts, (expert, neuron), master in zip(self.layers, self.chosen, self.masters, strict=True):
                rows = nf4(master)
                experts.gate_up_proj[expert, neuron] = rows[:, 0]
                experts.gate_up_proj[expert, experts.gate_up_proj.shape[1] // 2 + neuron] = rows[:, 1]
                experts.down_proj[expert, :, neuron] = rows[:, 2]


def measure_importance(
    model: torch.nn.Module, layers: list[torch.nn.Module], rows: torch.Tensor, args: argparse.Namespace
) -> list[torch.Tensor]:
    """Sum over batches of the squared gradient, summed over each neuron's three vectors: [experts, neurons] a layer."""
    scores = [torch.zeros(e.down_proj.shape[0], e.down_proj.shape[2]) for e in layers]
    stream = batches(rows, args.batch_size, args.seed + 1)
    for _ in range(args.importance_batches):
        ids = next(stream)
        token_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
        for score, experts in zip(scores, layers, strict=True):
            score += neuron_rows(experts, gradient=True).square().sum(dim=(2, 3))
        model.zero_grad(set_to_none=True)
    return scores


def schedule(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then constant or cosine to zero: factor of the learning rate."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - args.warmup_steps) / (args.steps - args.warmup_steps))


def run(method: str, learning_rate: float, args: argparse.Namespace) -> dict:
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "model")
    data = {}
    for name in ("old_heldout", "new_train", "new_heldout"):
        data[name] = pack(tokenizer, (args.assets / "text" / f"{name}.txt").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        args.assets / "model", dtype=torch.float32, experts_implementation=args.experts_implementation
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.experts." in name)
    layers = [layer.mlp.experts for layer in model.model.layers]
    result = {
        "method": method,
        "learning_rate": learning_rate,
        "steps": args.steps,
        "batch_tokens": args.batch_size * SEQUENCE_LENGTH,
        "density": args.density if method == "sparse" else 1.0,
        "loss_new_before": evaluate(model, data["new_heldout"]),
        "loss_old_before": evaluate(model, data["old_heldout"]),
    }
    if method == "sparse":
        sparse = SparseNeurons(layers, measure_importance(model, layers, data["new_train"], args), args.density)
        master_dtype = getattr(torch, args.master_dtype)
        sparse.round_masters(master_dtype)
        trained = sparse.masters
        result |= {
            "neurons": [len(chosen[0]) for chosen in sparse.chosen],
            "master_dtype": args.master_dtype,
            "loss_new_nf4": evaluate(model, data["new_heldout"]),
            "loss_old_nf4": evaluate(model, data["old_heldout"]),
        }
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.999))
    stream = batches(data["new_train"], args.batch_size, args.seed)
    curve = []
    started = time.perf_counter()
    for step in tqdm(range(args.steps), desc=f"{method} {learning_rate:g}", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, args)
        ids = next(stream)
        loss = token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()
        if method == "sparse":
            sparse.gather_gradients()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if method == "sparse":
            sparse.round_masters(master_dtype)
            sparse.scatter()
        model.zero_grad(set_to_none=True)
        curve.append(loss.item())
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["loss_new_after"] = evaluate(model, data["new_heldout"])
    result["loss_old_after"] = evaluate(model, data["old_heldout"])
    result["loss_train_last_20"] = sum(curve[-20:]) / len(curve[-20:])
    result = {key: round(value, 4) if "loss" in key else value for key, value in result.items()}
    return result | {
        "schedule": args.schedule,
        "warmup_steps": args.warmup_steps,
        "seed": args.seed,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "bench/demo_model/baseline.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with model/ and text/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON-lines file that each run is appended to")
    parser.add_argument("--method", nargs="+", choices=["full", "sparse"], default=["full", "sparse"])
    parser.add_argument("--learning-rate", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2], help="the grid")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 256 tokens per step")
    parser.add_argument("--warmup-steps", type=int, default=10, help="steps of linear warm-up")
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    parser.add_argument("--density", type=float, default=0.02, help="share of all neurons that `sparse` trains")
    parser.add_argument("--importance-batches", type=int, default=8, help="batches that the importance is summed over")
    parser.add_argument("--master-dtype", choices=["float32", "bfloat16"], default="float32", help="of `sparse`")
    parser.add_argument("--experts-implementation", default="eager", help="transformers' experts implementation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the batch order")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print("method  lr      new before -> after (change)     old before -> after   seconds")
    for method in args.method:
        for learning_rate in args.learning_rate:
            r = run(method, learning_rate, args)
            with args.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(r) + "\n")
            change = r["loss_new_after"] / r["loss_new_before"] - 1
            print(
                f"{method:7} {learning_rate:<7g} {r['loss_new_before']:.4f} -> {r['loss_new_after']:.4f} "
                f"({change:+.1%})   {r['loss_old_before']:.4f} -> {r['loss_old_after']:.4f}   {r['seconds']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
