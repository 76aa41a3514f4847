"""The codec's numbers: 16-bit and fp8 conversions exhaustively, both roundings, and every instruction set."""

from __future__ import annotations

import codec_oracles as oracles
import native_codec as native
import pytest
import torch

FORMATS, BLOCK_FORMATS, DTYPES = oracles.FORMATS, oracles.BLOCK_FORMATS, oracles.DTYPES


def awkward(rows: int, cols: int, dtype: torch.dtype = torch.float32, scale: float = 0.02) -> torch.Tensor:
    """Random rows with zero blocks, subnormals, one-value blocks and both signs of zero among them."""
    weight = torch.randn(rows, cols) * scale
    weight[1::8] = 0.0
    weight[2::8, ::3] = -0.0
    weight[3::8] *= 1e-39
    weight[4::8] = weight[4::8].sign() * scale
    weight[5::8] *= torch.exp2(-torch.arange(cols) / 2.0)
    weight[6::8] *= 1e-6
    return weight.to(dtype)


def test_every_half_is_its_float():
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    out = torch.empty(65536)
    native.call("from_halves", halves, 65536, out)
    assert torch.equal(out.isnan(), halves.isnan())
    real = ~halves.isnan()
    assert torch.equal(out[real].view(torch.int32), halves[real].float().view(torch.int32))


def test_floats_to_halves():
    # Around every half and every middle between two, and anything else.
    finite = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    middle = (finite[1:] + finite[:-1]) / 2
    edges = torch.cat((finite, middle, torch.tensor([65519.996, 65520.0, 65536.0, 3e38, float("inf"), 1e-45])))
    up, down = (torch.nextafter(edges, torch.tensor(to)) for to in (float("inf"), 0.0))
    values = torch.cat((edges, up, down))
    values = torch.cat((values, -values, torch.tensor([float("nan")])))
    out = torch.empty(len(values), dtype=torch.float16)
    native.call("to_halves", values, len(values), out)
    assert out[-1].isnan()
    assert torch.equal(out[:-1].view(torch.int16), values[:-1].half().view(torch.int16))
    positive = torch.cat((edges, up, down))
    out = torch.empty(len(positive), dtype=torch.float16)
    native.call("to_halves_up", positive, len(positive), out)
    assert torch.equal(out.view(torch.int16), oracles.half_at_least(positive).view(torch.int16))
    assert (out.float() >= positive).all()


def test_every_fp8_code():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    out = torch.empty(256)
    native.call("from_fp8", codes, 256, out)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.isnan(), expected.isnan())
    real = ~expected.isnan()
    assert torch.equal(out[real].view(torch.int32), expected[real].view(torch.int32))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_equal_oracle(format, dtype, isa):
    with native.only(isa):
        for cols in (1, 2, 63, 64, 65, 128, 200, 1030):
            weight = awkward(16, cols, dtype)
            codes, absmax = native.encode_rows(format, weight)
            expected, expected_absmax = oracles.encode(weight, format)
            assert torch.equal(codes, expected)
            assert torch.equal(absmax, expected_absmax)
            for out in DTYPES:
                decoded = native.decode_rows(format, out, codes, absmax, cols)
                wanted = oracles.decode(codes, absmax, cols, format).to(out)
                assert torch.equal(decoded.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(
    ("format", "dtype"), [("nf4", torch.float32), ("int8", torch.bfloat16), ("bf16", torch.bfloat16)]
)
def test_results_too_large_for_the_caches(format, dtype, isa):
    """They are stored past the caches where rows are aligned (2048 columns), and as usual where not (2024)."""
    for cols in (2048, 2024):
        rows = (17 << 20) // oracles.code_bytes(format, cols)
        weight = (torch.randn(64, cols) * 0.02).to(dtype).repeat(-(-rows // 64), 1)
        with native.only(isa):
            codes, absmax = native.encode_rows(format, weight)
            decoded = native.decode_rows(format, dtype, codes, absmax, cols)
        expected, expected_absmax = oracles.encode(weight[:64], format)
        wanted = oracles.decode(expected, expected_absmax, cols, format).to(dtype)
        for got, part in ((codes, expected), (absmax, expected_absmax), (decoded, wanted)):
            assert all(torch.equal(piece, part[: len(piece)]) for piece in got.split(64))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_around_every_bound(format, isa):
    """Middles between neighbouring codes, one step to either side, with the block's largest weight 1 (or the step)."""
    if format.startswith("nf4"):
        table = oracles.NF4
    else:
        table = torch.arange(-127.0, 128.0) if format == "int8" else torch.cat((-oracles.FP8.flip(0), oracles.FP8))
    middle = (table[1:] + table[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (1e9, -1e9)]
    values = torch.cat((table, middle, *near))
    largest = table.abs().max()
    weight = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    weight = torch.cat((largest.expand(len(weight), 1), weight), 1).contiguous()
    with native.only(isa):
        codes, absmax = native.encode_rows(format, weight)
    expected, expected_absmax = oracles.encode(weight, format)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("count", [1, 17, 63, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_blocks_equal_oracle(format, count, isa):
    random = torch.randint(2**32, (32, count))
    random[::5, 0], random[1::5, 0] = 0, 2**32 - 1
    with native.only(isa):
        for row, noise in zip(awkward(32, count), random):
            codes, absmax = native.encode_block(format, row, noise)
            if format == "bf16":
                expected = ((row.view(torch.int32).long() + (noise & 0xFFFF)) >> 16).to(torch.int16).view(torch.uint8)
            else:
                expected, expected_absmax = (part[0] for part in oracles.encode(row[None], format, noise[None]))
                assert torch.equal(absmax, expected_absmax)
            assert torch.equal(codes, expected[: len(codes)])
            decoded = native.decode_block(format, codes, absmax, count)
            padded = torch.nn.functional.pad(codes, (0, oracles.code_bytes(format, count) - len(codes)))
            blocks = absmax[None, : oracles.num_blocks(format, count)]
            assert torch.equal(decoded, oracles.decode(padded[None], blocks, count, format)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_rounding_is_unbiased_between_neighbours(format):
    draws, weight = 3000, torch.randn(64) * 0.02
    if format == "fp8":
        weight[32:] *= 1e-3  # subnormal codes too
    nearest = native.decode_block(format, *native.encode_block(format, weight), 64)
    values = torch.stack(
        [
            native.decode_block(format, *native.encode_block(format, weight, torch.randint(2**32, (64,))), 64)
            for _ in range(draws)
        ]
    ).double()
    assert all(len(column.unique()) <= 2 for column in values.T)
    low, high = values.amin(0), values.amax(0)
    # Up to the rounding of scale and product themselves.
    slack = 2**-22 * weight.abs().max()
    assert (low <= weight + slack).all()
    assert (high >= weight - slack).all()
    error = (values.mean(0) - weight.double()).abs()
    assert (error <= 5 * (high - low) / 2 / draws**0.5 + slack).all()
    assert ((values - weight).abs().amax(0) >= (nearest - weight).abs() - slack).all()


def test_nf4_f16_scale_never_clips():
    weight = torch.rand(4096, 64) * torch.exp2(torch.randint(-30, 15, (4096, 1)).float())
    _, absmax = native.encode_rows("nf4_f16", weight)
    largest = weight.amax(1)
    assert (absmax[:, 0].float() >= largest).all()
    normal = largest > 2**-14
    assert (absmax[normal, 0].float() <= largest[normal] * (1 + 2**-10)).all()


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_blocks_without_a_number_decode_to_none(format):
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(64)
        weight[5] = bad
        decoded = native.decode_block(format, *native.encode_block(format, weight), 64)
        assert not decoded.isfinite().any()
