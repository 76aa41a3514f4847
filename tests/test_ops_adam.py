"""masked_adam_: bit for bit against the formula in plain fp32 torch, against float64 and torch.optim.AdamW; skipped
rows; noise that no cut or thread count changes; its arguments. What the modes are for is in test_adam_modes.py."""

from __future__ import annotations

import oracles
import pytest
import torch
from adam_oracles import FORMATS, HYPER, MODES, Rows, expected_step, float64_step
from devices import cpu_only, opcheck, ops

pytestmark = pytest.mark.usefixtures("device")


@cpu_only
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


# mode, master_dtype, stochastic
VARIANTS = [
    ("master", torch.float32, True),
    ("master", torch.bfloat16, True),
    ("residual", torch.float32, True),
    ("in_place", torch.float32, True),
    ("in_place", torch.float32, False),
    ("eco", torch.float32, True),
    ("eco", torch.float32, False),
]


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "master_dtype", "stochastic"), VARIANTS)
@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_the_formula(isa, format, mode, master_dtype, stochastic, grad_dtype, moments):
    """The same bits whatever the instruction set."""
    for cols in (1, 5, 64, 65, 200, 330):
        rows = Rows.make(5, cols, format, mode, master_dtype, moments)
        rows.step += torch.arange(5, dtype=torch.int32) * 3
        noise = {"stochastic": stochastic, "seed": 2**40 + 17, "first_element": 3}
        for _ in range(3):
            grad = (torch.randn(5, cols) * torch.tensor([1.0, 1e-3, 1e-6, 0.0, 1e4])[:, None]).to(grad_dtype)
            expected = expected_step(rows, grad, **noise)
            rows.apply(grad, **noise)
            assert rows.same_as(expected), cols


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "master_dtype", "stochastic"), VARIANTS)
@pytest.mark.parametrize("format", FORMATS)
def test_against_float64(format, mode, master_dtype, stochastic, grad_dtype, moments):
    rows = Rows.make(6, 330, format, mode, master_dtype, moments)
    for _ in range(2):
        rows.apply(torch.randn(6, 330).to(grad_dtype), stochastic=stochastic)
    grad = torch.randn(6, 330).to(grad_dtype)
    weight, exp_avg, exp_avg_sq, size = float64_step(rows, grad)
    rows.apply(grad, stochastic=stochastic)
    if mode == "master":
        tolerance = 2**-8 if master_dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(rows.master.double(), weight, rtol=tolerance, atol=1e-7)
    elif mode == "residual":
        assert ((rows.weight().double() - weight).abs() <= 0.51 * rows.unit() + 1e-7).all()
    else:  # to one of the codes around it, the nearer one unless stochastic
        reach = rows.unit().double() * 127 * (2 if stochastic else 1)
        assert ((rows.decode().double() - weight).abs() <= reach * 1.001 + 1e-7).all()
    if mode == "eco":
        keep = 1 - HYPER["lr"] * HYPER["weight_decay"]
        exp_avg = exp_avg + keep / size * (1 - 1 / HYPER["beta1"]) * (weight - rows.decode().double())
    for got, expected in zip(rows.moments(), (exp_avg, exp_avg_sq), strict=True):
        scale = expected.abs().amax(-1, keepdim=True)
        tolerance = 0.01 if moments == "8bit" else 1e-5
        assert ((got.double() - expected).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_skipped_rows_keep_every_bit(format, mode, moments):
    rows = Rows.make(8, 70, format, mode, moments=moments)
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


@pytest.mark.parametrize("cols", [6, 70])  # a short block alone, and one behind a full one
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", FORMATS)
def test_changed_tells_whether_a_stored_bit_changed(format, mode, cols):
    rows, changed = Rows.make(3, cols, format, mode), torch.zeros(1, dtype=torch.int32)
    # Every weight stands on its code, the largest code in each block: a step without lr rounds nothing, even
    # stochastically.
    weight = oracles.NF4[torch.arange(cols) % 16].expand(3, cols).clone()
    if not format.startswith("nf4"):
        weight = weight.sign()
    codes, absmax = ops.quantize_blocks(weight, format)
    rows.codes.copy_(codes)
    rows.absmax.copy_(absmax)
    if mode == "master":
        rows.master.copy_(rows.decode())
    if mode == "residual":
        rows.residual.zero_()
    rows.apply(torch.randn(3, cols), lr=0.0, weight_decay=0.0, changed=changed)
    assert changed.item() == 0
    rows.apply(torch.randn(3, cols), lr=0.5, changed=changed)
    assert changed.item() == 1
    rows.apply(torch.randn(3, cols), lr=0.0, changed=changed)
    assert changed.item() == 1  # never cleared


@pytest.mark.parametrize(("mode", "cols"), [("master", 64), ("master", 70), ("residual", 64), ("residual", 70)])
def test_a_change_beside_the_codes_alone_counts(mode, cols):
    rows, changed = Rows.make(1, cols, mode=mode), torch.zeros((), dtype=torch.int32)
    if mode == "residual":
        rows.residual.zero_()
    codes, absmax = rows.codes.clone(), rows.absmax.clone()
    grad = torch.zeros(1, cols)
    grad[0, rows.weight()[0, :64].abs().argmin()] = 1.0
    rows.apply(grad, lr=1e-7 if mode == "master" else 1e-4, weight_decay=0.0, changed=changed)
    assert torch.equal(rows.codes, codes)
    assert torch.equal(rows.absmax, absmax)
    assert changed.item() == 1


@pytest.mark.parametrize("mode", ["in_place", "eco"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_bank_cut_in_pieces_rounds_the_same(format, mode):
    whole, grad = Rows.make(6, 70, format, mode), torch.randn(6, 70)
    pieces = whole.clone()
    whole.apply(grad, seed=5)
    for first, last in [(0, 1), (1, 4), (4, 6)]:
        part = pieces.map(lambda value, first=first, last=last: value[first:last])
        part.apply(grad[first:last], seed=5, first_element=first * 70)
    assert pieces.same_as(whole)


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_leading_dimensions(moments):
    flat, grad = Rows.make(6, 70, moments=moments), torch.randn(6, 70)
    shaped = flat.map(lambda value: value.clone().unflatten(0, (2, 3)))
    flat.apply(grad)
    shaped.apply(grad.unflatten(0, (2, 3)))
    assert shaped.map(lambda value: value.flatten(0, 1)).same_as(flat)


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 70), (3, 0)])
def test_empty(shape, mode, moments):
    rows = Rows.make(*shape, mode=mode, moments=moments)
    rows.apply(torch.zeros(shape))
    assert rows.step.tolist() == [1] * shape[0]


@cpu_only
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(mode, moments):
    grad = torch.randn(64, 1000)

    def run():
        rows = Rows.make(64, 1000, "nf4", mode, moments=moments)
        rows.apply(grad, seed=3)
        return list(rows.tensors().values())

    assert oracles.same_for_any_threads(run)


@cpu_only
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


@cpu_only
def test_bad_arguments_of_modes_and_moments():
    grad = torch.randn(4, 300)
    residual = Rows.make(4, 300, mode="residual", moments="8bit")
    eco = Rows.make(4, 300, mode="eco")
    absmax = residual.exp_avg_absmax
    bad = [
        (residual, ValueError, "residual", None, "expected a tensor in mode 'residual', got None"),
        (residual, TypeError, "residual", residual.residual.view(torch.uint8), "expected Char"),
        (residual, ValueError, "residual", residual.residual[:, :299], "expected shape"),
        (residual, ValueError, "residual", residual.residual.t().contiguous().t(), "contiguous"),
        (residual, ValueError, "master", torch.zeros(4, 300), "expected None in mode 'residual'"),
        (residual, ValueError, "exp_avg_absmax", None, "expected a tensor for 8-bit exp_avg"),
        (residual, ValueError, "exp_avg_sq_absmax", None, "expected a tensor for 8-bit exp_avg_sq"),
        (residual, ValueError, "exp_avg_absmax", absmax[:, :1], "expected shape"),
        (residual, TypeError, "exp_avg_sq_absmax", absmax.double(), "expected Float"),
        (residual, TypeError, "exp_avg_absmax", 1.0, "expected a torch.Tensor"),
        (residual, TypeError, "exp_avg", residual.exp_avg.float(), "expected Byte"),
        (residual, TypeError, "exp_avg_sq", residual.exp_avg_sq.float(), "expected Byte"),
        (eco, ValueError, "exp_avg", residual.exp_avg, ""),
        (eco, ValueError, "residual", residual.residual, "expected None in mode 'eco'"),
        (eco, ValueError, "beta1", 0.0, "expected more than 0 in mode 'eco'"),
        (eco, TypeError, "stochastic", 1, "expected a bool"),
        (eco, TypeError, "grad", grad.half(), "expected Float or BFloat16"),
    ]
    for rows, error, argument, value, message in bad:
        before = rows.clone()
        good = {**rows.tensors(), "grad": grad, **HYPER, "format": "nf4", "mode": rows.mode}
        with pytest.raises(error, match=f"{argument}.*{message}"):
            ops.masked_adam_(**{**good, argument: value})
        assert rows.same_as(before)


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_opcheck(format, mode, moments):
    rows, changed = Rows.make(4, 70, format, mode, moments=moments), torch.zeros((), dtype=torch.int32)
    options = {**HYPER, **rows.tensors(), "changed": changed}
    options.update(active=torch.tensor([True, False, True, True]), grad_scale=torch.ones(()), seed=1)
    arguments = tuple(options.pop(name) for name in ("codes", "absmax", "exp_avg", "exp_avg_sq", "step"))
    opcheck(torch.ops.usaf.masked_adam_.default, (*arguments, torch.randn(4, 70), format, mode), options)
