"""The native row bank: which indices it takes."""

from __future__ import annotations

import pytest
from usaf_ext import _C

POINTERS = dict(
    codes_ptr=64,
    absmax_ptr=64,
    grad_ptr=0,
    grad_dtype="float32",
    neuron_expert_ptr=64,
    neuron_index_ptr=64,
    expert_hit_ptr=0,
    grad_squares_ptr=0,
    overlay_rows_ptr=0,
)


def make(neuron_expert, neuron_index, format="nf4", sizes=(4, 72, 8), **pointers):
    return _C.RowBank(format, *sizes, neuron_expert, neuron_index, **(POINTERS | pointers))


def test_takes_sorted_distinct_neurons():
    assert make([0, 0, 3], [1, 7, 0]).num_neurons == 3
    assert make([], [], codes_ptr=0, absmax_ptr=0).num_neurons == 0
    assert make([1], [1], format="bf16", absmax_ptr=0).num_neurons == 1  # bf16 has no scales


@pytest.mark.parametrize(
    ("neuron_expert", "neuron_index", "text"),
    [
        ([0, 1], [0], "neuron_expert has 2 entries, neuron_index has 1"),
        ([0, 4], [0, 0], r"at 1: \(4, 0\): there are 4 experts of 8 neurons"),
        ([-1], [0], r"at 0: \(-1, 0\)"),
        ([0], [8], r"at 0: \(0, 8\)"),
        ([0], [-1], r"at 0: \(0, -1\)"),
        ([0, 0], [3, 3], r"at 1: \(0, 3\): expected ascending order, each once"),
        ([0, 0], [3, 2], "at 1: .* expected ascending order"),
        ([1, 0], [0, 1], "at 1: .* expected ascending order"),
    ],
)
def test_refuses_other_indices(neuron_expert, neuron_index, text):
    with pytest.raises(ValueError, match=text):
        make(neuron_expert, neuron_index)


def test_refuses_missing_memory_and_sizes():
    for pointer in ("codes_ptr", "absmax_ptr", "neuron_expert_ptr", "neuron_index_ptr"):
        with pytest.raises(ValueError, match="must not be null"):
            make([0], [0], **{pointer: 0})
    for sizes in ((0, 72, 8), (4, 0, 8), (4, 72, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            make([], [], sizes=sizes)


def test_refuses_a_gradient_it_cannot_keep():
    assert make([0], [0], grad_ptr=64, grad_squares_ptr=64, grad_dtype="bfloat16").num_neurons == 1
    with pytest.raises(ValueError, match="grad_squares must not be null"):
        make([0], [0], grad_ptr=64)
    with pytest.raises(ValueError, match="dtype: expected"):
        make([0], [0], grad_ptr=64, grad_squares_ptr=64, grad_dtype="int32")
