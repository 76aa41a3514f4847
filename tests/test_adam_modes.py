"""What Adam's modes are for: steps far below a quantisation step are not lost, and noise is fair."""

from __future__ import annotations

import math

import pytest
import torch
from adam_oracles import FORMATS, Rows

LR = 1e-5  # an NF4 step is about 5e-3 here
STEPS = 40


def _moved(mode: str, format: str = "nf4", lr: float = LR, steps: int = STEPS, **options) -> float:
    """How far constant gradients of 1 have moved the weights, on average, as a share of steps * lr."""
    rows = Rows.make(16, 256, format, mode)
    start = rows.weight().double()
    for _ in range(steps):
        rows.apply(torch.ones(16, 256), lr=lr, weight_decay=0.0, **options)
    return ((start - rows.weight().double()).mean() / (steps * lr)).item()


@pytest.mark.parametrize("format", ["nf4", "nf4_f16", "int8", "fp8"])
def test_nearest_rounding_in_place_loses_small_steps(format):
    assert abs(_moved("in_place", format, stochastic=False)) < 0.05


@pytest.mark.parametrize("format", FORMATS)
def test_master_keeps_small_steps(format):
    assert _moved("master", format) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_residual_keeps_small_steps(format):
    """A step of 1e-4 is rounded to a few of the residual's units (of NF4), so the sum is right to a few per cent."""
    assert _moved("residual", format, lr=1e-4) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("format", ["int8", "fp8", "bf16"])
def test_residual_keeps_steps_of_a_fine_format(format):
    assert _moved("residual", format, lr=1e-5) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("mode", ["in_place", "eco"])
def test_stochastic_rounding_keeps_small_steps_on_average(mode):
    assert _moved(mode, lr=1e-4, steps=50) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("format", FORMATS)
def test_in_place_is_unbiased(format):
    """The mean over seeds of the decoded row is the stepped row, within four standard errors."""
    start, grad = Rows.make(2, 128, format, "in_place"), torch.randn(2, 128)
    exact = start.clone()
    exact.mode, exact.master = "master", start.decode()
    exact.apply(grad)
    samples = []
    for seed in range(400):
        rows = start.clone()
        rows.apply(grad, seed=seed)
        samples.append(rows.decode())
    samples = torch.stack(samples).double()
    error = samples.mean(0) - exact.master.double()
    deviation = samples.std(0) / math.sqrt(len(samples))
    rare = (
        2 * 127 * start.unit().double() * 4 / len(samples)
    )  # a code too unlikely for the samples to show its deviation
    assert (samples.std(0) > 0).double().mean() > 0.9
    assert (error.abs() > 4 * deviation + rare).double().mean() < 0.01


@pytest.mark.parametrize("mode", ["in_place", "eco"])
def test_noise_depends_on_seed_and_step_alone(mode):
    start, grad = Rows.make(4, 100, mode=mode), torch.randn(4, 100)
    first, again, other = start.clone(), start.clone(), start.clone()
    first.apply(grad, seed=1)
    again.apply(grad, seed=1)
    other.apply(grad, seed=2)
    assert first.same_as(again)
    assert not torch.equal(first.codes, other.codes)


def _quadratic(mode: str, stochastic: bool, lr: float, steps: int) -> float:
    """How far the weights, on average over the second half of the steps, are from the minimum of a quadratic, as a
    share of the first distance. The minimum lies between the codes: only their mean can reach it."""
    generator = torch.Generator().manual_seed(3)
    rows = Rows.make(4, 256, "nf4", mode)
    target = rows.decode() + 0.003 * torch.randn(4, 256, generator=generator)
    first = (rows.decode() - target).norm()
    mean = torch.zeros_like(target)
    for i in range(steps):
        rows.apply(rows.decode() - target, lr=lr, weight_decay=0.0, stochastic=stochastic)
        if i >= steps // 2:
            mean += rows.decode() / (steps - steps // 2)
    return ((mean - target).norm() / first).item()


# Rounding to nearest, eco moves a weight by (1 - beta1) of Adam's step while its code rests.
@pytest.mark.parametrize(("stochastic", "lr", "steps", "left"), [(True, 2e-4, 600, 0.15), (False, 5e-4, 1500, 0.35)])
def test_eco_converges_where_rounding_in_place_does_not(stochastic, lr, steps, left):
    assert _quadratic("in_place", False, lr, steps) > 0.9
    assert _quadratic("eco", stochastic, lr, steps) < left
    assert _quadratic("eco", stochastic, lr, steps) < _quadratic("in_place", stochastic, lr, steps)


@pytest.mark.parametrize("lr", [0.0, 1e-44])
def test_eco_without_a_learning_rate_carries_nothing(lr):
    """Such a step is Adam's own: the moments stay numbers."""
    rows, grad = Rows.make(3, 128, mode="eco"), torch.randn(3, 128)
    plain = rows.clone()
    plain.mode = "in_place"
    rows.apply(grad, lr=lr)
    plain.apply(grad, lr=lr)
    assert torch.equal(rows.exp_avg, plain.exp_avg)
    assert torch.equal(rows.codes, plain.codes)
    assert rows.exp_avg.isfinite().all()
