"""Every weight format through store, folder, bank, expert layer and command line: one set of values everywhere."""

from __future__ import annotations

import codec_oracles
import pytest
import torch
from usaf_ext import _C, RowBank, ops
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.cli import main
from usaf_ext.experts import PagedExperts
from usaf_ext.store import ExpertStore

EXPERTS, HIDDEN, INTERMEDIATE = 3, 136, 24


def weights():
    return [torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * 0.1 for _ in range(2)] + [
        torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * 0.1
    ]


def decoded(weight: torch.Tensor, format: str) -> torch.Tensor:
    return codec_oracles.decode(*codec_oracles.encode(weight, format), weight.shape[-1], format)


@pytest.mark.parametrize("format", _C.FORMATS)
def test_one_set_of_values(format, tmp_path):
    assert codec_oracles.FORMATS == _C.FORMATS
    gate, up, down = weights()
    experts = PagedExperts.from_weights(gate, up, down, format=format, dtype=torch.float32)
    store = experts.layer.store
    expected = [[decoded(part[e], format) for part in (gate, up, down.mT.contiguous())] for e in range(EXPERTS)]
    store.save(tmp_path / "store")
    for held in (store, ExpertStore.open(tmp_path / "store")):
        for e in range(EXPERTS):
            got = held.read_expert(0, e)
            assert all(torch.equal(a, b) for a, b in zip((got[0], got[1], got[2].T), expected[e]))

    neurons = torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([1, 23, 5], dtype=torch.int32)
    bank = RowBank.from_store(store, 0, neurons)
    assert bank.absmax.dtype == ops.scale_dtype(format)
    rows = torch.stack(
        [torch.stack([part[j] for part in expected[e]]) for e, j in zip(*map(torch.Tensor.tolist, neurons))]
    )
    assert torch.equal(bank.decode(), rows)
    # The layer computes with the page's rows, and with the bank's where it has any.
    changed = torch.randn(3, 3, HIDDEN) * 0.1
    bank.codes.copy_(ops.quantize_blocks(changed, format)[0])
    bank.absmax.copy_(ops.quantize_blocks(changed, format)[1])
    experts.layer.set_bank(bank)
    for i, (e, j) in enumerate(zip(*map(torch.Tensor.tolist, neurons))):
        for matrix in range(3):
            expected[e][matrix][j] = decoded(changed[i], format)[matrix]
    x = torch.randn(10, HIDDEN)
    index = torch.arange(10).remainder(EXPERTS)[:, None]
    out = experts(x, index, torch.ones(10, 1))
    for t in range(10):
        g, u, d = (part.double() for part in expected[int(index[t, 0])])
        h = torch.nn.functional.silu(g @ x[t].double()) * (u @ x[t].double())
        torch.testing.assert_close(out[t].double(), h @ d, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", _C.FORMATS)
def test_command_line_quantizes(format, tiny_checkpoint, tmp_path):
    assert main(["quantize", str(tiny_checkpoint), str(tmp_path / "store"), "--format", format]) == 0
    store, source = ExpertStore.open(tmp_path / "store"), ModelSource.open(tiny_checkpoint)
    assert store.format == format
    gate, _, down = source.expert(1, 2)
    got = store.read_expert(1, 2)
    assert torch.equal(got[0], decoded(gate.float(), format))
    assert torch.equal(got[2], decoded(down.float().T.contiguous(), format).T)


def test_weights_too_large_for_fp16_scales_name_their_matrix():
    store = ExpertStore.create(["a"], 2, HIDDEN, INTERMEDIATE, "nf4_f16")
    gate, up, down = (part[0] for part in weights())
    up[3, 7] = 1e5
    with pytest.raises(ValueError, match=r"up of layer 0, expert 1: weight: expected magnitudes up to 65504"):
        store.write_expert(0, 1, gate, up, down)
    assert not any(bytes(store.native.page(0, 1)))
