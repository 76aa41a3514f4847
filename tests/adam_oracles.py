"""The rows that masked_adam_ steps, and the same step in plain torch: in float32 with one rounding an operation, bit
for bit, and in float64."""

from __future__ import annotations

import dataclasses
import math

import bitsandbytes.functional as bnb
import codec_oracles
import numpy as np
import oracles
import torch
import torch.nn.functional as F
from devices import ops
from torch import Tensor

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
MODES = ["master", "in_place", "residual", "eco"]
FORMATS = codec_oracles.FORMATS
MOMENT_BLOCK = 256
_STATE = ["codes", "absmax", "exp_avg", "exp_avg_sq", "step", "master", "residual"]
_STATE += ["exp_avg_absmax", "exp_avg_sq_absmax"]


@dataclasses.dataclass
class Rows:
    """The state of some rows, as masked_adam_ takes it."""

    format: str
    mode: str
    codes: Tensor
    absmax: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    master: Tensor | None = None
    residual: Tensor | None = None
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None

    @staticmethod
    def make(num_rows, cols, format="nf4", mode="master", master_dtype=torch.float32, moments="fp32", seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(num_rows, cols, generator=generator) * 0.02).to(master_dtype)
        codes, absmax = ops.quantize_blocks(weight, format)
        step = torch.zeros(num_rows, dtype=torch.int32)
        rows = Rows(format, mode, codes, absmax, torch.zeros(num_rows, cols), torch.zeros(num_rows, cols), step)
        if mode == "master":
            rows.master = weight
        if mode == "residual":
            rows.residual = torch.randint(-127, 128, (num_rows, cols), generator=generator, dtype=torch.int8)
        if moments == "8bit":
            rows.exp_avg, rows.exp_avg_absmax = ops.empty_moments8((num_rows, cols))
            rows.exp_avg_sq, rows.exp_avg_sq_absmax = ops.empty_moments8((num_rows, cols))
        return rows

    @property
    def cols(self) -> int:
        return self.exp_avg.shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in _STATE}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function) -> Rows:
        """A copy with every tensor put through `function`."""
        return dataclasses.replace(self, **{name: function(value) for name, value in self.tensors().items()})

    def clone(self) -> Rows:
        return self.map(torch.clone)

    def apply(self, grad, **options):
        options = {**HYPER, "format": self.format, "mode": self.mode, **options}
        ops.masked_adam_(**self.tensors(), grad=grad, **options)

    def decode(self) -> Tensor:
        return codec_oracles.decode(self.codes, self.absmax, self.cols, self.format)

    def weight(self) -> Tensor:
        """What a step starts from."""
        if self.mode == "master":
            return self.master.float()
        decoded = self.decode()
        return decoded if self.residual is None else decoded + self.residual.float() * self.unit()

    def unit(self) -> Tensor:
        """Of the residual: a 127th of half the way from each code to its farther neighbour."""
        gap = code_gaps(self.codes, self.cols, self.format)
        step = torch.ones(()) if self.format == "bf16" else codec_oracles.steps(self.absmax, self.format)
        if step.dim():
            step = step.repeat_interleave(oracles.BLOCK, -1)[:, : self.cols]
        return (gap * step * torch.tensor(1 / 127, dtype=torch.float32)).clamp_min(1e-38)

    def moments(self) -> tuple[Tensor, Tensor]:
        if self.exp_avg_absmax is None:
            return self.exp_avg, self.exp_avg_sq
        return (
            decode_moments(self.exp_avg, self.exp_avg_absmax, True),
            decode_moments(self.exp_avg_sq, self.exp_avg_sq_absmax, False),
        )

    def set_moments(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        if self.exp_avg_absmax is None:
            self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        else:
            self.exp_avg, self.exp_avg_absmax = encode_moments(exp_avg, True)
            self.exp_avg_sq, self.exp_avg_sq_absmax = encode_moments(exp_avg_sq, False)

    def same_as(self, other: Rows, rows=slice(None)) -> bool:
        mine, theirs = self.tensors(), other.tensors()
        return all(torch.equal(mine[name][rows], theirs[name][rows]) for name in mine)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def code_gaps(codes: Tensor, cols: int, format: str) -> Tensor:
    """Half the way from each code to its farther neighbour, in steps (bf16: in weights)."""
    if format.startswith("nf4"):
        below = F.pad(oracles.NF4.diff(), (1, 0))
        above = F.pad(oracles.NF4.diff(), (0, 1))
        code = torch.stack((codes >> 4, codes & 15), -1).flatten(-2)[:, :cols].long()
        return (0.5 * torch.maximum(below, above))[code]
    if format == "int8":
        return torch.full((len(codes), cols), 0.5)
    if format == "fp8":
        exponent = (codes[:, :cols].int() >> 3 & 15).clamp_min(1)
        return _power_of_two(exponent - 11)
    exponent = (codes[:, : 2 * cols].contiguous().view(torch.int16).int() >> 7 & 255).clamp_min(32)
    return _power_of_two(exponent - 135)


def moment_map(signed: bool) -> Tensor:
    return bnb.create_dynamic_map(signed=signed)


def moment_blocks(values: Tensor) -> Tensor:
    return F.pad(values, (0, -values.shape[-1] % MOMENT_BLOCK)).unflatten(-1, (-1, MOMENT_BLOCK))


def encode_moments(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """As bitsandbytes' default backend."""
    values_map, blocks = moment_map(signed), moment_blocks(values)
    absmax = blocks.abs().amax(-1)
    normalized = blocks * (1.0 / absmax.clamp_min(1e-38)).unsqueeze(-1)
    codes = torch.bucketize(normalized, (values_map[:-1] + values_map[1:]) / 2)
    return codes.flatten(-2)[..., : values.shape[-1]].to(torch.uint8), absmax


def decode_moments(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = moment_map(signed)[codes.long()]
    return values * absmax.repeat_interleave(MOMENT_BLOCK, -1)[..., : codes.shape[-1]]


def _scalar(value) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).float()


def expected_step(rows: Rows, grad: Tensor, stochastic=True, seed=0, first_element=0, hyper=HYPER) -> Rows:
    """The same step in fp32 torch, one rounding an operation, with the scalars in double."""
    rows = rows.clone()
    rows.step += 1
    beta1, beta2, lr = hyper["beta1"], hyper["beta2"], hyper["lr"]
    keep = 1 - lr * hyper["weight_decay"]
    step_sizes = [lr / (1 - beta1**t) for t in rows.step.tolist()]
    step_size = _scalar(step_sizes)[:, None]
    inverse_sqrt = _scalar([1 / math.sqrt(1 - beta2**t) for t in rows.step.tolist()])[:, None]

    grad, weight = grad.float(), rows.weight()
    exp_avg, exp_avg_sq = rows.moments()
    exp_avg = _scalar(beta1) * exp_avg + _scalar(1 - beta1) * grad
    exp_avg_sq = _scalar(beta2) * exp_avg_sq + _scalar(1 - beta2) * (grad * grad)
    # numpy's square root is the correctly rounded one; torch's, through MKL, is not.
    denominator = torch.from_numpy(np.sqrt(exp_avg_sq.numpy())) * inverse_sqrt + _scalar(hyper["eps"])
    weight = weight * _scalar(keep) - (step_size * exp_avg) / denominator

    random = None
    if rows.mode == "master":
        rows.master = weight.to(rows.master.dtype)
        weight = rows.master.float()
    elif stochastic and rows.mode != "residual":
        cols = rows.cols
        noise = [oracles.philox(seed, t, first_element + r * cols, cols) for r, t in enumerate(rows.step.tolist())]
        random = torch.stack(noise)
    if rows.format == "bf16" and random is not None:
        bits = weight.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        upper = ((bits + (random & 0xFFFF)) >> 16 << 16) & 0xFFFFFFFF
        weight_bits = torch.where(upper >= 2**31, upper - 2**32, upper).int()
        rows.codes = oracles.pack_bf16(weight_bits.view(torch.float32))
    else:
        rows.codes, rows.absmax = codec_oracles.encode(weight, rows.format, random)
    if rows.mode == "residual":
        rows.residual = ((weight - rows.decode()) / rows.unit()).clamp(-127, 127).round().to(torch.int8)
    if rows.mode == "eco" and lr > 0:
        carried = _scalar([keep * (1 - 1 / beta1) / size for size in step_sizes])[:, None]
        exp_avg = exp_avg + (carried * (weight - rows.decode())) * denominator
    rows.set_moments(exp_avg, exp_avg_sq)
    return rows


def float64_step(rows: Rows, grad: Tensor, hyper=HYPER) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, exp_avg and exp_avg_sq of the step in float64, before anything is rounded, and each weight's own step
    size: d weight / d exp_avg."""
    t = (rows.step.double() + 1)[:, None]
    grad = grad.double()
    exp_avg, exp_avg_sq = (moment.double() for moment in rows.moments())
    exp_avg = hyper["beta1"] * exp_avg + (1 - hyper["beta1"]) * grad
    exp_avg_sq = hyper["beta2"] * exp_avg_sq + (1 - hyper["beta2"]) * grad**2
    size = hyper["lr"] / (1 - hyper["beta1"] ** t) / ((exp_avg_sq / (1 - hyper["beta2"] ** t)).sqrt() + hyper["eps"])
    weight = rows.weight().double() * (1 - hyper["lr"] * hyper["weight_decay"]) - size * exp_avg
    return weight, exp_avg, exp_avg_sq, size
