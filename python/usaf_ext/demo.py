"""`usaf-ext demo`: fine-tune the shipped checkpoint under a small device budget, and prove what came out."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import __version__
from .checkpoint_source import ModelSource
from .data import PackedDataset
from .devices import check_compute_dtype, describe_device, resolve_device
from .errors import UsafError
from .evaluation import evaluate
from .experts import expert_memory, paged_layers, trained_banks
from .export import export
from .loading import LoadedModel, load_model
from .router import trained_routers
from .sizes import format_size
from .store import ExpertStore
from .train_config import TrainConfig
from .training import TrainResult, train

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "demo_assets"
MODEL = ASSETS / "model"
SEQ_LEN = 256
EVAL_BATCH = 8
# The learning rate is the best for the new text on the grid of bench/results/demo_rates.jsonl.
CONFIG = TrainConfig(
    steps=200,
    batch_size=8,
    seq_len=SEQ_LEN,
    learning_rate=1e-2,
    router_learning_rate=1e-3,
    density=0.02,
    importance_batches=8,
    lr_schedule="constant",
    lr_warmup_steps=10,
    evaluate_every=50,
    seed=0,
)
REPORT = "report.json"


def texts(tokenizer) -> dict[str, PackedDataset]:
    """The shipped texts, packed: `train` (new kind), and the held-out `new` and `old`."""
    folder = ASSETS / "text"
    return {
        "train": PackedDataset.from_files([folder / "new_train.txt"], tokenizer, SEQ_LEN),
        "new": PackedDataset.from_files([folder / "new_heldout.txt"], tokenizer, SEQ_LEN, keep_tail=True),
        "old": PackedDataset.from_files([folder / "old_heldout.txt"], tokenizer, SEQ_LEN, keep_tail=True),
    }


def expert_payload_bytes(store: ExpertStore) -> int:
    """Bytes of all experts' codes and scales, without the rounding of pages."""
    return store.num_layers * store.num_experts * store.layout.payload_bytes


def run_once(
    store: Path,
    budget: int,
    dtype: torch.dtype,
    config: TrainConfig,
    data: dict[str, PackedDataset],
    out: Path,
    device: torch.device,
) -> tuple[LoadedModel, TrainResult]:
    """Load the store onto `device` and train with `config` into the run folder `out`, evaluating the held-out texts."""
    loaded = load_model(store, device_budget=budget, dtype=dtype, originals=MODEL, device=device)
    heldout = {name: data[name] for name in ("new", "old")}
    result = train(
        loaded.model, data["train"], config, out, eval_datasets=heldout, base=str(store), originals=loaded.originals
    )
    return loaded, result


def _plain_loss(folder: Path, dtype: torch.dtype, sequences: PackedDataset, device: torch.device) -> float:
    """Loss of a checkpoint in plain transformers, none of our code in its way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    return evaluate(model, sequences, EVAL_BATCH)


def _untrained_bit_identical(source: ModelSource, exported: ModelSource, layers, routers: set[str]) -> bool:
    """Every element that was not trained has the bits of the original: compared here, not by the exporter."""
    for key in source.dense_keys():
        if key not in routers and not torch.equal(_bits(source.read_tensor(key)), _bits(exported.read_tensor(key))):
            return False
    for layer in layers:
        bank = layer.bank
        for expert in range(layer.num_experts):
            mine = bank.neuron_index[bank.neuron_expert == expert].long().cpu() if bank is not None else []
            keep = torch.ones(layer.intermediate_size, dtype=torch.bool)
            keep[mine] = False
            gate, up, down = zip(source.expert(layer.index, expert), exported.expert(layer.index, expert))
            for before, after in ((gate[0], gate[1]), (up[0], up[1]), (down[0].T, down[1].T)):
                if not torch.equal(_bits(before[keep]), _bits(after[keep])):
                    return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def demo(arguments: argparse.Namespace) -> int:
    """Quantise, fine-tune at most 2% of the expert neurons under a quarter of the expert bytes, export, verify."""
    started = time.perf_counter()
    device = resolve_device(arguments.device, "--device")
    dtype = getattr(torch, arguments.dtype)
    check_compute_dtype(dtype, device, "--dtype")
    out = Path(arguments.out)
    if out.exists():
        if not (out / REPORT).is_file() and any(out.iterdir()):
            raise FileExistsError(f"--out: {out} is not empty and holds no demo; choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    config = replace(CONFIG, router=arguments.router)

    source = ModelSource.open(MODEL)
    store = ExpertStore.quantize(source, "nf4")
    store.save(out / "store", source)
    pages, expert_bytes = store.num_layers * store.num_experts, expert_payload_bytes(store)
    del store
    budget = expert_bytes // 4
    data = texts(AutoTokenizer.from_pretrained(MODEL))
    print(f"store {out / 'store'}: {pages} experts, {format_size(expert_bytes)} in NF4; device budget {budget} bytes")
    print(f"device {describe_device(device)}")

    print("control run: everything runs, nothing is updated")
    _, control = run_once(out / "store", budget, dtype, replace(config, optimizer=None), data, out / "control", device)
    shutil.rmtree(out / "control")
    gc.collect()
    print("main run")
    loaded, result = run_once(out / "store", budget, dtype, config, data, out / "run", device)
    memory, layers = expert_memory(loaded.model), paged_layers(loaded.model)

    print("exports, each loaded in plain transformers")
    routers = {
        f"{name}.weight": router.get_parameter("weight").detach()
        for name, router in trained_routers(loaded.model).items()
    }
    exported = {}
    for base in ("original", "dequantized"):
        folder = out / f"export-{base}"
        export(
            folder,
            source=source,
            store=ExpertStore.open(out / "store"),
            banks=trained_banks(loaded.model),
            router=routers,
            base=base,
            dtype=dtype if base == "dequantized" else None,
        )
        exported[base] = _plain_loss(folder, dtype, data["new"], device)

    new, old = result.evaluations["new"], result.evaluations["old"]
    stats = memory.stats()
    report = {
        "loss_new_before": new[0],
        "loss_new_after": new[config.steps],
        "loss_old_before": old[0],
        "loss_old_after": old[config.steps],
        "loss_new_control": control.evaluations["new"][config.steps],
        "trained_parameters": result.trained_parameters,
        "density": result.density,
        "device_budget_bytes": budget,
        "device_peak_bytes": memory.device_bytes,
        "page_hits": stats["page_hits"],
        "page_misses": stats["page_misses"],
        "bytes_in": stats["bytes_in"],
        "stall_seconds": stats["stall_seconds"],
        "tokens_per_second": result.tokens_per_second,
        "load_entropy": result.load_entropy,
        "router_trained": bool(routers),
        "quantisation_gap": new[0] - _plain_loss(MODEL, dtype, data["new"], device),
        "loss_new_export_original": exported["original"],
        "loss_new_export_dequantized": exported["dequantized"],
        "untrained_bit_identical": _untrained_bit_identical(
            source, ModelSource.open(out / "export-original"), layers, set(routers)
        ),
    }
    report["seconds"] = time.perf_counter() - started
    report |= _environment(arguments, device)
    for plot in ("loss.png", "expert_load.png"):
        shutil.copyfile(out / "run" / plot, out / plot)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _print_table(report, config, expert_bytes)
    _check(report, dtype)
    print(f"\nwritten: {out / REPORT}, {out / 'loss.png'}, {out / 'expert_load.png'}; the run: {out / 'run'}")
    return 0


def _environment(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures were seen on."""
    return {
        "command": f"usaf-ext demo --router {arguments.router} --dtype {arguments.dtype} --device {arguments.device}",
        "device": describe_device(device),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"usaf_ext": __version__},
        "date": datetime.date.today().isoformat(),
    }


def _print_table(report: dict[str, Any], config: TrainConfig, expert_bytes: int) -> None:
    def change(before: float, after: float) -> str:
        return f"{after - before:+.4f} ({100 * (after - before) / before:+.1f}%)"

    new_before, new_after = report["loss_new_before"], report["loss_new_after"]
    rows = [
        ("new text, held out: before, after", f"{new_before:.4f} -> {new_after:.4f}  {change(new_before, new_after)}"),
        (
            "old text, held out: before, after",
            f"{report['loss_old_before']:.4f} -> {report['loss_old_after']:.4f}  "
            f"{change(report['loss_old_before'], report['loss_old_after'])}",
        ),
        ("new text, control (nothing updated)", f"{report['loss_new_control']:.4f}"),
        ("NF4 instead of the original experts", f"{report['quantisation_gap']:+.4f} on the new text, before"),
        ("export, original base (plain transformers)", f"{report['loss_new_export_original']:.4f}"),
        ("export, dequantized base (plain transformers)", f"{report['loss_new_export_dequantized']:.6f}"),
        ("untrained weights bit-identical", str(report["untrained_bit_identical"])),
        ("trained", f"{report['trained_parameters']:,} parameters, {100 * report['density']:.2f}% of the neurons"),
        ("router", config.router),
        (
            "device: budget, peak, of expert bytes",
            f"{report['device_budget_bytes']:,}, {report['device_peak_bytes']:,}, "
            f"{100 * report['device_peak_bytes'] / expert_bytes:.1f}%",
        ),
        (
            "pages: hits, misses, bytes in, stall",
            f"{report['page_hits']:,}, {report['page_misses']:,}, {format_size(report['bytes_in'])}, "
            f"{report['stall_seconds']:.2f} s",
        ),
        ("load entropy per layer (1 = even)", ", ".join(f"{value:.3f}" for value in report["load_entropy"])),
        ("device", report["device"]),
        ("training speed", f"{report['tokens_per_second']:.0f} tokens/s"),
        ("whole demo", f"{report['seconds']:.0f} s"),
    ]
    print()
    for name, value in rows:
        print(f"{name:46} {value}")


def _check(report: dict[str, Any], dtype: torch.dtype) -> None:
    """What must hold on any machine. Raises UsafError naming what does not."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-3
    # A router that is to be trained computes in fp32, also in the control: in a bf16 model that alone moves the loss.
    control_tolerance = tolerance if report["router_trained"] and dtype != torch.float32 else 0.0
    failed = [
        name
        for name, holds in {
            "the control changed the loss": abs(report["loss_new_control"] - report["loss_new_before"])
            <= control_tolerance,
            "the new text's loss did not fall": report["loss_new_after"] < report["loss_new_before"],
            "an untrained weight changed": report["untrained_bit_identical"],
            "the device budget was exceeded": report["device_peak_bytes"] <= report["device_budget_bytes"],
            "no page was swapped": report["page_misses"] > 0,
            "the dequantized export differs from the live model": abs(
                report["loss_new_export_dequantized"] - report["loss_new_after"]
            )
            <= tolerance,
        }.items()
        if not holds
    ]
    if failed:
        raise UsafError(f"the demo failed: {'; '.join(failed)}")
