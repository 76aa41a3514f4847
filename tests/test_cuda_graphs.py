"""Every op that training calls can be captured in a CUDA (or HIP) graph: a replay does what a call does."""

from __future__ import annotations

import devices
import pytest
import torch
from usaf_ext import ops

if devices.gpu() is None or devices.gpu().type != "cuda":
    pytest.skip("no NVIDIA or AMD GPU that this build has kernels for: nothing to capture", allow_module_level=True)

from test_ops_devices import _arguments, _on_gpu, _tensors

HOST_READS = {"quantize_blocks", "quantize_rows_"}  # they refuse weights that are not finite, and so look at them


@pytest.mark.parametrize("name", sorted(_arguments().keys() - HOST_READS))
def test_a_replay_does_what_a_call_does(name):
    op = getattr(ops, name)
    arguments = _arguments()[name]
    called, captured = _on_gpu(arguments), _on_gpu(arguments)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch's notes on graphs ask: a first call outside the capture
        op(**_on_gpu(arguments))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = op(**captured)
    graph.replay()
    result = op(**called)
    pairs = [(_tensors(captured)[argument], tensor) for argument, tensor in _tensors(called).items()]
    if result is not None:
        as_tuple = (result,) if isinstance(result, torch.Tensor) else result
        pairs += list(zip((replayed,) if isinstance(replayed, torch.Tensor) else replayed, as_tuple, strict=True))
    torch.cuda.synchronize()
    assert pairs
    for actual, expected in pairs:
        assert devices.same_bits(actual, expected)
