"""8-bit moments: bitsandbytes' map, codes and values, blocks of 256 along the row, and their arguments."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from adam_oracles import HYPER, decode_moments, encode_moments, moment_map
from devices import cpu_only, opcheck, ops
from torch import Tensor

pytestmark = pytest.mark.usefixtures("device")


def _quantize(values: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Codes and absmax of `values` as exp_avg and of their squares as exp_avg_sq: a step without memory stores them."""
    exp_avg, exp_avg_absmax = ops.empty_moments8(values.shape)
    exp_avg_sq, exp_avg_sq_absmax = ops.empty_moments8(values.shape)
    codes, absmax = ops.quantize_blocks(torch.zeros(values.shape), "int8")
    hyper = {**HYPER, "beta1": 0.0, "beta2": 0.0}
    step = torch.zeros(len(values), dtype=torch.int32)
    ops.masked_adam_(
        codes,
        absmax,
        exp_avg,
        exp_avg_sq,
        step,
        values,
        **hyper,
        format="int8",
        mode="in_place",
        exp_avg_absmax=exp_avg_absmax,
        exp_avg_sq_absmax=exp_avg_sq_absmax,
    )
    return (exp_avg, exp_avg_absmax), (exp_avg_sq, exp_avg_sq_absmax)


def _beside_bounds(signed: bool) -> Tensor:
    """Rows of 256 whose absmax is 1: every bound between two codes and its neighbours among the floats."""
    values = moment_map(signed)
    bound = (values[:-1] + values[1:]) / 2
    rows = []
    for direction in (-2.0, 2.0):
        shifted = bound.clone()
        for _ in range(4):
            rows.append(shifted)
            shifted = torch.nextafter(shifted, torch.tensor(direction))
    return torch.cat((torch.stack(rows), torch.ones(len(rows), 1)), 1)


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_that_of_bitsandbytes(signed):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(ops.dequantize_moments8(codes, torch.ones(1, 1), signed)[0], bnb.create_dynamic_map(signed))


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_codes_are_those_of_bitsandbytes(isa, scale):
    """Of its implementation in torch, which CPU tensors of other types than fp32, bf16 and fp16 take. (Its native one
    for those looks codes up in 2^16 bins, in which a zero is none.)"""
    values = torch.randn(64, 1024) * 10 ** torch.randint(-5, 1, (64, 1024)).float() * scale
    for (codes, absmax), x, signed in zip(_quantize(values), (values, values * values), (True, False), strict=True):
        expected, expected_absmax = torch.ops.bitsandbytes.quantize_blockwise(
            x.double(), bnb.create_dynamic_map(signed), 256
        )
        assert torch.equal(codes, expected)
        assert torch.equal(absmax.flatten(), expected_absmax)
        decoded = bnb.dequantize_blockwise(codes, absmax=absmax.flatten(), code=moment_map(signed), blocksize=256)
        assert torch.equal(ops.dequantize_moments8(codes, absmax, signed), decoded)


@pytest.mark.parametrize("cols", [1, 31, 32, 256, 257, 1000])
def test_bits_of_the_formula(isa, cols):
    values = torch.randn(9, cols) * 10 ** torch.randint(-9, 3, (9, 1)).float()
    values[0] = 0.0
    values[1] = 1e-42  # 1 / absmax would be infinite
    values[2, ::2] = 0.0
    for (codes, absmax), x, signed in zip(_quantize(values), (values, values * values), (True, False), strict=True):
        expected, expected_absmax = encode_moments(x, signed)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, expected_absmax)
        decoded = ops.dequantize_moments8(codes, absmax, signed)
        assert torch.equal(decoded, decode_moments(codes, absmax, signed))
        assert (decoded[0] == 0).all()


def test_codes_beside_every_bound(isa):
    values = _beside_bounds(True)
    (codes, _), _ = _quantize(values)
    assert torch.equal(codes, encode_moments(values, True)[0])
    values = _beside_bounds(False).sqrt()  # its squares lie on both sides of the bounds
    _, (codes, _) = _quantize(values)
    assert torch.equal(codes, encode_moments(values * values, False)[0])


def test_not_a_number_spreads_over_its_block_alone(isa):
    values = torch.randn(2, 512)
    values[0, 300] = float("nan")
    values[1, 5] = float("inf")
    (codes, absmax), _ = _quantize(values)
    decoded = ops.dequantize_moments8(codes, absmax, True)
    assert not decoded[0, 256:].isfinite().any()
    assert not decoded[1, :256].isfinite().any()
    assert decoded[0, :256].isfinite().all()
    assert decoded[1, 256:].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 300), (2, 4, 256), (0, 5), (3, 0)])
def test_empty_moments_are_zeros(shape):
    codes, absmax = ops.empty_moments8(shape)
    assert codes.shape == shape
    assert absmax.shape == (*shape[:-1], -(-shape[-1] // 256))
    for signed in (True, False):
        assert (ops.dequantize_moments8(codes, absmax, signed) == 0).all()


def test_opcheck():
    codes, absmax = torch.randint(0, 256, (2, 3, 300), dtype=torch.uint8), torch.rand(2, 3, 2)
    opcheck(torch.ops.usaf.dequantize_moments8.default, (codes, absmax, True))


@cpu_only
def test_bad_arguments():
    codes, absmax = ops.empty_moments8((3, 300))
    for error, match, arguments in [
        (TypeError, "codes: expected a torch.Tensor", (None, absmax, True)),
        (TypeError, "codes: expected Byte", (codes.int(), absmax, True)),
        (TypeError, "absmax: expected Float", (codes, absmax.half(), True)),
        (ValueError, "absmax: expected shape", (codes, absmax[:, :1], True)),
        (ValueError, "codes: expected shape", (codes[0, 0], absmax, True)),
        (TypeError, "signed: expected a bool", (codes, absmax, 1)),
    ]:
        with pytest.raises(error, match=match):
            ops.dequantize_moments8(*arguments)
    for error, match, shape in [
        (ValueError, "shape", (3,)),
        (ValueError, "shape", (3, -1)),
        (TypeError, "shape", 3),
        (TypeError, "shape", (3, 2.0)),
    ]:
        with pytest.raises(error, match=match):
            ops.empty_moments8(shape)
