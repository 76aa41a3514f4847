"""The training loop: resume bit for bit, the control, warm-up, interruption, damaged runs, bad input."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from trained_models import bank_state, paged_model, same_bits, tokens
from usaf_ext import StoreError, TrainConfig, UsafError, paged_layers, train
from usaf_ext import run_folder as run_folder_module
from usaf_ext.evaluation import evaluate
from usaf_ext.rng import rng_states
from usaf_ext.router import find_routers, trained_routers
from usaf_ext.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = list(tokens(16, length=24, vocabulary=40))
HELD_OUT = list(tokens(4, length=24, seed=1, vocabulary=40))
BASE = {
    "steps": 6,
    "batch_size": 4,
    "seq_len": 24,
    "density": 0.1,
    "importance_batches": 2,
    "learning_rate": 1e-2,
    "router_learning_rate": 1e-3,
}
WALL_CLOCK = ("seconds", "tokens_per_second", "stall_seconds")


def config(**changes):
    return TrainConfig(**{**BASE, **changes})


def final_state(model, out_dir):
    """Everything that a run leaves: trained weights, and its last checkpoint's moments, orders and RNG."""
    checkpoint = RunFolder.open(out_dir).latest_checkpoint()
    return [
        bank_state(model),
        {name: router.weight.detach() for name, router in trained_routers(model).items()},
        [checkpoint.step, checkpoint.optimizer, checkpoint.state, checkpoint.tensors, checkpoint.rng],
    ]


def log(out_dir, *events):
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    pager = {name for record in records for name in record if name.startswith(("page_", "bytes_"))}
    return [
        {name: value for name, value in record.items() if name not in (*WALL_CLOCK, *pager)}
        for record in records
        if not events or record["event"] in events
    ]


class StopAfter:
    """A callback that sends this process a signal after a step, as Ctrl-C does."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def __call__(self, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"router": "topk", "router_warmup_steps": 2, "lr_warmup_steps": 2}),
        (torch.float32, {"router": "topk", "router_warmup_steps": 4, "gradient_accumulation_steps": 2}),
        (torch.float32, {"mode": "in_place", "gradient_checkpointing": True, "lr_schedule": "constant"}),
        (torch.float32, {"optimizer": None}),
        (
            torch.float32,
            {
                "router": "gumbel",
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "activation_threshold": 0.9,
                "selection_sampling": "proportional",
                "gumbel_tau_end": 0.1,
            },
        ),
        (torch.float32, {"router": "topk", "density": 0.0, "aux_loss_coef": 0.0}),
        (torch.float32, {"selection_metric": "random", "activation_threshold": 0.9, "threshold_scope": "forward"}),
    ],
    ids=["master", "router", "stopped-in-warmup", "in_place", "control", "gumbel", "router-only", "random"],
)
@pytest.mark.usefixtures("device")
def test_resume_continues_bit_for_bit(tiny_checkpoint, tmp_path, dtype, changes):
    settings = config(**changes)
    whole = paged_model(tiny_checkpoint, dtype)
    result = train(whole, DATA, settings, tmp_path / "whole", eval_datasets={"held out": HELD_OUT})

    handler = signal.getsignal(signal.SIGINT)  # whatever this process was started with
    stopped = paged_model(tiny_checkpoint, dtype)
    arguments = {"eval_datasets": {"held out": HELD_OUT}}
    with pytest.raises(KeyboardInterrupt, match=r"SIGINT after step 3; saved .*resume=True"):
        train(stopped, DATA, settings, tmp_path / "parts", callbacks=[StopAfter(3)], **arguments)
    assert RunFolder.open(tmp_path / "parts").checkpoint_steps() == [3]
    torch.manual_seed(99)
    resumed = paged_model(tiny_checkpoint, dtype)
    again = train(resumed, DATA, settings, tmp_path / "parts", resume=True, **arguments)

    assert same_bits(final_state(whole, tmp_path / "whole"), final_state(resumed, tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert again.evaluations == result.evaluations
    assert again.load_entropy == result.load_entropy
    assert signal.getsignal(signal.SIGINT) == handler


def test_training_lowers_the_loss_and_writes_the_run(tiny_checkpoint, tmp_path):
    model = paged_model(tiny_checkpoint)
    before = evaluate(model, HELD_OUT, 4)
    seen = []
    result = train(
        model,
        DATA,
        config(steps=12, evaluate_every=5, checkpoint_every=5),
        tmp_path / "run",
        eval_datasets={"new": HELD_OUT},
        callbacks=[seen.append],
    )
    losses = result.evaluations["new"]
    assert list(losses) == [0, 5, 10, 12]
    assert losses[0] == before
    assert losses[12] == evaluate(model, HELD_OUT, 4)
    assert losses[12] < before - 0.1
    neurons = round(0.1 * 2 * 6 * 24)
    assert (result.steps, result.trained_parameters) == (12, neurons * 3 * 72)
    assert result.density == neurons / (2 * 6 * 24)
    steps = log(tmp_path / "run", "step")
    assert [record["step"] for record in steps] == [record["step"] for record in seen] == list(range(1, 13))
    for record in seen:
        assert record["tokens"] == 4 * 24
        assert record["tokens_per_second"] == pytest.approx(96 / record["seconds"])
        assert record["page_hits"] + record["page_misses"] > 0
        assert len(record["load_entropy"]) == 2
        assert all(0 < value <= 1 for value in record["load_entropy"])
    assert steps[0]["learning_rate"] == 1e-2
    assert 0 < steps[-1]["learning_rate"] < 1e-3
    assert RunFolder.open(tmp_path / "run").checkpoint_steps() == [12]
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / "run" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    dense = [p for name, p in model.named_parameters() if not name.endswith("usaf_anchor")]
    assert not any(p.requires_grad for p in dense)


def test_the_control_changes_nothing(tiny_checkpoint, tmp_path):
    model = paged_model(tiny_checkpoint)
    result = train(
        model, DATA, config(optimizer=None, router="topk"), tmp_path / "run", eval_datasets={"new": HELD_OUT}
    )
    assert result.evaluations["new"][0] == result.evaluations["new"][6]
    assert result.trained_parameters == 0
    assert all(record["learning_rate"] == 0 for record in log(tmp_path / "run", "step"))
    untouched = paged_model(tiny_checkpoint)
    assert torch.equal(model(tokens(2)).logits, untouched(tokens(2)).logits)
    assert RunFolder.open(tmp_path / "run").latest_checkpoint().optimizer is None


def test_warmup_trains_the_router_and_no_expert(tiny_checkpoint, tmp_path):
    model = paged_model(tiny_checkpoint)
    original = {name: router.weight.detach().clone() for name, router in find_routers(model).items()}
    states = []

    def keep(record):
        banks = RunFolder.open(tmp_path / "run").latest_checkpoint()
        states.append((record, banks.delta, banks.optimizer["state"]))

    settings = config(router="topk", router_warmup_steps=3, checkpoint_every=1, aux_loss_coef=0.5)
    train(model, DATA, settings, tmp_path / "run", callbacks=[keep])
    for record, delta, moments in states:
        warming = record["step"] <= 3
        assert record["phase"] == ("router_warmup" if warming else "train")
        assert (record["learning_rate"] == 0) == warming
        assert record["router_learning_rate"] > 0
        assert record["aux_loss"] > 0
        assert same_bits(delta.banks, states[0][1].banks) == warming
        assert len(moments) == (2 if warming else 4)
        assert not any(torch.equal(delta.routers[name].bfloat16(), weight) for name, weight in original.items())


def test_a_large_aux_loss_evens_the_load(tiny_checkpoint, tmp_path):
    losses = {}
    for coefficient in (0.0, 1.0):
        model = paged_model(tiny_checkpoint)
        out_dir = tmp_path / str(coefficient)
        settings = config(
            steps=30, router="topk", router_warmup_steps=29, aux_loss_coef=coefficient, router_learning_rate=1e-2
        )
        result = train(model, DATA, settings, out_dir)
        losses[coefficient] = (result, log(out_dir, "step")[-1])
    assert losses[1.0][1]["aux_loss"] < 2.1
    assert "aux_loss" not in losses[0.0][1]
    assert sum(losses[1.0][1]["load_entropy"]) > sum(losses[0.0][1]["load_entropy"])


def test_accumulation_and_checkpointing_only_round(tiny_checkpoint, tmp_path):
    runs = {}
    for name, changes in {
        "one": {"batch_size": 8},
        "two": {"gradient_accumulation_steps": 2},
        "recomputed": {"batch_size": 8, "gradient_checkpointing": True, "router": "topk"},
        "kept": {"batch_size": 8, "router": "topk"},
    }.items():
        model = paged_model(tiny_checkpoint)
        settings = config(steps=2, importance_batches=4 if name == "two" else 2, density=1.0, **changes)
        train(model, DATA, settings, tmp_path / name)
        runs[name] = log(tmp_path / name, "step")
    for a, b in (("one", "two"), ("recomputed", "kept")):
        for first, second in zip(runs[a], runs[b]):
            assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
            assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


def test_killed_while_saving_leaves_the_old_checkpoint(tiny_checkpoint, tmp_path, monkeypatch):
    """The child process is killed inside the second checkpoint, after its large files are written."""
    model = paged_model(tiny_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, config(), tmp_path / "run", callbacks=[StopAfter(2, signal.SIGTERM)])
    run = RunFolder.open(tmp_path / "run")
    checkpoint = run.latest_checkpoint()
    child = os.fork()
    if child == 0:
        run_folder_module._write_json = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        run.save_checkpoint(run_folder_module.Checkpoint(**{**vars(checkpoint), "step": 4}))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert any(entry.name.startswith(".checkpoint-000004") for entry in run.path.iterdir())
    assert run.checkpoint_steps() == [2]
    assert same_bits(vars(run.latest_checkpoint())["optimizer"], checkpoint.optimizer)
    resumed = paged_model(tiny_checkpoint)
    train(resumed, DATA, config(), tmp_path / "run", resume=True)
    whole = paged_model(tiny_checkpoint)
    train(whole, DATA, config(), tmp_path / "whole")
    assert same_bits(final_state(resumed, tmp_path / "run"), final_state(whole, tmp_path / "whole"))


@pytest.mark.parametrize("file", ["delta.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "newer"])
def test_damaged_checkpoints(tiny_checkpoint, tmp_path, caplog, file, damage):
    run = RunFolder.create(tmp_path / "run", config={}, base=None, fingerprint="f")
    delta = run_folder_module.Delta("f", "nf4", "master", {}, {"model.layers.0.mlp.gate": torch.randn(4, 8)})
    entry = {0: {"step": torch.tensor(3), "exp_avg": torch.randn(4)}}
    optimizer = {"state": entry, "param_groups": [{"params": [0], "betas": (0.9, 0.999), "lr": 0.1}]}
    checkpoint = run_folder_module.Checkpoint(1, delta, optimizer, {"order": [1]}, {}, rng_states(torch.device("cpu")))
    run.save_checkpoint(checkpoint)
    loaded = run.latest_checkpoint()
    assert same_bits(
        [loaded.optimizer, loaded.state, loaded.rng, loaded.delta.routers],
        [optimizer, checkpoint.state, checkpoint.rng, delta.routers],
    )
    os.rename(run.checkpoint_path(1), tmp_path / "kept")
    run.save_checkpoint(run_folder_module.Checkpoint(**{**vars(checkpoint), "step": 2}))
    os.rename(tmp_path / "kept", run.checkpoint_path(1))
    path = run.checkpoint_path(2) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) - 5])
    elif damage == "flipped":
        content[-12] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(re.sub(rb'(format_version\\*": )\d', rb"\g<1>9", content))
    with pytest.raises(StoreError, match=file.replace(".", r"\.")):
        run.load_checkpoint(2)
    assert run.latest_checkpoint().step == 1
    assert "skipping checkpoint of step 2" in caplog.text
    (run.checkpoint_path(1) / file).unlink()
    with pytest.raises(StoreError, match="none of its checkpoints"):
        run.latest_checkpoint()


def test_run_folder_refusals(tiny_checkpoint, tmp_path):
    model = paged_model(tiny_checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(model, DATA, config(), tmp_path / "full")
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="holds no run"):
        train(model, DATA, config(), tmp_path / "none", resume=True)
    train(model, DATA, config(steps=1), tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(model, DATA, config(steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"changed: density \(was 0.1, now 0.2\), steps \(was 1, now 2\)"):
        train(model, DATA, config(steps=2, density=0.2), tmp_path / "run", resume=True)
    other = paged_model(tiny_checkpoint)
    for layer in paged_layers(other):
        layer.store.fingerprint = "0" * 64
    with pytest.raises(StoreError, match="another base model"):
        train(other, DATA, config(steps=1), tmp_path / "run", resume=True)
    info = RunFolder.open(tmp_path / "run")
    assert (info.base, info.config["density"]) == (str(tiny_checkpoint), 0.1)
    content = (tmp_path / "run" / "run.json").read_text()
    for broken in (content.replace('"density": 0.1', '"density": 0.9'), content[:-9], "[]"):
        (tmp_path / "run" / "run.json").write_text(broken)
        with pytest.raises(StoreError, match=r"run\.json"):
            RunFolder.open(tmp_path / "run")


def test_resume_without_a_checkpoint_begins_anew(tiny_checkpoint, tmp_path):
    """Stopped while importance was measured: run.json is there and nothing else."""

    class Stopping(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads == 3:  # the first is a check, before anything begins
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt, match="measuring importance"):
        train(paged_model(tiny_checkpoint), Stopping(DATA), config(), tmp_path / "run")
    model, whole = paged_model(tiny_checkpoint), paged_model(tiny_checkpoint)
    train(model, DATA, config(), tmp_path / "run", resume=True)
    train(whole, DATA, config(), tmp_path / "whole")
    assert same_bits(final_state(model, tmp_path / "run"), final_state(whole, tmp_path / "whole"))


def test_bad_data(tiny_checkpoint, tmp_path):
    model = paged_model(tiny_checkpoint)
    with pytest.raises(ValueError, match="at least one sequence"):
        train(model, [], config(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"expected int64 \[24\] items, got torch.int64 \(12,\)"):
        train(model, list(tokens(4, 12)), config(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        train(model, [tokens(1)[0].int()], config(), tmp_path / "run")
    with pytest.raises(ValueError, match="paged experts"):
        train(torch.nn.Linear(2, 2), DATA, config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_that_moves_nothing_is_an_error(tiny_checkpoint, tmp_path):
    with pytest.raises(UsafError, match="changed no trained weight"):
        train(paged_model(tiny_checkpoint), DATA, config(learning_rate=1e-30), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"batch_size": 1.5}, TypeError, "batch_size"),
        ({"seq_len": 1}, ValueError, "seq_len"),
        ({"density": 0.0}, ValueError, "density"),
        ({"density": 1.5}, ValueError, "density"),
        ({"density": "1%"}, TypeError, "density"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"mode": "adapter"}, ValueError, "mode"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"grad_dtype": "float16"}, ValueError, "grad_dtype"),
        ({"moments": "4bit"}, ValueError, "moments"),
        ({"placement": "disk"}, ValueError, "placement"),
        ({"reselect_every": -1}, ValueError, "reselect_every"),
        ({"reselect_every": 1.5}, TypeError, "reselect_every"),
        ({"reselect_fraction": 0.0}, ValueError, "reselect_fraction"),
        ({"reselect_fraction": 1.0}, ValueError, "reselect_fraction"),
        ({"reselect_every": 2, "selection_metric": "random"}, ValueError, "random selection has no importance"),
        ({"reselect_every": 2, "density": 0.0, "router": "topk"}, ValueError, "no trained neurons to exchange"),
        ({"master_dtype": "float16"}, ValueError, "master_dtype"),
        ({"router": "dense"}, ValueError, "router"),
        ({"density": -0.1}, ValueError, "density"),
        ({"density": 0.0}, ValueError, "density, router: density 0 trains no expert neuron and a frozen router"),
        ({"density": 0.0, "router": "topk", "router_warmup_steps": 2}, ValueError, "router_warmup_steps: with density"),
        ({"selection_metric": "hessian"}, ValueError, "selection_metric"),
        ({"selection_sampling": "random"}, ValueError, "selection_sampling"),
        ({"selection_metric": "random", "selection_sampling": "proportional"}, ValueError, "selection_sampling: a"),
        ({"activation_threshold": -0.1}, ValueError, "activation_threshold"),
        ({"activation_threshold": 1.0}, ValueError, r"activation_threshold: expected a number in \[0, 1\)"),
        ({"activation_threshold": "10%"}, TypeError, "activation_threshold"),
        ({"threshold_scope": "batch"}, ValueError, "threshold_scope"),
        ({"gumbel_tau_start": 0.0}, ValueError, "gumbel_tau_start"),
        ({"gumbel_tau_end": float("inf")}, ValueError, "gumbel_tau_end"),
        ({"gradient_checkpointing": 1}, TypeError, "gradient_checkpointing"),
        ({"optimizer": "sgd"}, ValueError, "optimizer"),
        ({"lr_schedule": "step"}, ValueError, "lr_schedule"),
        ({"selection_scope": "expert"}, ValueError, "selection_scope"),
        ({"router_warmup_steps": 2}, ValueError, "frozen router"),
        ({"router_warmup_steps": 6, "router": "topk"}, ValueError, "fewer than steps"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        config(**changes)


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.5 * (1 - 0.5**0.5)), ("constant", 1.0)])
def test_learning_rate_schedule(schedule, last):
    settings = config(steps=10, lr_warmup_steps=1, lr_schedule=schedule, router="topk", router_warmup_steps=5)
    rates = [settings.rate(step, 5) for step in range(10)]
    assert rates[:7] == [0.0] * 5 + [0.5, 1.0]
    assert rates[9] == pytest.approx(0.5 * (1 - 2**-0.5) if schedule == "cosine" else last)
