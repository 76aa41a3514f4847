"""Masked Adam: one optimiser step of selected rows, straight into their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import require_integers, require_numbers, require_optional_tensors, require_strings, require_tensors


def masked_adam_(
    codes: Tensor,
    absmax: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    format: str,
    mode: str,
    master: Tensor | None = None,
    active: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    changed: Tensor | None = None,
    seed: int = 0,
    first_element: int = 0,
) -> None:
    """One step of Adam with decoupled weight decay (torch.optim.AdamW's formula, in cpp/numerics/adam.h), in place.

    `rows` stands for any leading dimensions, the same for all. In mode "master" a row is read from `master`, stepped,
    rounded to master's dtype and stored there; its codes are then encoded from the rounded master (nearest), so they
    are always a function of it. In mode "in_place" a row is decoded from its codes, stepped and encoded with stochastic
    rounding keyed by (seed, the row's step, first_element + element): the same bits for any thread count or cut.

    A row that is not active, and every row if found_inf is not 0, keeps every bit, its step included.

    Args:
        codes: uint8 [rows.., code_bytes(format, cols)], contiguous; updated.
        absmax: float32 [rows.., num_blocks(format, cols)], contiguous; updated.
        exp_avg, exp_avg_sq: float32 [rows.., cols], contiguous; updated.
        step: int32 [rows..], contiguous: steps each row has made; incremented.
        grad: float32 [rows.., cols].
        lr, beta1, beta2, eps, weight_decay: as torch.optim.AdamW's.
        format: "nf4" or "bf16".
        mode: "master" or "in_place".
        master: float32 or bfloat16 [rows.., cols], contiguous, in mode "master" only; updated.
        active: bool [rows..]; None means all.
        grad_scale: float32, one element: the gradient is multiplied by it first.
        found_inf: float32, one element: not 0 skips the step.
        changed: int32, one element: set to 1 if a bit of codes, absmax or master changed, else left alone.
        seed: key of the rounding noise.
        first_element: position of the first element in the noise, for a bank that is stepped in pieces.

    Raises:
        ValueError: shapes that do not fit, scalars out of range, unknown format or mode, a master where none belongs.
        TypeError: wrong dtypes. Nothing is written in either case.
    """
    require_tensors(codes=codes, absmax=absmax, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, grad=grad)
    require_optional_tensors(master=master, active=active, grad_scale=grad_scale, found_inf=found_inf, changed=changed)
    require_numbers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    require_strings(format=format, mode=mode)
    require_integers(seed=seed, first_element=first_element)
    torch.ops.usaf.masked_adam_(
        codes,
        absmax,
        exp_avg,
        exp_avg_sq,
        step,
        grad,
        format,
        mode,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        master=master,
        active=active,
        grad_scale=grad_scale,
        found_inf=found_inf,
        changed=changed,
        seed=seed,
        first_element=first_element,
    )


@torch.library.register_fake("usaf::masked_adam_")
def _(
    codes: Tensor,
    absmax: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    grad: Tensor,
    format: str,
    adam_mode: str,
    **rest,
) -> None:
    return None
