"""Each op on data past the caches, beside its peers, with 1 and 2 threads."""

from __future__ import annotations

import pytest
from cases import BENCH_SHAPE
from op_cases import OP_CASES
from pairing import paired


@pytest.mark.parametrize("name", OP_CASES)
def test_op(benchmark, threads, copy, name):
    work = OP_CASES[name](BENCH_SHAPE)
    paired(benchmark, work.ours, work.peers, size=work.size, moved=work.moved, copy=copy)
