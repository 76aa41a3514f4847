"""dequantize_residual and quantize_residual against float64, and against what masked_adam_ does with a residual."""

from __future__ import annotations

import pytest
import torch
from devices import cpu_only, opcheck, ops
from usaf_ext import _C

pytestmark = pytest.mark.usefixtures("device")

FORMATS = list(_C.FORMATS)
SHAPES = [(0, 64), (3, 64), (5, 200), (2, 3, 70), (4, 1)]


def encoded(shape, format, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight, *ops.quantize_blocks(weight, format)


def half_gaps(weight, codes, absmax, format):
    """Half the way from each decoded weight to its farther neighbour among the block's values, float64."""
    cols = weight.shape[-1]
    decoded = ops.dequantize_blocks(codes, absmax, cols, format).double()
    if format == "bf16":
        exponent = torch.frexp(decoded).exponent
        return torch.ldexp(torch.ones_like(decoded), exponent - 9)  # 8 significant bits: half a last place
    code = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16) if format != "nf4" else None
    if format.startswith("nf4"):
        code = (17 * torch.arange(16, dtype=torch.uint8))[:, None].expand(16, 16)
    one = torch.ones(len(code), 1, dtype=absmax.dtype)
    values = ops.dequantize_blocks(code.contiguous(), one, 1, format).double()[:, 0]
    values = values[torch.isfinite(values)].unique()
    if format == "int8":
        values = values[values >= -1]
    steps = absmax.double().repeat_interleave(64, dim=-1)[..., :cols]
    nearest = ((decoded / steps.clamp(min=1e-30))[..., None] - values).abs().argmin(-1)
    distance = torch.cat([torch.zeros(1), values.diff(), torch.zeros(1)]).double()
    return torch.maximum(distance[nearest], distance[nearest + 1]) * steps / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_residual_leaves_half_a_254th_of_the_gap(format, shape):
    weight, codes, absmax = encoded(shape, format)
    residual = ops.quantize_residual(weight, codes, absmax, format)
    assert residual.dtype == torch.int8
    assert residual.shape == weight.shape
    error = (ops.dequantize_residual(codes, absmax, residual, format).double() - weight.double()).abs()
    assert bool((error <= half_gaps(weight, codes, absmax, format) / 254 * 1.001 + 1e-9).all())
    nothing = torch.zeros_like(residual)
    decoded = ops.dequantize_blocks(codes, absmax, shape[-1], format)
    assert torch.equal(ops.dequantize_residual(codes, absmax, nothing, format), decoded)


@pytest.mark.parametrize("format", FORMATS)
def test_a_step_with_lr_0_reads_and_writes_the_same_residual(format):
    """masked_adam_ decodes codes and residual, encodes anew, and keeps the error: the two ops say what it did."""
    weight, codes, absmax = encoded((6, 200), format)
    residual = ops.quantize_residual(weight + 1e-4 * torch.randn_like(weight), codes, absmax, format)
    stepped_from = ops.dequantize_residual(codes, absmax, residual, format)
    moments = [torch.zeros(6, 200) for _ in range(2)]
    step = torch.zeros(6, dtype=torch.int32)
    hyper = {"lr": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    grad = torch.randn(6, 200)
    ops.masked_adam_(codes, absmax, *moments, step, grad, format=format, mode="residual", residual=residual, **hyper)
    expected_codes, expected_absmax = ops.quantize_blocks(stepped_from, format)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(residual, ops.quantize_residual(stepped_from, codes, absmax, format))


@cpu_only
def test_bad_input():
    weight, codes, absmax = encoded((2, 70), "nf4")
    residual = torch.zeros(2, 70, dtype=torch.int8)
    for call, error, message in [
        (lambda: ops.dequantize_residual(codes, absmax, residual.int(), "nf4"), TypeError, "residual: expected Char"),
        (lambda: ops.dequantize_residual(codes[:1], absmax, residual, "nf4"), ValueError, "codes: expected shape"),
        (lambda: ops.dequantize_residual(codes, absmax.double(), residual, "nf4"), TypeError, "absmax"),
        (lambda: ops.dequantize_residual(codes, absmax, residual, "nf3"), ValueError, "format"),
        (lambda: ops.quantize_residual(weight.bfloat16(), codes, absmax, "nf4"), TypeError, "weight: expected Float"),
        (lambda: ops.quantize_residual(weight, codes, absmax[:, :1], "nf4"), ValueError, "absmax: expected shape"),
        (lambda: ops.quantize_residual(weight, codes.float(), absmax, "nf4"), TypeError, "codes"),
        (lambda: ops.quantize_residual(weight, codes, None, "nf4"), TypeError, "absmax"),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    weight, codes, absmax = encoded((4, 70), format)
    residual = ops.quantize_residual(weight, codes, absmax, format)
    opcheck(torch.ops.usaf.quantize_residual.default, (weight, codes, absmax, format))
    opcheck(torch.ops.usaf.dequantize_residual.default, (codes, absmax, residual, format))
