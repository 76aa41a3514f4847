"""`usaf-ext info --check`: every op and the pager on every device present, against the CPU's plain path.

The plain path is what the tests compare with a float64 oracle; here it is the reference for the vectorised CPU kernels
and for each GPU. Codec and masked Adam must give its bits; ops that sum in another order must agree to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _C, ops
from .bank import RowBank
from .devices import CPU, gpus
from .experts import PagedExperts

Outputs = list[Tensor]

PLAIN = "plain"
# Sums of up to a few hundred products in fp32, results in bf16 at most: two of its steps, of the largest value.
TOLERANCE = 2**-7
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K, NUM_TOKENS = 200, 72, 9, 3, 53  # tails in every direction


@dataclass(frozen=True)
class Check:
    """One op: run(device) computes on that device from inputs that do not depend on it; exact: bits must be equal."""

    name: str
    run: Callable[[torch.device], Outputs]
    exact: bool


@dataclass(frozen=True)
class Outcome:
    """status: "pass", "FAIL", or "absent" (this build has no such kernel for the device)."""

    device: str
    name: str
    status: str
    detail: str
    seconds: float


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _codec(format: str, device: torch.device) -> Outputs:
    weight = _random(INTERMEDIATE_SIZE, HIDDEN_SIZE, scale=0.02).to(device)
    codes, absmax = ops.quantize_blocks(weight, format)
    rows = torch.tensor([5, 0, 17], device=device)
    ops.quantize_rows_(codes, absmax, rows, _random(3, HIDDEN_SIZE, seed=1).to(device), format)
    decoded = [
        ops.dequantize_blocks(codes, absmax, HIDDEN_SIZE, format, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    return [codes, absmax, *decoded]


def _adam(mode: str, format: str, moments: str, stochastic: bool, device: torch.device) -> Outputs:
    weight = _random(NUM_EXPERTS, HIDDEN_SIZE, scale=0.02)
    codes, absmax = ops.quantize_blocks(weight, format)
    state: dict[str, Tensor] = {}
    if mode == "master":
        state["master"] = weight.bfloat16()
    if mode == "residual":
        state["residual"] = torch.zeros(weight.shape, dtype=torch.int8)
    if moments == "8bit":
        exp_avg, state["exp_avg_absmax"] = ops.empty_moments8(weight.shape)
        exp_avg_sq, state["exp_avg_sq_absmax"] = ops.empty_moments8(weight.shape)
    else:
        exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    step = torch.zeros(len(weight), dtype=torch.int32)
    codes, absmax, exp_avg, exp_avg_sq, step = (t.to(device) for t in (codes, absmax, exp_avg, exp_avg_sq, step))
    state = {name: tensor.to(device) for name, tensor in state.items()}
    for seed in (2, 3):
        grad = _random(*weight.shape, seed=seed, scale=1e-3).to(device)
        options: dict[str, Any] = {"format": format, "mode": mode, "stochastic": stochastic, **HYPER, **state}
        ops.masked_adam_(codes, absmax, exp_avg, exp_avg_sq, step, grad, **options)
    return [codes, absmax, exp_avg, exp_avg_sq, step, *state.values()]


def _routing() -> tuple[Tensor, Tensor]:
    """index [tokens, k], one expert without tokens; weights [tokens, k]."""
    scores = _random(NUM_TOKENS, NUM_EXPERTS, seed=4)
    scores[:, 4] = -9.0
    weights, index = scores.softmax(-1).topk(TOP_K)
    return index, weights


def _gather_and_scatter(device: torch.device) -> Outputs:
    index, weights = (t.to(device) for t in _routing())
    x = _random(NUM_TOKENS, HIDDEN_SIZE, seed=5).to(device).requires_grad_()
    weights.requires_grad_()
    permuted, offsets, inverse = ops.expert_gather(x, index, NUM_EXPERTS)
    out = ops.expert_scatter(permuted, inverse, weights)
    out.backward(_random(*out.shape, seed=6).to(device))
    assert x.grad is not None
    assert weights.grad is not None
    return [permuted.detach(), offsets, inverse, out.detach(), x.grad, weights.grad]


def _glu(activation: str, device: torch.device) -> Outputs:
    gate_up = _random(NUM_TOKENS, 2 * INTERMEDIATE_SIZE, seed=7).to(device)
    grad_h = _random(NUM_TOKENS, INTERMEDIATE_SIZE, seed=8).to(device)
    row_weight = torch.rand(NUM_TOKENS, generator=torch.Generator().manual_seed(9)).to(device)
    h = ops.glu(gate_up, activation)
    return [h, *ops.glu_backward(grad_h, gate_up, activation, row_weight)]


def _row_gradients(device: torch.device) -> Outputs:
    index, _ = _routing()
    x, offsets, _ = ops.expert_gather(_random(NUM_TOKENS, HIDDEN_SIZE, seed=5), index, NUM_EXPERTS)
    grad_out, grad_gate_up = _random(len(x), HIDDEN_SIZE, seed=10), _random(len(x), 2 * INTERMEDIATE_SIZE, seed=11)
    weighted_h = _random(len(x), INTERMEDIATE_SIZE, seed=12)
    x, grad_out, grad_gate_up, weighted_h = (t.bfloat16().to(device) for t in (x, grad_out, grad_gate_up, weighted_h))
    offsets = offsets.to(device)
    expert = torch.arange(NUM_EXPERTS, dtype=torch.int32).repeat_interleave(2).to(device)
    neuron = torch.tensor([3, 70], dtype=torch.int32).repeat(NUM_EXPERTS).to(device)
    grad = torch.zeros(len(expert), 3, HIDDEN_SIZE, device=device)
    ops.row_gradient_(grad, x, grad_out, grad_gate_up, weighted_h, offsets, expert, neuron)
    importance = torch.zeros(NUM_EXPERTS, INTERMEDIATE_SIZE, device=device)
    ops.row_importance_(importance, x, grad_out, grad_gate_up, weighted_h, offsets)
    return [grad, importance]


def _residual(device: torch.device) -> Outputs:
    weight = _random(NUM_EXPERTS, HIDDEN_SIZE, scale=0.02).to(device)
    codes, absmax = ops.quantize_blocks(weight, "nf4")
    residual = ops.quantize_residual(weight, codes, absmax, "nf4")
    return [residual, ops.dequantize_residual(codes, absmax, residual, "nf4")]


def _router_noise(device: torch.device) -> Outputs:
    out = torch.empty(NUM_TOKENS, NUM_EXPERTS, device=device)
    ops.router_uniform_(out, seed=1, step=2, micro_batch=0, layer=3)
    return [out]


def _paged_layer(device: torch.device) -> Outputs:
    """Forward and backward of a layer with few page slots, two sweeps; the last must repeat the first.

    To the bit, but on ROCm: there torch lets a GEMM add its parts in any order unless it is told to be deterministic.
    """
    gate, up = (_random(NUM_EXPERTS, INTERMEDIATE_SIZE, HIDDEN_SIZE, seed=s, scale=0.05) for s in (13, 14))
    down = _random(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, seed=15, scale=0.05)
    whole = PagedExperts.from_weights(gate, up, down)
    memory = whole.layer.memory
    budget = memory.smallest_budget(memory.store, memory.dtype)
    experts = PagedExperts.from_weights(gate, up, down, device_budget=budget, device=device)
    expert = torch.arange(NUM_EXPERTS, dtype=torch.int32)
    neurons = (expert, torch.full_like(expert, 7))
    bank = RowBank.from_store(experts.layer.store, 0, neurons, mode="in_place", device=device)
    experts.layer.set_bank(bank)
    index, weights = (t.to(device) for t in _routing())
    results = []
    for _ in range(2):
        bank.zero_grad()
        x = _random(NUM_TOKENS, HIDDEN_SIZE, seed=5).to(device).requires_grad_()
        out = experts(x, index, weights)
        out.backward(_random(*out.shape, seed=6).to(device))
        assert x.grad is not None
        assert bank.grad is not None
        results.append([out.detach(), x.grad, bank.grad.clone()])
    good, detail = _compare(results[1], [tensor.cpu() for tensor in results[0]], exact=torch.version.hip is None)
    if not good:
        raise ArithmeticError(f"a second sweep of the same pages gave other results: {detail}")
    return results[0]


def checks() -> list[Check]:
    """All checks, in the order of the table."""
    found = [Check(f"codec {format}", partial(_codec, format), True) for format in _C.FORMATS]
    found.append(Check("residual nf4", _residual, True))
    for format in ("nf4", "int8"):
        for mode in ("master", "residual", "eco", "in_place"):
            stochastic = mode in ("eco", "in_place")
            for moments in ("fp32", "8bit"):
                run = partial(_adam, mode, format, moments, stochastic)
                found.append(Check(f"masked_adam {mode} {format} {moments} moments", run, True))
    found.append(Check("gather, scatter, backward", _gather_and_scatter, False))
    for activation in ("silu", "gelu_tanh", "swiglu_clamped"):
        found.append(Check(f"glu {activation}", partial(_glu, activation), False))
    found.append(Check("row gradient, importance", _row_gradients, False))
    found.append(Check("router noise", _router_noise, True))
    found.append(Check("paged expert layer", _paged_layer, False))
    return found


@contextmanager
def _plain_path() -> Iterator[None]:
    level = _C.detected_isa()
    _C.limit_isa(PLAIN)
    try:
        yield
    finally:
        _C.limit_isa(level)


def _compare(results: Outputs, reference: Outputs, exact: bool) -> tuple[bool, str]:
    worst = 0.0
    for result, expected in zip(results, reference, strict=True):
        result = result.detach().cpu().contiguous()
        if result.shape != expected.shape or result.dtype != expected.dtype:
            return False, f"{result.dtype} {tuple(result.shape)} where {expected.dtype} {tuple(expected.shape)} was due"
        if exact:
            differing = int((result.view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum())
            if differing:
                return False, f"{differing} bytes of {result.numel() * result.element_size()} differ"
        elif expected.numel():
            result, expected = result.double(), expected.double()
            scale = float(expected.abs().max()) or 1.0
            error = float((result - expected).abs().max()) / scale
            worst = max(worst, error)
            if not error <= TOLERANCE:  # NaN too
                return False, f"off by {error:.1e} of the largest value (allowed {TOLERANCE:.1e})"
    return True, "same bits" if exact else f"within {worst:.1e}"


def devices() -> list[torch.device]:
    """The CPU and, where this build has kernels for them, all GPUs."""
    return [CPU, *gpus()]


def run_check(check: Check, device: torch.device) -> Outcome:
    """One check on one device; an error inside it fails the check and goes no further."""
    name = f"cpu ({_C.detected_isa()})" if device.type == "cpu" else str(device)
    start = time.perf_counter()
    with _plain_path():
        reference = [tensor.detach().cpu() for tensor in check.run(CPU)]
    try:
        good, detail = _compare(check.run(device), reference, check.exact)
        status = "pass" if good else "FAIL"
    except NotImplementedError:
        status, detail = "absent", "no kernel for this device in this build"
    except Exception as error:  # whatever a card we have not seen brings up belongs into its report
        status, detail = "FAIL", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Outcome(name, check.name, status, detail, time.perf_counter() - start)


def run_checks() -> Iterator[Outcome]:
    """One outcome for each device and check."""
    for device in devices():
        for check in checks():
            yield run_check(check, device)
