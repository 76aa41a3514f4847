"""Whole runs with each way to keep what is trained: placements, and re-selection."""

from __future__ import annotations

import signal

import devices
import pytest
import torch
from test_training import BASE, DATA, HELD_OUT, StopAfter, config, final_state, log
from trained_models import paged_model, same_bits, tokens
from usaf_ext import expert_store, paged_layers, train
from usaf_ext.delta import apply_delta
from usaf_ext.experts import trained_banks
from usaf_ext.export import export
from usaf_ext.host_updates import staging_bytes
from usaf_ext.loading import load_model
from usaf_ext.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread", "device")

EXCHANGING = {"reselect_every": 2, "reselect_fraction": 0.3}


def run(checkpoint, folder, format="nf4", **changes):
    model = paged_model(checkpoint, format=format)
    result = train(model, DATA, config(**changes), folder, eval_datasets={"held out": HELD_OUT})
    return model, result


KINDS = {
    "master": {},
    "residual": {"mode": "residual", "grad_dtype": "bfloat16", **EXCHANGING},
    "eco": {"mode": "eco", "rounding": "nearest"},
    "in_place": {"mode": "in_place", "moments": "8bit", **EXCHANGING},
    "release": {
        "accumulation_order": "layer",
        "gradient_accumulation_steps": 2,
        "gradient_release": True,
        "router": "topk",
        **EXCHANGING,
    },
    "least": {"mode": "eco", "grad_dtype": "bfloat16", "moments": "8bit"},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_the_host_trains_the_same_bits_as_the_device(tiny_checkpoint, tmp_path, changes, format):
    on_device, result = run(tiny_checkpoint, tmp_path / "device", format, **changes)
    in_host, other = run(tiny_checkpoint, tmp_path / "host", format, placement="host", **changes)
    assert same_bits(final_state(on_device, tmp_path / "device"), final_state(in_host, tmp_path / "host"))
    assert result.evaluations == other.evaluations
    losses = result.evaluations["held out"]
    assert losses[6] < losses[0] - 0.01
    for layer in paged_layers(in_host):
        bank = layer.bank
        assert bank.state_codes.data_ptr() != bank.codes.data_ptr()
        assert same_bits([bank.state_codes, bank.state_absmax], [bank.codes, bank.absmax])


def test_the_log_says_where_the_bytes_are(tiny_checkpoint, tmp_path):
    """A bf16 master, fp32 moments and a step a row on the device; then with everything as small as it goes."""
    model, result = run(tiny_checkpoint, tmp_path / "device")
    in_host, _ = run(tiny_checkpoint, tmp_path / "host", placement="host")
    run(tiny_checkpoint, tmp_path / "small", **KINDS["least"])
    device, host, least = (log(tmp_path / name, "selection")[0]["bank_bytes"] for name in ("device", "host", "small"))
    trained = result.trained_parameters
    rows = trained // 72
    codes = sum(t.nbytes for layer in paged_layers(model) for t in (layer.bank.codes, layer.bank.absmax))
    # Two int32 a neuron; on a GPU also where its three rows go, and the sum of squares of each.
    index = (8 if devices.current().type == "cpu" else 8 + 24 + 24) * rows // 3
    assert device["device"] == 4 * trained + codes + index + 2 * trained + 8 * trained + 4 * rows
    assert host["device"] == 4 * trained + codes + index
    staged = staging_bytes(layer.bank for layer in paged_layers(in_host)) if devices.current().type != "cpu" else 0
    assert host["host"] - device["host"] == codes + 2 * trained + 8 * trained + 4 * rows + staged
    assert least["device"] == 2 * trained + codes + index + 2 * trained + 2 * 4 * rows + 4 * rows


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "residual", "moments": "8bit"},
        {"router": "topk", "router_warmup_steps": 1, "placement": "host"},
        {"mode": "in_place", "grad_dtype": "bfloat16"},
        {"mode": "eco", "optimizer": None},
        {"accumulation_order": "layer", "gradient_release": True},
    ],
    ids=["residual", "host", "in_place", "control", "release"],
)
def test_a_run_with_reselection_resumes_bit_for_bit(tiny_checkpoint, tmp_path, changes, stop):
    settings = config(**EXCHANGING, **changes)
    whole, result = run(tiny_checkpoint, tmp_path / "whole", **EXCHANGING, **changes)
    arguments = {"eval_datasets": {"held out": HELD_OUT}}
    with pytest.raises(KeyboardInterrupt, match=f"SIGINT after step {stop}"):
        train(
            paged_model(tiny_checkpoint),
            DATA,
            settings,
            tmp_path / "parts",
            callbacks=[StopAfter(stop, signal.SIGINT)],
            **arguments,
        )
    torch.manual_seed(99)
    resumed = paged_model(tiny_checkpoint)
    again = train(resumed, DATA, settings, tmp_path / "parts", resume=True, **arguments)
    assert same_bits(final_state(whole, tmp_path / "whole"), final_state(resumed, tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert again.evaluations == result.evaluations
    exchanges = log(tmp_path / "whole", "reselection")
    assert [record["step"] for record in exchanges] == [2, 4]
    assert all(record["dropped"] == round(0.3 * round(0.1 * 288)) for record in exchanges)
    frozen = sum(layer.frozen_bank.num_neurons for layer in paged_layers(whole) if layer.frozen_bank is not None)
    assert frozen == exchanges[-1]["frozen"] > 0


@pytest.mark.parametrize("mode", ["master", "residual", "eco"])
def test_a_run_with_reselection_is_what_was_evaluated(tiny_checkpoint, tmp_path, mode):
    """Its checkpoint loads, and exports, as the model that stood at the end; what was given up has been kept."""
    model, result = run(tiny_checkpoint, tmp_path / "run", evaluate_every=2, mode=mode, **EXCHANGING)
    assert result.density == pytest.approx(BASE["density"], abs=0.01)
    delta = RunFolder.open(tmp_path / "run").latest_checkpoint().delta
    other = paged_model(tiny_checkpoint)
    apply_delta(other, delta, trainable=False)
    ids = tokens(2, seed=5)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(other(ids).logits, expected)
        loaded = load_model(tmp_path / "run", dtype=torch.float32, device=devices.current())
        assert torch.equal(loaded.model(ids).logits, expected)
        source, store = model.usaf_originals, expert_store(model)
        for trained in (model, loaded.model):
            folder = tmp_path / f"out{trained is model}"
            banks = trained_banks(trained)
            export(folder, source=source, store=store, banks=banks, router={}, base="dequantized")
            plain = type(model).from_pretrained(folder, dtype=torch.float32).to(devices.current())
            torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-4)
