"""What the commands of `usaf-ext` do (all but `demo`). Each takes parsed arguments and returns an exit code."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _C, __version__
from .devices import describe_device, gpus, has_bfloat16, open_device, resolve_device
from .sizes import format_size

_SHOWN_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def _load(arguments: argparse.Namespace):
    from .loading import load_model

    return load_model(
        arguments.model,
        format=arguments.format,
        device_budget=arguments.device_budget,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        originals=arguments.originals,
        host_budget=arguments.host_budget,
        device=resolve_device(arguments.device, "--device"),
    )


def _gpu_ops(device_type: str) -> list[str]:
    """Ops of this build with a kernel for GPUs of this torch device type."""
    key = torch._C._dispatch_key_for_device(device_type)
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("usaf::")]
    on_gpu = [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
    return sorted(name.removeprefix("usaf::") for name in on_gpu)


def info(arguments: argparse.Namespace) -> int:
    """Backends, devices, threads and versions; with --check, a self-test of each device (exit code 1 if one fails)."""
    rows = [("usaf_ext", f"{__version__}, built for torch {_C.TORCH_VERSION}")]
    rows.append(("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"))
    for package in _SHOWN_PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    capability = torch.backends.cpu.get_cpu_capability()
    rows.append(("cpu backend", f"all ops; {torch.get_num_threads()} threads, torch uses {capability}"))
    gpu = _C.GPU_BACKEND
    found = gpus()
    ops = _gpu_ops(found[0].type if found else "cuda")  # ROCm's too: torch calls its devices so
    rows.append(("gpu backend", f"{gpu}: {', '.join(ops)}" if gpu else "not built"))
    for device in found:
        free, total = open_device(device).memory_info()
        bfloat16 = "" if has_bfloat16(device) else ", no bfloat16: float16 with loss scaling"
        memory = f"{format_size(total)}, {format_size(free)} free"
        rows.append((str(device), f"{describe_device(device)}, {memory}{bfloat16}"))
    rows.append(("formats", ", ".join(_C.FORMATS)))
    for name, value in rows:
        print(f"{name:14} {value}")
    return _self_check() if arguments.check else 0


def _self_check() -> int:
    from .self_check import run_checks

    print()
    failed = checked = 0
    for outcome in run_checks():
        print(f"{outcome.status:7}{outcome.device:14}{outcome.name:40}{outcome.detail}", flush=True)
        failed += outcome.status == "FAIL"
        checked += outcome.status != "absent"
    print(f"\n{checked} checks against the CPU's plain path, {failed} failed")
    return 1 if failed else 0


def quantize(arguments: argparse.Namespace) -> int:
    """Write a checkpoint's experts as a store, with everything else the folder needs to be opened as a model."""
    from .checkpoint_source import ModelSource
    from .store import ExpertStore

    ExpertStore.check_target(arguments.store)
    source = ModelSource.open(arguments.model)
    store = ExpertStore.quantize_to(arguments.store, source, arguments.format)
    weights = 3 * store.num_layers * store.num_experts * store.hidden_size * store.intermediate_size
    print(
        f"{arguments.store}: {store.num_layers} layers x {store.num_experts} experts in {store.format}, "
        f"{format_size(store.bytes)} ({8 * store.bytes / weights:.2f} bits a weight)"
    )
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Fine-tune chosen neurons; evaluates held-out files, if any, before and after."""
    from .data import PackedDataset
    from .experts import expert_memory
    from .train_flags import train_config
    from .training import train as run_training

    config = train_config(arguments)
    print(f"device {describe_device(resolve_device(arguments.device, '--device'))}")
    loaded = _load(arguments)
    if loaded.run is not None:
        raise ValueError(f"--model: {arguments.model} is a run; name its base model, and continue it with --resume")
    dataset = PackedDataset.from_files(arguments.data, loaded.tokenizer, config.seq_len)
    heldout = {}
    if arguments.eval_data:
        heldout["heldout"] = PackedDataset.from_files(
            arguments.eval_data, loaded.tokenizer, config.seq_len, keep_tail=True
        )
    result = run_training(
        loaded.model,
        dataset,
        config,
        arguments.out,
        eval_datasets=heldout,
        base=str(loaded.base.resolve()),
        originals=loaded.originals,
        resume=arguments.resume,
    )
    memory = expert_memory(loaded.model)
    print(
        f"{result.out_dir}: {result.steps} steps, {result.trained_parameters:,} parameters "
        f"({100 * result.density:.2f}% of the neurons), {result.tokens_per_second:.0f} tokens/s, "
        f"{format_size(memory.device_bytes)} for paging, on {result.device}"
    )
    for name, losses in result.evaluations.items():
        print(f"{name}: " + ", ".join(f"loss {loss:.4f} at step {step}" for step, loss in losses.items()))
    for layer in result.collapsed:
        print(f"MoE layer {layer.layer} is collapsed: {len(layer.dead)} dead experts, {len(layer.swamping)} swamped")
    print("plots: loss.png, expert_load.png; one line a step: log.jsonl")
    return 0


def eval(arguments: argparse.Namespace) -> int:
    """Mean next-token loss of a model on texts."""
    from .data import PackedDataset
    from .evaluation import evaluate

    loaded = _load(arguments)
    sequences = PackedDataset.from_files(arguments.data, loaded.tokenizer, arguments.seq_len, keep_tail=True)
    loss = evaluate(loaded.model, sequences, arguments.batch_size)
    where = describe_device(resolve_device(arguments.device))
    print(f"loss {loss:.6f} nats a token over {sequences.num_tokens} tokens, on {where}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a run as a plain checkpoint, compared bit by bit with what it should be."""
    from .checkpoint_folder import CheckpointFolder
    from .experts import expert_store, trained_banks
    from .export import export as write_checkpoint
    from .loading import load_model
    from .router import trained_routers

    if arguments.base == "original" and arguments.dtype is not None:
        raise ValueError("--dtype: only with --base dequantized; an original-based export keeps the checkpoint's")
    loaded = load_model(
        arguments.run, originals=arguments.originals, dtype=torch.float32, host_budget=arguments.host_budget
    )
    if loaded.run is None:
        raise ValueError(f"RUN: {arguments.run} is no run folder")
    if loaded.originals is None and arguments.base == "original":
        raise ValueError("--base original: the original checkpoint is not at hand; name it with --originals")
    report = write_checkpoint(
        arguments.out,
        source=loaded.originals or CheckpointFolder.open(loaded.base),
        store=expert_store(loaded.model),
        banks=trained_banks(loaded.model),
        router={
            f"{name}.weight": module.get_parameter("weight").detach()
            for name, module in trained_routers(loaded.model).items()
        },
        base=arguments.base,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
    )
    print(
        f"{report.path}: base {report.base}, {report.dtype}; {report.trained_weights:,} trained expert weights, "
        f"{report.untrained_weights:,} untrained, {report.dense_tensors} dense tensors, "
        f"{report.router_tensors} trained routers; read back and compared bit by bit"
    )
    if report.router_change_surviving is not None:
        print(f"share of the routers' change that survives their dtype: {100 * report.router_change_surviving:.1f}%")
    return 0
