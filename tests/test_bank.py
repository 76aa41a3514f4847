"""RowBank: what it copies, from where, and what it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from trained_models import banked_model, every_nth, paged_model
from usaf_ext import _C, RowBank, StoreError, expert_store, ops, paged_layers

pytestmark = pytest.mark.usefixtures("one_thread")

N32 = torch.int32


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return paged_model(tiny_checkpoint)


def neurons(*pairs):
    experts, indices = zip(*pairs)
    return torch.tensor(experts, dtype=N32), torch.tensor(indices, dtype=N32)


@pytest.mark.parametrize("format", ["nf4", "bf16"])
@pytest.mark.parametrize("master_dtype", [torch.bfloat16, torch.float32])
def test_rows_are_the_stores_and_masters_the_originals(tiny_checkpoint, format, master_dtype):
    model = paged_model(tiny_checkpoint, format=format)
    store, source = expert_store(model), model.usaf_originals
    chosen = neurons((0, 3), (0, 23), (2, 0), (5, 11))
    bank = RowBank.from_store(store, 1, chosen, originals=source, master_dtype=master_dtype)
    for i, (expert, neuron) in enumerate(zip(*(t.tolist() for t in chosen))):
        gate, up, down = source.expert(1, expert)
        expected = torch.stack([gate[neuron], up[neuron], down[:, neuron]]).to(master_dtype)
        assert torch.equal(bank.master[i], expected)
        gate, up, down = store.read_expert(1, expert)
        assert torch.equal(bank.decode()[i], torch.stack([gate[neuron], up[neuron], down[:, neuron]]))
    assert bank.trained_rows().dtype == torch.float32
    assert torch.equal(bank.trained_rows(master_dtype), bank.master)
    assert (bank.num_neurons, bank.num_parameters) == (4, 4 * 3 * 72)
    assert bank.nbytes == sum(
        t.numel() * t.element_size()
        for t in (
            bank.codes,
            bank.absmax,
            bank.master,
            bank.grad,
            bank.neuron_expert,
            bank.neuron_index,
            bank.expert_hit,
            bank.grad_squares,
            bank.positions,
        )
    )


def test_in_place_learns_the_codes(model):
    bank = RowBank.from_store(expert_store(model), 0, neurons((1, 1)), originals=model.usaf_originals, mode="in_place")
    assert bank.master is None
    assert torch.equal(bank.trained_rows(), bank.decode())


@pytest.mark.parametrize("format", _C.FORMATS)
def test_a_residual_starts_from_the_originals(tiny_checkpoint, format, caplog):
    model = paged_model(tiny_checkpoint, format=format)
    store, chosen = expert_store(model), neurons((0, 3), (5, 11))
    with caplog.at_level(logging.WARNING, logger="usaf_ext"):
        bank = RowBank.from_store(store, 1, chosen, originals=model.usaf_originals, mode="residual")
    assert not caplog.records
    rows = torch.cat([model.usaf_originals.neurons(1, e, torch.tensor([j])).float() for e, j in ((0, 3), (5, 11))])
    error = (bank.trained_rows() - rows).abs()
    if format == "bf16":
        assert not bank.residual.any()
    else:
        assert float(error.max()) < 0.02 * float((bank.decode() - rows).abs().max())
    without = RowBank.from_store(store, 1, chosen, originals=None, mode="residual")
    assert torch.equal(without.trained_rows(), bank.decode())
    assert bank.residual.dtype == torch.int8
    assert bank.rows.keys() == {"codes", "absmax", "residual"}


def test_placement_host_keeps_the_state_apart(model):
    arguments = {"originals": model.usaf_originals, "mode": "master", "grad_dtype": torch.bfloat16}
    here = RowBank.from_store(expert_store(model), 0, neurons((1, 1), (4, 2)), **arguments)
    there = RowBank.from_store(expert_store(model), 0, neurons((1, 1), (4, 2)), placement="host", **arguments)
    state = sum(tensor.nbytes for tensor in (here.codes, here.absmax, here.master))
    assert there.device_bytes == here.device_bytes - here.master.nbytes
    assert there.host_bytes == here.host_bytes + state
    assert here.grad.dtype == torch.bfloat16
    there.state_codes.add_(1)
    assert torch.equal(there.codes, here.codes)
    there.publish()
    assert torch.equal(there.codes, here.codes + 1)


def test_without_originals_masters_are_the_decoded_codes(model, caplog):
    with caplog.at_level(logging.WARNING, logger="usaf_ext"):
        bank = RowBank.from_store(expert_store(model), 0, neurons((1, 1), (4, 2)), originals=None)
    assert torch.equal(bank.master, bank.decode().bfloat16())
    assert len(caplog.records) == 1
    assert "original" in caplog.text


def test_foreign_originals_are_refused(model):
    other = SimpleNamespace(fingerprint="another", path="somewhere")
    with pytest.raises(StoreError, match="fingerprint another"):
        RowBank.from_store(expert_store(model), 0, neurons((1, 1)), originals=other)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(1, 1), (0, 2)], "sorted"),
        ([(1, 2), (1, 1)], "sorted"),
        ([(1, 1), (1, 1)], "distinct"),
        ([(6, 0)], r"neuron_expert must lie in \[0, 6\)"),
        ([(-1, 0)], "neuron_expert"),
        ([(0, 24)], r"neuron_index must lie in \[0, 24\)"),
    ],
)
def test_bad_neurons(model, pairs, message):
    with pytest.raises(ValueError, match=message):
        RowBank.from_store(expert_store(model), 0, neurons(*pairs))


def test_bad_arguments(model):
    store, good = expert_store(model), neurons((0, 0))
    with pytest.raises(ValueError, match="empty"):
        RowBank.from_store(store, 0, (torch.empty(0, dtype=N32), torch.empty(0, dtype=N32)))
    with pytest.raises(TypeError, match="neuron_expert must be an int32"):
        RowBank.from_store(store, 0, (good[0].long(), good[1]))
    with pytest.raises(ValueError, match="one length"):
        RowBank.from_store(store, 0, (good[0], torch.zeros(2, dtype=N32)))
    with pytest.raises(ValueError, match="layer"):
        RowBank.from_store(store, 2, good)
    with pytest.raises(ValueError, match="mode"):
        RowBank.from_store(store, 0, good, mode="adapter")
    with pytest.raises(ValueError, match="master_dtype"):
        RowBank.from_store(store, 0, good, master_dtype=torch.float16)


def test_constructor_checks_its_tensors(model):
    bank = RowBank.from_store(expert_store(model), 0, neurons((0, 0), (3, 4)), originals=model.usaf_originals)
    good = {
        name: getattr(bank, name)
        for name in [
            "layer",
            "format",
            "mode",
            "num_experts",
            "hidden_size",
            "intermediate_size",
            "neuron_expert",
            "neuron_index",
            "codes",
            "absmax",
            "master",
        ]
    }
    RowBank(**good)
    for change, error, message in [
        ({"codes": bank.codes[:1]}, ValueError, "codes must have shape"),
        ({"absmax": bank.absmax.double()}, TypeError, "absmax must be"),
        ({"master": bank.master.half()}, TypeError, "master must be"),
        ({"master": None}, ValueError, "needs a master|needs master"),
        ({"mode": "in_place"}, ValueError, "has no master"),
        ({"mode": "residual", "master": None}, ValueError, "needs residual"),
        ({"residual": torch.zeros(2, 3, 72, dtype=torch.int8)}, ValueError, "has no residual"),
        ({"mode": "residual", "master": None, "residual": bank.codes}, TypeError, "residual must be"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"placement": "disk"}, ValueError, "placement"),
        ({"grad_dtype": torch.float16}, ValueError, "grad_dtype"),
        ({"grad_buffer": torch.zeros(2 * 3 * 72 - 1)}, ValueError, "grad_buffer must be"),
        ({"grad_buffer": torch.zeros(2 * 3 * 72).double()}, TypeError, "grad_buffer must be"),
        ({"format": "int3"}, ValueError, "format"),
    ]:
        with pytest.raises(error, match=message):
            RowBank(**{**good, **change})


def test_the_model_computes_with_the_bank(tiny_checkpoint):
    """Rows written into the bank take effect; the same rows written into the dense experts give the same output."""
    model = banked_model(tiny_checkpoint)
    layer = paged_layers(model)[0]
    x, index = torch.randn(10, 72), torch.stack([torch.arange(10) % 6, (torch.arange(10) + 1) % 6], dim=1)
    weights = torch.rand(10, 2)
    untouched = layer(x, index, weights)
    bank = layer.bank
    rows = torch.randn(bank.num_neurons, 3, 72)
    codes, absmax = ops.quantize_blocks(rows, "nf4")
    bank.codes.copy_(codes)
    bank.absmax.copy_(absmax)
    changed = layer(x, index, weights)
    assert not torch.allclose(changed, untouched, atol=1e-3)

    matrices = [torch.stack(m).double() for m in zip(*(expert_store(model).read_expert(0, e) for e in range(6)))]
    gate, up, down = matrices
    at = bank.neuron_expert.long(), bank.neuron_index.long()
    decoded = bank.decode().double()
    gate[at], up[at] = decoded[:, 0], decoded[:, 1]
    down[at[0], :, at[1]] = decoded[:, 2]
    expected = torch.zeros(10, 72, dtype=torch.float64)
    for t in range(10):
        for k in range(2):
            e, v = index[t, k], x[t].double()
            h = torch.nn.functional.silu(gate[e] @ v) * (up[e] @ v)
            expected[t] += weights[t, k].double() * (down[e] @ h)
    torch.testing.assert_close(changed.double(), expected, rtol=1e-4, atol=1e-4)


def test_every_nth_selection_is_what_it_says(model):
    selection = every_nth(model)
    assert selection.num_neurons == pytest.approx(selection.num_candidates / 5, abs=1)
