"""quantize_blocks, dequantize_blocks, quantize_rows_: NF4 bytes equal bitsandbytes, everything the documented rules."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import codec_oracles
import oracles
import pytest
import torch
from devices import cpu_only, opcheck, ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = codec_oracles.FORMATS
COLS = [1, 2, 7, 63, 64, 65, 127, 128, 200, 2048]


def awkward(rows: int, cols: int, seed: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Random rows with zero blocks, subnormals, one-value blocks and both signs of zero among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * scale
    weight[1::7] = 0.0
    weight[2::7, ::3] = -0.0
    weight[3::7] *= 1e-39
    weight[4::7] = weight[4::7].sign() * scale
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 0.02, 1.0, 1e4, 3e37])
@pytest.mark.parametrize("seed", range(4))
def test_nf4_equals_bitsandbytes(dtype, scale, seed):
    if dtype == torch.float16 and scale > 1e4:
        pytest.skip("not a float16")
    weight = awkward(28, 512, seed, scale, dtype)
    codes, absmax = ops.quantize_blocks(weight, "nf4")
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codes.flatten(), expected.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)


def test_nf4_equals_bitsandbytes_around_every_threshold():
    middle = (oracles.NF4[:-1] + oracles.NF4[1:]) / 2
    near = [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))]
    weight = torch.cat([*near, oracles.NF4, torch.tensor([1.0, -1.0, 1.0])])
    assert weight.numel() == 64
    codes, _ = ops.quantize_blocks(weight, "nf4")
    expected, _ = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codes, expected.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("format", FORMATS)
def test_rule_at_any_size(format, cols, dtype):
    weight = awkward(21, cols, 5, 0.02, dtype)
    codes, absmax = ops.quantize_blocks(weight, format)
    expected, expected_absmax = codec_oracles.encode(weight, format)
    assert absmax.dtype == ops.scale_dtype(format)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)
    for out in DTYPES:
        decoded = ops.dequantize_blocks(codes, absmax, cols, format, dtype=out)
        assert decoded.dtype == out
        assert torch.equal(decoded, codec_oracles.decode(codes, absmax, cols, format).to(out))


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_within_half_a_step(format):
    weight = torch.randn(50, 640) * 0.02
    codes, absmax = ops.quantize_blocks(weight, format)
    error = (ops.dequantize_blocks(codes, absmax, 640, format).double() - weight.double()).abs()
    if format == "bf16":
        bound = weight.double().abs() * 2**-8
    else:
        largest = oracles.to_blocks(weight.double()).abs().amax(-1).repeat_interleave(64, -1)
        half_step = {"nf4": 0.1519036, "nf4_f16": 0.1519036 * 1.001, "int8": 0.5 / 127, "fp8": 16 / 448}[format]
        bound = largest * half_step * (1 + 1e-6)
    assert (error <= bound).all()
    assert (error > 0.2 * bound).any()


@pytest.mark.parametrize("format", FORMATS)
def test_decoded_codes_encode_to_themselves(format):
    codes, absmax = ops.quantize_blocks(torch.randn(20, 200), format)
    again, again_absmax = ops.quantize_blocks(ops.dequantize_blocks(codes, absmax, 200, format), format)
    assert torch.equal(again, codes)
    torch.testing.assert_close(again_absmax, absmax, rtol=2**-22, atol=0)


def test_nf4_zero_block_is_code_seven():
    codes, absmax = ops.quantize_blocks(torch.zeros(1, 64), "nf4")
    assert codes.unique().tolist() == [0x77]
    assert absmax.item() == 0.0
    assert not ops.dequantize_blocks(codes, absmax, 64, "nf4").any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_equals_bitsandbytes(dtype):
    weight = awkward(28, 512, 3, 0.02, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax = packed.view(28, 256), state.absmax.view(28, 8)
    decoded = ops.dequantize_blocks(codes, absmax, 512, "nf4", dtype=dtype)
    assert torch.equal(decoded, bnb.dequantize_4bit(packed, state).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
def test_bf16_round_trip(cols, dtype):
    weight = awkward(9, cols, 1, 0.02, dtype)
    codes, absmax = ops.quantize_blocks(weight, "bf16")
    assert absmax.shape == (9, 0)
    assert torch.equal(codes, oracles.pack_bf16(weight))
    assert torch.equal(ops.dequantize_blocks(codes, absmax, cols, "bf16", dtype=dtype), weight.bfloat16().to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 5), (70,), (2, 3, 70)])
def test_leading_dimensions_and_empties(format, shape):
    weight = torch.randn(shape)
    codes, absmax = ops.quantize_blocks(weight, format)
    assert codes.shape[:-1] == absmax.shape[:-1] == torch.Size(shape[:-1])
    decoded = ops.dequantize_blocks(codes, absmax, shape[-1], format)
    flat_codes, flat_absmax = ops.quantize_blocks(weight.reshape(-1, shape[-1]) if weight.numel() else weight, format)
    assert torch.equal(codes.flatten(), flat_codes.flatten())
    assert torch.equal(absmax.flatten(), flat_absmax.flatten())
    assert decoded.shape == torch.Size(shape)


def test_strided_weight():
    weight = torch.randn(70, 33).t()
    for got, expected in zip(ops.quantize_blocks(weight, "nf4"), ops.quantize_blocks(weight.contiguous(), "nf4")):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(format, dtype):
    codes, absmax = ops.quantize_blocks(torch.randn(11, 70), format)
    before, before_absmax = codes.clone(), absmax.clone()
    rows, weight = torch.tensor([7, 0, 10]), torch.randn(3, 70).to(dtype)
    ops.quantize_rows_(codes, absmax, rows, weight, format)
    expected, expected_absmax = ops.quantize_blocks(weight, format)
    before[rows], before_absmax[rows] = expected, expected_absmax
    assert torch.equal(codes, before)
    assert torch.equal(absmax, before_absmax)
    picked = torch.tensor([3, 3, 10])
    whole = ops.dequantize_blocks(codes, absmax, 70, format)
    assert torch.equal(ops.dequantize_blocks(codes, absmax, 70, format, rows=picked), whole[picked])
    assert ops.dequantize_blocks(codes, absmax, 70, format, rows=picked[:0]).shape == (0, 70)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_weights(bad, dtype, format):
    weight = torch.randn(3, 70, dtype=dtype)
    weight[1, 5] = weight[2, 1] = bad
    with pytest.raises(ValueError, match=r"weight.*flat index 75"):
        ops.quantize_blocks(weight, format)
    codes, absmax = ops.quantize_blocks(torch.ones(3, 70), format)
    before = codes.clone()
    with pytest.raises(ValueError, match=r"weight.*flat index 75"):
        ops.quantize_rows_(codes, absmax, torch.arange(3), weight, format)
    assert torch.equal(codes, before)


def test_scales_that_overflow_float16():
    weight = torch.randn(2, 70)
    weight[1, 3] = -65505.0
    with pytest.raises(ValueError, match=r"weight.*65504.*fp16.*-65505 at flat index 73"):
        ops.quantize_blocks(weight, "nf4_f16")
    codes, absmax = ops.quantize_blocks(weight.clamp(-65504, 65504), "nf4_f16")
    before = codes.clone()
    assert absmax.max() == 65504
    with pytest.raises(ValueError, match=r"weight.*flat index 73"):
        ops.quantize_rows_(codes, absmax, torch.arange(2), weight, "nf4_f16")
    assert torch.equal(codes, before)


@cpu_only
def test_bad_arguments():
    weight = torch.randn(4, 70)
    codes, absmax = ops.quantize_blocks(weight, "nf4")
    before = codes.clone()
    rows = torch.tensor([0, 1])
    quantize, dequantize, in_place = ops.quantize_blocks, ops.dequantize_blocks, ops.quantize_rows_
    for error, argument, call in [
        (TypeError, "weight", lambda: quantize([1.0], "nf4")),
        (TypeError, "weight", lambda: quantize(weight.double(), "nf4")),
        (TypeError, "format", lambda: quantize(weight, 4)),
        (ValueError, "format.*'bf16', 'nf4'.*'int3'", lambda: quantize(weight, "int3")),
        (ValueError, "weight", lambda: quantize(torch.tensor(1.0), "nf4")),
        (TypeError, "codes", lambda: dequantize(codes.int(), absmax, 70, "nf4")),
        (ValueError, "codes", lambda: dequantize(codes, absmax, 200, "nf4")),
        (ValueError, "cols", lambda: dequantize(codes, absmax, -1, "nf4")),
        (TypeError, "cols", lambda: dequantize(codes, absmax, 70.0, "nf4")),
        (TypeError, "absmax", lambda: dequantize(codes, absmax.double(), 70, "nf4")),
        (TypeError, "absmax", lambda: dequantize(codes, absmax.half(), 70, "nf4")),
        (TypeError, "absmax", lambda: dequantize(codes, absmax, 70, "nf4_f16")),
        (TypeError, "absmax", lambda: in_place(codes, absmax, rows, weight[:2], "nf4_f16")),
        (ValueError, "format", lambda: ops.scale_dtype("int3")),
        (ValueError, "absmax", lambda: dequantize(codes, absmax[:, :1], 70, "nf4")),
        (ValueError, "format", lambda: dequantize(codes, absmax, 70, "nf5")),
        (TypeError, "dtype", lambda: dequantize(codes, absmax, 70, "nf4", dtype=torch.float64)),
        (TypeError, "dtype", lambda: dequantize(codes, absmax, 70, "nf4", dtype="float32")),
        (ValueError, "rows.*4.*position 1", lambda: dequantize(codes, absmax, 70, "nf4", rows=torch.tensor([0, 4]))),
        (ValueError, "rows", lambda: dequantize(codes, absmax, 70, "nf4", rows=torch.tensor([-1]))),
        (TypeError, "rows", lambda: dequantize(codes, absmax, 70, "nf4", rows=torch.tensor([0], dtype=torch.int32))),
        (ValueError, "codes", lambda: dequantize(codes[None], absmax[None], 70, "nf4", rows=rows)),
        (ValueError, "rows.*twice", lambda: in_place(codes, absmax, torch.tensor([1, 1]), weight[:2], "nf4")),
        (ValueError, "rows", lambda: in_place(codes, absmax, torch.tensor([1, 9]), weight[:2], "nf4")),
        (ValueError, "weight", lambda: in_place(codes, absmax, rows, weight[:1], "nf4")),
        (ValueError, "codes", lambda: in_place(codes, absmax, rows, torch.randn(2, 200), "nf4")),
        (
            ValueError,
            "codes.*contiguous",
            lambda: in_place(codes.t().contiguous().t(), absmax, rows, weight[:2], "nf4"),
        ),
        (TypeError, "weight", lambda: in_place(codes, absmax, rows, weight[:2].double(), "nf4")),
    ]:
        with pytest.raises(error, match=argument):
            call()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    weight = torch.randn(4, 70)
    codes, absmax = ops.quantize_blocks(weight, format)
    rows = torch.tensor([2, 0])
    opcheck(torch.ops.usaf.quantize_blocks.default, (weight, format))
    opcheck(torch.ops.usaf.dequantize_blocks.default, (codes, absmax, 70, format, torch.bfloat16))
    opcheck(torch.ops.usaf.dequantize_blocks.default, (codes, absmax, 70, format, torch.float32, rows))
    opcheck(torch.ops.usaf.quantize_rows_.default, (codes, absmax, rows, weight[:2].clone(), format))


def test_refuses_to_be_differentiated():
    weight = torch.randn(2, 64, requires_grad=True)
    _, absmax = ops.quantize_blocks(weight, "nf4")
    with pytest.raises(RuntimeError, match="quantize_blocks is not implemented"):
        absmax.sum().backward()
    codes, absmax = ops.quantize_blocks(weight.detach(), "nf4")
    decoded = ops.dequantize_blocks(codes, absmax.requires_grad_(), 64, "nf4")
    with pytest.raises(RuntimeError, match="dequantize_blocks is not implemented"):
        decoded.sum().backward()


@cpu_only
def test_same_bits_for_any_thread_count():
    weight = torch.randn(256, 2048)

    def run():
        codes, absmax = ops.quantize_blocks(weight, "nf4")
        return codes, absmax, ops.dequantize_blocks(codes, absmax, 2048, "nf4", dtype=torch.bfloat16)

    assert oracles.same_for_any_threads(run)
