"""masked_adam_ against torch.optim.AdamW, and bit for bit against the formula in plain fp32 torch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from usaf_ext import ops

FORMATS = ["nf4", "bf16"]
MODES = ["master", "in_place"]
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


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
    master: Tensor | None

    @staticmethod
    def make(num_rows, cols, format="nf4", mode="master", master_dtype=torch.float32, scale=0.02, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(num_rows, cols, generator=generator) * scale).to(master_dtype)
        codes, absmax = ops.quantize_blocks(weight, format)
        moments = [torch.zeros(num_rows, cols) for _ in range(2)]
        step = torch.zeros(num_rows, dtype=torch.int32)
        return Rows(format, mode, codes, absmax, *moments, step, weight if mode == "master" else None)

    def tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in ("codes", "absmax", "exp_avg", "exp_avg_sq", "step", "master")}
        return {name: value for name, value in values.items() if value is not None}

    def clone(self) -> Rows:
        return dataclasses.replace(self, **{name: value.clone() for name, value in self.tensors().items()})

    def apply(self, grad, **options):
        options = {**HYPER, "format": self.format, "mode": self.mode, **options}
        ops.masked_adam_(**self.tensors(), grad=grad, **options)

    def decode(self) -> Tensor:
        return ops.dequantize_blocks(self.codes, self.absmax, self.exp_avg.shape[1], self.format)

    def same_as(self, other: Rows, rows=slice(None)) -> bool:
        mine, theirs = self.tensors(), other.tensors()
        return all(torch.equal(mine[name][rows], theirs[name][rows]) for name in mine)


def expected_step(rows: Rows, grad: Tensor, seed=0, first_element=0, hyper=HYPER) -> Rows:
    """The same step in fp32 torch, one rounding an operation, with the scalars in double."""
    rows = rows.clone()
    cols = grad.shape[1]
    rows.step += 1
    f32 = {name: torch.tensor(value, dtype=torch.float32) for name, value in hyper.items()}
    complement1 = torch.tensor(1 - hyper["beta1"], dtype=torch.float32)
    complement2 = torch.tensor(1 - hyper["beta2"], dtype=torch.float32)
    correction = [[1 - hyper[beta] ** t for t in rows.step.tolist()] for beta in ("beta1", "beta2")]
    step_size = torch.tensor([hyper["lr"] / c for c in correction[0]], dtype=torch.float64).float()[:, None]
    inverse_sqrt = torch.tensor([1 / math.sqrt(c) for c in correction[1]], dtype=torch.float64).float()[:, None]
    keep = torch.tensor(1 - hyper["lr"] * hyper["weight_decay"], dtype=torch.float32)

    weight = rows.master.float() if rows.mode == "master" else rows.decode()
    rows.exp_avg = f32["beta1"] * rows.exp_avg + complement1 * grad
    rows.exp_avg_sq = f32["beta2"] * rows.exp_avg_sq + complement2 * (grad * grad)
    # numpy's square root is the correctly rounded one; torch's, through MKL, is not.
    denominator = torch.from_numpy(np.sqrt(rows.exp_avg_sq.numpy())) * inverse_sqrt + f32["eps"]
    weight = weight * keep - (step_size * rows.exp_avg) / denominator
    if rows.mode == "master":
        rows.master = weight.to(rows.master.dtype)
        weight = rows.master.float()
        random = None
    else:
        noise = [oracles.philox(seed, t, first_element + r * cols, cols) for r, t in enumerate(rows.step.tolist())]
        random = torch.stack(noise)
    if rows.format == "nf4":
        uniform = None if random is None else (random >> 8).float() * 2.0**-24
        code, rows.absmax = oracles.encode_nf4(weight, uniform)
        rows.codes = oracles.pack_nf4(code)
    else:
        if random is not None:
            bits = weight.contiguous().view(torch.int32).long() & 0xFFFFFFFF
            upper = ((bits + (random & 0xFFFF)) >> 16 << 16) & 0xFFFFFFFF
            weight = torch.where(upper >= 2**31, upper - 2**32, upper).int().view(torch.float32)
        rows.codes = oracles.pack_bf16(weight)
    return rows


def test_philox_known_answer():
    """The published test vector of Philox 4x32-10, so that the oracle itself stands on something."""
    assert [hex(v) for v in oracles.philox(0, 0, 0, 4).tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@pytest.mark.parametrize("cols", [64, 70, 257])
@pytest.mark.parametrize("format", FORMATS)
def test_fp32_master_equals_torch_adamw(format, cols):
    rows = Rows.make(9, cols, format)
    parameter = torch.nn.Parameter(rows.master.clone())
    betas = (HYPER["beta1"], HYPER["beta2"])
    optimizer = torch.optim.AdamW([parameter], HYPER["lr"], betas, HYPER["eps"], HYPER["weight_decay"])
    for _ in range(6):
        parameter.grad = torch.randn(9, cols) * 10 ** torch.randint(-6, 2, (9, 1)).float()
        optimizer.step()
        rows.apply(parameter.grad)
        torch.testing.assert_close(rows.master, parameter.detach(), rtol=1e-6, atol=1e-8)
        codes, absmax = ops.quantize_blocks(rows.master, format)
        assert torch.equal(rows.codes, codes)
        assert torch.equal(rows.absmax, absmax)
    assert rows.step.tolist() == [6] * 9
    state = optimizer.state[parameter]
    torch.testing.assert_close(rows.exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("master_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_the_formula(format, cols, master_dtype, mode):
    rows = Rows.make(7, cols, format, mode, master_dtype)
    rows.step += torch.arange(7, dtype=torch.int32) * 3
    seed, first_element = 2**40 + 17, 3
    for _ in range(4):
        grad = torch.randn(7, cols)
        expected = expected_step(rows, grad, seed, first_element)
        rows.apply(grad, seed=seed, first_element=first_element)
        assert rows.same_as(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_skipped_rows_keep_every_bit(format, mode):
    rows = Rows.make(8, 70, format, mode)
    rows.apply(torch.randn(8, 70))
    before, grad = rows.clone(), torch.randn(8, 70)
    active = torch.tensor([True, False, True, True, False, False, True, False])
    whole = rows.clone()
    whole.apply(grad)
    rows.apply(grad, active=active)
    assert rows.same_as(before, ~active)
    assert rows.same_as(whole, active)
    assert rows.step.tolist() == [2 if on else 1 for on in active.tolist()]


@pytest.mark.parametrize("mode", MODES)
def test_found_inf_changes_no_bit(mode):
    rows = Rows.make(4, 70, mode=mode)
    before, changed = rows.clone(), torch.zeros((), dtype=torch.int32)
    rows.apply(torch.full((4, 70), float("nan")), found_inf=torch.ones(()), changed=changed)
    assert rows.same_as(before)
    assert changed.item() == 0
    rows.apply(torch.randn(4, 70), found_inf=torch.zeros(()), changed=changed)
    assert not rows.same_as(before)
    assert changed.item() == 1


def test_grad_scale():
    scaled, plain, grad = Rows.make(4, 70), Rows.make(4, 70), torch.randn(4, 70)
    scaled.apply(grad, grad_scale=torch.tensor(0.25))
    plain.apply(grad * 0.25)
    assert scaled.same_as(plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_changed_tells_whether_a_stored_bit_changed(format, mode):
    rows, changed = Rows.make(3, 70, format, mode), torch.zeros(1, dtype=torch.int32)
    # Every weight stands on its code, so a step without lr rounds nothing, even stochastically.
    table = torch.arange(70) % 16
    rows.codes.copy_(oracles.pack_nf4(table.expand(3, 70)) if format == "nf4" else oracles.pack_bf16(torch.ones(3, 70)))
    rows.absmax.fill_(1.0)
    if mode == "master":
        rows.master.copy_(rows.decode())
    rows.apply(torch.randn(3, 70), lr=0.0, weight_decay=0.0, changed=changed)
    assert changed.item() == 0
    rows.apply(torch.randn(3, 70), lr=0.5, changed=changed)
    assert changed.item() == 1
    rows.apply(torch.randn(3, 70), lr=0.0, changed=changed)
    assert changed.item() == 1  # never cleared


def test_master_change_alone_counts_as_changed():
    rows, changed = Rows.make(1, 64), torch.zeros((), dtype=torch.int32)
    codes, absmax = rows.codes.clone(), rows.absmax.clone()
    grad = torch.zeros(1, 64)
    grad[0, rows.master.abs().argmin()] = 1.0
    rows.apply(grad, lr=1e-7, weight_decay=0.0, changed=changed)
    assert torch.equal(rows.codes, codes)
    assert torch.equal(rows.absmax, absmax)
    assert changed.item() == 1


@pytest.mark.parametrize("format", FORMATS)
def test_in_place_is_unbiased(format):
    """The mean over seeds of the decoded row is the stepped row, within four standard errors."""
    start, grad = Rows.make(2, 128, format, "in_place"), torch.randn(2, 128)
    exact = dataclasses.replace(start.clone(), mode="master", master=start.decode())
    exact.apply(grad)
    samples = []
    for seed in range(400):
        rows = start.clone()
        rows.apply(grad, seed=seed)
        samples.append(rows.decode())
    samples = torch.stack(samples).double()
    error = samples.mean(0) - exact.master.double()
    deviation = samples.std(0) / math.sqrt(len(samples))
    assert (samples.std(0) > 0).double().mean() > 0.9
    assert (error.abs() > 4 * deviation + 1e-6).double().mean() < 0.01


def test_in_place_learns_below_a_quantisation_step():
    """Steps far under a 4-bit step add up, where rounding to nearest would stand still."""
    rows = Rows.make(16, 256, "nf4", "in_place")
    start = rows.decode()
    for _ in range(50):
        rows.apply(torch.ones(16, 256), lr=1e-4, weight_decay=0.0)
    assert (rows.decode() - start).mean().item() == pytest.approx(-50 * 1e-4, rel=0.15)


def test_a_bank_cut_in_pieces_rounds_the_same():
    whole, grad = Rows.make(6, 70, "nf4", "in_place"), torch.randn(6, 70)
    pieces = whole.clone()
    whole.apply(grad, seed=5)
    for first, last in [(0, 1), (1, 4), (4, 6)]:
        part = dataclasses.replace(pieces, **{name: value[first:last] for name, value in pieces.tensors().items()})
        part.apply(grad[first:last], seed=5, first_element=first * 70)
    assert pieces.same_as(whole)


def test_leading_dimensions():
    flat, grad = Rows.make(6, 70), torch.randn(6, 70)
    shaped = dataclasses.replace(
        flat.clone(), **{name: value.clone().unflatten(0, (2, 3)) for name, value in flat.tensors().items()}
    )
    flat.apply(grad)
    shaped.apply(grad.unflatten(0, (2, 3)))
    assert torch.equal(shaped.codes.flatten(0, 1), flat.codes)
    assert torch.equal(shaped.master.flatten(0, 1), flat.master)
    assert torch.equal(shaped.step.flatten(), flat.step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 70), (3, 0)])
def test_empty(shape, mode):
    rows = Rows.make(*shape, mode=mode)
    rows.apply(torch.zeros(shape))
    assert rows.step.tolist() == [1] * shape[0]


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(mode):
    grad = torch.randn(64, 1000)

    def run():
        rows = Rows.make(64, 1000, "nf4", mode)
        rows.apply(grad, seed=3)
        return list(rows.tensors().values())

    assert oracles.same_for_any_threads(run)


def test_bad_arguments():
    rows, grad = Rows.make(4, 70), torch.randn(4, 70)
    before = rows.clone()
    good = {**rows.tensors(), "grad": grad, **HYPER, "format": "nf4", "mode": "master"}
    bad = [
        (TypeError, "codes", rows.codes.int()),
        (ValueError, "codes", rows.codes[:, :32]),
        (ValueError, "codes.*contiguous", rows.codes.t().contiguous().t()),
        (TypeError, "absmax", rows.absmax.double()),
        (ValueError, "absmax", rows.absmax[:, :1]),
        (TypeError, "exp_avg", rows.exp_avg.bfloat16()),
        (ValueError, "exp_avg", rows.exp_avg[:3]),
        (ValueError, "exp_avg_sq", rows.exp_avg_sq.t().contiguous().t()),
        (TypeError, "step", rows.step.long()),
        (ValueError, "step", rows.step[:3]),
        (ValueError, "step", rows.step - 1),
        (TypeError, "grad", grad.double()),
        (TypeError, "grad", None),
        (ValueError, "grad", grad[0]),
        (ValueError, "lr", -1.0),
        (ValueError, "lr", float("nan")),
        (TypeError, "lr", "1e-3"),
        (ValueError, "beta1", 1.0),
        (ValueError, "beta2", -0.1),
        (ValueError, "eps", -1e-8),
        (ValueError, "weight_decay", -0.1),
        (ValueError, "format", "int3"),
        (ValueError, "mode", "sgd"),
        (ValueError, "master.*None in mode", None),
        (TypeError, "master", rows.master.half()),
        (ValueError, "master", rows.master[:, :69]),
        (TypeError, "active", torch.ones(4)),
        (ValueError, "active", torch.ones(3, dtype=torch.bool)),
        (TypeError, "grad_scale", torch.ones((), dtype=torch.float64)),
        (TypeError, "grad_scale", 1.0),
        (ValueError, "found_inf", torch.zeros(2)),
        (TypeError, "changed", torch.zeros(())),
        (ValueError, "first_element", -1),
        (TypeError, "seed", 0.5),
    ]
    for error, match, value in bad:
        argument = match.split(".")[0]
        match = match.replace("None in mode", "got None")
        with pytest.raises(error, match=match):
            ops.masked_adam_(**{**good, argument: value})
    with pytest.raises(ValueError, match="master: expected None"):
        ops.masked_adam_(**{**good, "mode": "in_place"})
    assert rows.same_as(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format, mode):
    rows, changed = Rows.make(4, 70, format, mode), torch.zeros((), dtype=torch.int32)
    names = ("codes", "absmax", "exp_avg", "exp_avg_sq", "step")
    arguments = tuple(getattr(rows, name) for name in names)
    options = {**HYPER, "master": rows.master, "changed": changed}
    options.update(active=torch.tensor([True, False, True, True]), grad_scale=torch.ones(()), seed=1)
    opcheck(torch.ops.usaf.masked_adam_.default, (*arguments, torch.randn(4, 70), format, mode), options)
