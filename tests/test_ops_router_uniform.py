"""router_uniform_ against an independent Philox, its keys and its bad arguments."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from devices import cpu_only, opcheck, ops

pytestmark = pytest.mark.usefixtures("device")

KEYS = {"seed": 2**40 + 7, "step": 5, "micro_batch": 2, "layer": 3}


def uniform(num_tokens, num_experts, **changes):
    out = torch.full((num_tokens, num_experts), 7.0)
    ops.router_uniform_(out, **{**KEYS, **changes})
    return out


def expected(num_tokens, num_experts, seed, step, micro_batch, layer):
    groups = -(-num_experts // 4)
    random = oracles.philox_words(
        np.arange(num_tokens * groups, dtype=np.uint64), layer, step, micro_batch + 1, seed % 2**64
    )
    values = (random.reshape(num_tokens, 4 * groups)[:, :num_experts] >> np.uint64(9)).astype(np.float64)
    return torch.from_numpy((values + 0.5) / 2**23).float()


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 6), (300, 130), (0, 4), (4, 0)])
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7])
def test_values(shape, seed):
    assert torch.equal(uniform(*shape, seed=seed), expected(*shape, **{**KEYS, "seed": seed}))


def test_every_key_counts_and_the_number_of_tokens_does_not():
    base = uniform(40, 6)
    for name, value in KEYS.items():
        assert not torch.equal(uniform(40, 6, **{name: value + 1}), base)
    assert torch.equal(uniform(50, 6)[:40], base)
    assert 0 < float(base.min()) < float(base.max()) < 1
    assert oracles.same_for_any_threads(lambda: [uniform(2000, 64)])


def test_opcheck():
    opcheck(torch.ops.usaf.router_uniform_.default, (torch.empty(3, 5),), KEYS)


@cpu_only
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": [1.0]}, TypeError, "out: expected a torch.Tensor, got list"),
        ({"out": torch.empty(2, 3, dtype=torch.float64)}, TypeError, "out: expected Float"),
        ({"out": torch.empty(6)}, ValueError, r"out: expected 2 dimension\(s\)"),
        ({"out": torch.empty(3, 2).t()}, ValueError, "out: expected a contiguous tensor"),
        ({"out": torch.empty(1, 1).expand(2**31, 16)}, ValueError, "out: expected"),
        ({"step": -1}, ValueError, r"step: expected 0 <= step < 2\^31, got -1"),
        ({"micro_batch": 2**31}, ValueError, "micro_batch: expected"),
        ({"layer": 1.0}, TypeError, "layer: expected an integer"),
        ({"seed": "1"}, TypeError, "seed: expected an integer"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"out": torch.full((2, 3), 7.0), **KEYS, **changes}
    with pytest.raises(error, match=message):
        ops.router_uniform_(**arguments)
    out = arguments["out"]
    if isinstance(out, torch.Tensor) and out.shape == (2, 3) and out.dtype == torch.float32 and "out" not in changes:
        assert bool((out == 7).all())
