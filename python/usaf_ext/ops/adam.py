"""Masked Adam: one optimiser step of selected rows, straight into their codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import (
    require_flags,
    require_integers,
    require_numbers,
    require_optional_tensors,
    require_strings,
    require_tensors,
)

MOMENT_BLOCK = 256


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
    residual: Tensor | None = None,
    exp_avg_absmax: Tensor | None = None,
    exp_avg_sq_absmax: Tensor | None = None,
    active: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    changed: Tensor | None = None,
    stochastic: bool = True,
    seed: int = 0,
    first_element: int = 0,
) -> None:
    """One step of Adam with decoupled weight decay, in place (formula and that of eco: cpp/numerics/adam.h).

    `rows` stands for any leading dimensions, the same for all. Where a row is read from, and what its new codes come
    from, depends on the mode:

    - "master": read from `master`, stepped, rounded to master's dtype and stored there; the codes are encoded from the
      rounded master (nearest), so they are always a function of it.
    - "residual": decode(codes) + residual, stepped, encoded to nearest; the rounding error becomes the new residual, in
      127ths of the code's widest half-gap (8-bit error feedback, cpp/numerics/residual.h).
    - "eco": decoded from the codes, stepped, encoded; the rounding error goes into exp_avg, from where the next steps
      undo it. Needs beta1 > 0; with lr 0 nothing is carried.
    - "in_place": decoded from the codes, stepped, encoded; nothing remembers the rounding error.

    "eco" and "in_place" encode with stochastic rounding keyed by (seed, the row's step, first_element + element), the
    same bits for any thread count or cut, or, not `stochastic`, to nearest.

    Moments are float32, or uint8 beside their absmax (each of the two by itself): bitsandbytes' dynamic 8-bit map,
    signed for exp_avg and unsigned for exp_avg_sq, in blocks of 256 along the row (cpp/numerics/dynamic8.h). They are
    decoded, stepped and encoded to nearest. See `empty_moments8` and `dequantize_moments8`.

    A row that is not active, and every row if found_inf is not 0, keeps every bit, its step included.

    Args:
        codes: uint8 [rows.., code_bytes(format, cols)], contiguous; updated.
        absmax: [rows.., num_blocks(format, cols)] of the format's scale dtype, contiguous; updated.
        exp_avg, exp_avg_sq: float32, or uint8 beside an absmax, [rows.., cols], contiguous; updated.
        step: int32 [rows..], contiguous: steps each row has made; incremented.
        grad: float32 or bfloat16 [rows.., cols].
        lr, beta1, beta2, eps, weight_decay: as torch.optim.AdamW's.
        format: one of `_C.FORMATS`.
        mode: "master", "residual", "eco" or "in_place".
        master: float32 or bfloat16 [rows.., cols], contiguous, in mode "master" only; updated.
        residual: int8 [rows.., cols], contiguous, in mode "residual" only; updated. Zeros to begin with.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [rows.., ceil(cols / 256)], contiguous, for a moment of 8 bits;
            updated.
        active: bool [rows..]; None means all.
        grad_scale: float32, one element: the gradient is multiplied by it first.
        found_inf: float32, one element: not 0 skips the step.
        changed: int32, one element: set to 1 if a bit of codes, absmax, master or residual changed, else left alone.
        stochastic: whether "eco" and "in_place" round stochastically; the other modes ignore it.
        seed: key of the rounding noise.
        first_element: position of the first element in the noise, for a bank that is stepped in pieces.

    Raises:
        ValueError: shapes that do not fit, scalars out of range, unknown format or mode, a state tensor where none
            belongs or none where one does.
        TypeError: wrong dtypes. Nothing is written in either case.
    """
    require_tensors(codes=codes, absmax=absmax, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, grad=grad)
    require_optional_tensors(
        master=master,
        residual=residual,
        exp_avg_absmax=exp_avg_absmax,
        exp_avg_sq_absmax=exp_avg_sq_absmax,
        active=active,
        grad_scale=grad_scale,
        found_inf=found_inf,
        changed=changed,
    )
    require_numbers(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    require_strings(format=format, mode=mode)
    require_flags(stochastic=stochastic)
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
        residual=residual,
        exp_avg_absmax=exp_avg_absmax,
        exp_avg_sq_absmax=exp_avg_sq_absmax,
        active=active,
        grad_scale=grad_scale,
        found_inf=found_inf,
        changed=changed,
        stochastic=stochastic,
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


def empty_moments8(shape: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """A moment of zeros for `masked_adam_`, in 8 bits: codes uint8 `shape` and absmax float32 [.., ceil(cols / 256)].

    Args:
        shape: [rows.., cols] of the moment, at least two dimensions.

    Raises:
        TypeError: not a sequence of integers. ValueError: fewer than two dimensions, or a negative one.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape: expected a sequence of integers, got {type(shape).__name__}")
    for size in shape:
        require_integers(shape=size)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape: expected [rows.., cols], none negative, got {tuple(shape)}")
    blocks = -(-shape[-1] // MOMENT_BLOCK)
    codes = torch.zeros(*shape, dtype=torch.uint8, device=device)
    return codes, torch.zeros(*shape[:-1], blocks, dtype=torch.float32, device=device)


def dequantize_moments8(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values of an 8-bit moment of `masked_adam_`.

    Args:
        codes: uint8 [rows.., cols].
        absmax: float32 [rows.., ceil(cols / 256)].
        signed: True for exp_avg, False for exp_avg_sq.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.
    """
    require_tensors(codes=codes, absmax=absmax)
    require_flags(signed=signed)
    return torch.ops.usaf.dequantize_moments8(codes, absmax, signed)


@torch.library.register_fake("usaf::dequantize_moments8")
def _(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
