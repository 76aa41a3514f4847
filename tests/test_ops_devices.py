"""What every op owes a GPU: tensors of one device only, and nothing written if they are not."""

from __future__ import annotations

from typing import Any

import devices
import pytest
import torch
from adam_oracles import HYPER, Rows
from test_ops_row_gradient import operands
from torch import Tensor
from usaf_ext import ops

if devices.gpu() is None:
    pytest.skip("no GPU that this build has kernels for: the ops are tested on the CPU", allow_module_level=True)


def _arguments() -> dict[str, dict[str, Any]]:
    """Good arguments of every op, on the CPU."""
    weight = torch.randn(4, 70)
    codes, absmax = ops.quantize_blocks(weight, "nf4")
    index, router = torch.randint(3, (4, 2)), torch.rand(4, 2)
    permuted, _, inverse = ops.expert_gather(weight, index, 3)
    residual = torch.zeros(4, 70, dtype=torch.int8)
    rows, one = torch.tensor([1, 0]), torch.ones(())
    x, grad_out, grad_gate_up, weighted_h, offsets = operands([4, 3], 10, 5, torch.float32)
    gradients = {"x": x, "grad_out": grad_out, "grad_gate_up": grad_gate_up, "weighted_h": weighted_h}
    adam = Rows.make(4, 300, mode="residual", moments="8bit")
    moments, moment_scales = ops.empty_moments8((4, 300))
    steps = {"active": torch.ones(4, dtype=torch.bool), "grad_scale": one, "found_inf": torch.zeros(())}
    steps |= {"changed": torch.zeros((), dtype=torch.int32), "grad": torch.randn(4, 300)}
    return {
        "quantize_blocks": {"weight": weight, "format": "nf4"},
        "dequantize_blocks": {"codes": codes, "absmax": absmax, "cols": 70, "format": "nf4", "rows": rows},
        "quantize_rows_": {"codes": codes, "absmax": absmax, "rows": rows, "weight": weight[:2], "format": "nf4"},
        "expert_gather": {"x": weight, "index": index, "num_experts": 3},
        "expert_scatter": {"permuted": permuted, "inverse": inverse, "weights": router},
        "glu": {"gate_up": weight, "bias": torch.randn(70)},
        "glu_backward": {"grad_h": weight[:, :35].contiguous(), "gate_up": weight, "row_weight": torch.rand(4)},
        "row_gradient_": {
            "grad": torch.zeros(2, 3, 10),
            **gradients,
            "offsets": offsets,
            "neuron_expert": torch.tensor([0, 1]).int(),
            "neuron_index": torch.tensor([4, 0]).int(),
        },
        "row_importance_": {
            "importance": torch.zeros(2, 5),
            **gradients,
            "offsets": offsets,
            "weights": torch.randn(2, 3, 5, 10),
        },
        "router_uniform_": {"out": torch.empty(3, 5), "seed": 1, "step": 2, "micro_batch": 0, "layer": 3},
        "masked_adam_": {**adam.tensors(), **steps, **HYPER, "format": "nf4", "mode": "residual"},
        "dequantize_residual": {"codes": codes, "absmax": absmax, "residual": residual, "format": "nf4"},
        "quantize_residual": {"weight": weight, "codes": codes, "absmax": absmax, "format": "nf4"},
        "dequantize_moments8": {"codes": moments, "absmax": moment_scales, "signed": True},
    }


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def _on_gpu(arguments: dict[str, Any], but: str | None = None) -> dict[str, Any]:
    """The arguments with every tensor, but perhaps one, on the GPU."""
    moved = {name: tensor.to(devices.gpu()) for name, tensor in _tensors(arguments).items() if name != but}
    return {**arguments, **moved}


def test_the_table_names_every_op():
    without_a_tensor = {"scale_dtype", "empty_moments8"}
    assert set(_arguments()) == set(ops.__all__) - without_a_tensor


@pytest.mark.parametrize("name", _arguments())
def test_results_lie_on_the_device(name):
    result = getattr(ops, name)(**_on_gpu(_arguments()[name]))
    for tensor in result if isinstance(result, tuple) else [result]:
        assert tensor is None or tensor.device == devices.gpu()


@pytest.mark.parametrize("name", [name for name, arguments in _arguments().items() if len(_tensors(arguments)) > 1])
def test_a_tensor_of_another_device_is_refused(name):
    """Whichever it is, by its name; and nothing is written."""
    arguments, unnamed = _arguments()[name], []
    for stray in _tensors(arguments):
        mixed = _on_gpu(arguments, but=stray)
        before = {argument: tensor.clone() for argument, tensor in _tensors(mixed).items()}
        with pytest.raises(ValueError, match="expected device") as caught:
            getattr(ops, name)(**mixed)
        if not str(caught.value).startswith(f"{stray}:"):
            unnamed.append(stray)
        for argument, tensor in before.items():
            assert devices.same_bits(mixed[argument], tensor), (stray, argument)
    assert len(unnamed) == 1  # the tensor that the others are compared with
