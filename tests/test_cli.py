"""The command line from outside: what it prints, the files it leaves, and exit code 2 for bad input."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import usaf_ext
from safetensors.torch import load_file
from tiny_models import make_checkpoint
from transformers import AutoModelForCausalLM
from usaf_ext import TrainConfig
from usaf_ext.cli import main
from usaf_ext.train_flags import add_train_flags, train_config

TEXT = "To be trained, a text must be long enough for a few sequences. " * 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """checkpoint, text.txt, chat.jsonl, store and run: what the commands are used on."""
    folder = tmp_path_factory.mktemp("cli")
    make_checkpoint(folder / "checkpoint", dtype=torch.float32)
    (folder / "text.txt").write_text(TEXT)
    chat = [{"messages": [{"role": "user", "content": TEXT[:200]}]}, {"text": TEXT[:300]}]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    assert main(["quantize", str(folder / "checkpoint"), str(folder / "store")]) == 0
    assert main(train_arguments(folder, "run")) == 0
    return folder


def train_arguments(folder, out, *more):
    return [
        "train",
        *("--model", str(folder / "store"), "--data", str(folder / "text.txt"), "--out", str(folder / out)),
        *("--eval-data", str(folder / "text.txt"), "--steps", "4", "--seq-len", "32", "--batch-size", "2"),
        *("--density", "5%", "--device-budget", "96KiB", "--learning-rate", "1e-2"),
        *more,
    ]


def evaluated(folder, model, capsys, *more):
    arguments = ["eval", "--model", str(model), "--data", str(folder / "text.txt"), "--seq-len", "32", *more]
    assert main(arguments) == 0
    return float(capsys.readouterr().out.split()[1])


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert usaf_ext.__version__ in out
    assert torch.__version__ in out
    assert "cpu backend" in out
    assert "nf4" in out


def test_a_run_leaves_its_files(place):
    run = place / "run"
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "step"] == [1, 2, 3, 4]
    for name in ("loss.png", "expert_load.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_flags_of_accumulation_and_memory(place):
    flags = ("--gradient-checkpointing", "--accumulation-order", "layer", "--gradient-release", "--dtype", "float16")
    assert main(train_arguments(place, "layers", "--gradient-accumulation-steps", "2", *flags)) == 0
    info = json.loads((place / "layers" / "run.json").read_text())
    assert info["config"]["accumulation_order"] == "layer"
    assert info["config"]["gradient_checkpointing"]
    assert info["config"]["gradient_release"]
    log = [json.loads(line) for line in (place / "layers" / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if record["event"] == "step"]
    assert all(record["loss_scale"] > 1 and not record["skipped"] for record in steps)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gradient-release",), "gradient_release: a layer's gradient is complete inside backward only with"),
        (("--accumulation-order", "page"), "--accumulation-order: invalid choice"),
        (("--dtype", "float8"), "--dtype: invalid choice"),
    ],
)
def test_bad_flags_of_accumulation_and_memory(place, capsys, flags, message):
    assert exit_code(train_arguments(place, "never", *flags)) == 2
    assert message in capsys.readouterr().err
    assert not (place / "never").exists()


def test_a_host_budget_gives_the_same_run(place, capsys, caplog):
    """From a store on disk, as from one in memory: loss, evaluation and exported weights."""
    make_checkpoint(place / "wide", num_experts=64)
    assert main(["quantize", str(place / "wide"), str(place / "wide_store")]) == 0
    budget = ("--host-budget", "300KiB")
    for name, flags in (("in_memory", ()), ("from_disk", budget)):
        arguments = train_arguments(place, name, *flags)
        arguments[arguments.index("--model") + 1] = str(place / "wide_store")
        with caplog.at_level("INFO", "usaf_ext.memory"):
            assert main(arguments) == 0
        assert ("of experts on disk" in caplog.text) == bool(flags)
        assert main(["export", str(place / name), str(place / f"{name}_plain"), *flags]) == 0
    capsys.readouterr()
    losses = {evaluated(place, place / "in_memory", capsys, *flags) for flags in ((), budget)}
    assert len(losses | {evaluated(place, place / "from_disk", capsys, *budget)}) == 1
    files = [(place / f"{name}_plain" / "model.safetensors").read_bytes() for name in ("in_memory", "from_disk")]
    assert files[0] == files[1]


def test_train_lowers_the_loss_and_export_keeps_it(place, capsys):
    before = evaluated(place, place / "store", capsys)
    after = evaluated(place, place / "run", capsys)
    assert after < before
    assert main(["export", str(place / "run"), str(place / "plain"), "--base", "dequantized"]) == 0
    assert "compared bit by bit" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(place / "plain")
    assert model.dtype == torch.float32
    assert main(["export", str(place / "run"), str(place / "original")]) == 0
    original, exported = (load_file(place / name / "model.safetensors") for name in ("checkpoint", "original"))
    changed = [key for key in original if not torch.equal(original[key], exported[key])]
    assert changed
    assert all("experts" in key for key in changed)


def test_resume_goes_on_with_the_same_bits(place, capsys):
    stopped = train_arguments(place, "stopped", "--checkpoint-every", "2")
    code = (
        "import sys, os, signal; from usaf_ext import run_folder; from usaf_ext.cli import main\n"
        "save = run_folder.RunFolder.save_checkpoint\n"
        "def save_and_die(self, checkpoint):\n"
        "    save(self, checkpoint); os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_folder.RunFolder.save_checkpoint = save_and_die\n"
        "main(sys.argv[1:])"
    )
    assert subprocess.run([sys.executable, "-c", code, *stopped], capture_output=True).returncode == -9
    assert main([*stopped, "--resume"]) == 0
    capsys.readouterr()
    assert evaluated(place, place / "stopped", capsys) == evaluated(place, place / "run", capsys)
    whole, resumed = (
        load_file(place / run / "checkpoint-000004" / "optimizer.safetensors") for run in ("run", "stopped")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_ctrl_c_saves_and_says_how_to_resume(place):
    arguments = train_arguments(place, "interrupted")
    code = (
        "import sys, os, signal; from usaf_ext import training; from usaf_ext.cli import main\n"
        "step = training._Trainer._one_step\n"
        "def step_and_press(self):\n"
        "    os.kill(os.getpid(), signal.SIGINT); return step(self)\n"
        "training._Trainer._one_step = step_and_press\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert process.returncode == 130
    assert "--resume" in process.stderr
    assert (place / "interrupted" / "checkpoint-000001").is_dir()
    assert main([*arguments, "--resume"]) == 0


def test_a_store_keeps_its_own_format(place, capsys):
    assert main(["quantize", str(place / "checkpoint"), str(place / "plain_store"), "--format", "bf16"]) == 0
    capsys.readouterr()
    in_bf16 = evaluated(place, place / "plain_store", capsys)
    assert in_bf16 == evaluated(place, place / "checkpoint", capsys, "--format", "bf16")
    assert in_bf16 != evaluated(place, place / "checkpoint", capsys)


def test_jsonl_with_messages(place, capsys):
    assert main(["eval", "--model", str(place / "store"), "--data", str(place / "chat.jsonl"), "--seq-len", "32"]) == 0
    assert "nats a token" in capsys.readouterr().out


def test_works_from_any_folder(place, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", "import usaf_ext; print(usaf_ext.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.stdout.strip() == usaf_ext.__version__


def test_every_setting_has_a_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        default = {False: "off", None: "none"}.get(field.default, field.default)
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag} [^()]*(\([^()]*\)[^()]*)*\(default: {re.escape(str(default))}\)", text), flag
    parser = argparse.ArgumentParser()
    add_train_flags(parser)
    assert train_config(parser.parse_args([])) == TrainConfig()
    given = ["--max-grad-norm", "none", "--density", "2%", "--activation-threshold", "0.25", "--gradient-checkpointing"]
    given += ["--router", "gumbel", "--gumbel-tau-end", "0.2", "--optimizer", "none", "--selection-metric", "random"]
    assert train_config(parser.parse_args(given)) == TrainConfig(
        max_grad_norm=None,
        density=0.02,
        activation_threshold=0.25,
        gradient_checkpointing=True,
        router="gumbel",
        gumbel_tau_end=0.2,
        optimizer=None,
        selection_metric="random",
    )


def test_a_router_only_run_from_the_shell(place, capsys):
    flags = ["--density", "0", "--router", "gumbel", "--router-learning-rate", "1e-2"]
    assert main(train_arguments(place, "router", *flags)) == 0
    assert "(0.00% of the neurons)" in capsys.readouterr().out
    assert evaluated(place, place / "router", capsys) != evaluated(place, place / "store", capsys)
    assert main(["export", str(place / "router"), str(place / "router_plain")]) == 0
    assert "0 trained expert weights" in capsys.readouterr().out


# Flags that argparse refuses, and input that a command refuses: all exit with 2 and leave nothing behind.
BAD = {
    "no such model": ["--model", "{missing}"],
    "no such data": ["--data", "{missing}.txt"],
    "another suffix": ["--data", "{checkpoint}/config.json"],
    "density 0": ["--density", "0"],
    "density 0 with a frozen router": ["--density", "0%"],
    "density below 0": ["--density", "-1%"],
    "metric": ["--selection-metric", "hessian"],
    "sampling": ["--selection-sampling", "random"],
    "a sample of a random choice": ["--selection-metric", "random", "--selection-sampling", "proportional"],
    "threshold": ["--activation-threshold", "1"],
    "threshold in words": ["--activation-threshold", "low"],
    "threshold scope": ["--threshold-scope", "batch"],
    "temperature": ["--gumbel-tau-start", "0"],
    "norm": ["--max-grad-norm", "-1"],
    "norm in words": ["--max-grad-norm", "all"],
    "optimizer": ["--optimizer", "sgd"],
    "aux loss": ["--aux-loss-coef", "nan"],
    "master dtype": ["--master-dtype", "float16"],
    "density above 1": ["--density", "1.5"],
    "density in words": ["--density", "some"],
    "steps 0": ["--steps", "0"],
    "steps in words": ["--steps", "ten"],
    "a budget in words": ["--device-budget", "much"],
    "a budget of 0": ["--device-budget", "0"],
    "too small a budget": ["--device-budget", "4KiB"],
    "a host budget in words": ["--host-budget", "much"],
    "a host budget of 0": ["--host-budget", "0"],
    "too small a host budget": ["--host-budget", "16KiB"],
    "router": ["--router", "dense"],
    "learning rate": ["--learning-rate", "-1"],
    "router warm-up with a frozen router": ["--router-warmup-steps", "2"],
    "sequence of one": ["--seq-len", "1"],
    "sequence longer than the text": ["--seq-len", "100000"],
    "mode": ["--mode", "adapter"],
    "rounding": ["--rounding", "up"],
    "gradient dtype": ["--grad-dtype", "float16"],
    "moments": ["--moments", "4bit"],
    "placement": ["--placement", "disk"],
    "re-selection before the first step": ["--reselect-every", "-1"],
    "re-selection of everything": ["--reselect-every", "2", "--reselect-fraction", "100%"],
    "re-selection of a random choice": ["--reselect-every", "2", "--selection-metric", "random"],
    "another format than the store's": ["--format", "bf16"],
    "seed": ["--seed", "-1"],
    "nothing to resume": ["--resume"],
    "originals": ["--originals", "{missing}"],
}


def exit_code(arguments):
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("flags", BAD.values(), ids=BAD.keys())
def test_bad_train_flags(place, flags, capsys):
    flags = [flag.format(missing=place / "missing", checkpoint=place / "checkpoint") for flag in flags]
    assert exit_code(train_arguments(place, "bad", *flags)) == 2
    assert "error:" in capsys.readouterr().err
    assert not (place / "bad").exists()


def test_bad_places(place, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("keep me")
    assert exit_code(["quantize", str(place / "checkpoint"), str(taken)]) == 2
    assert exit_code(["quantize", str(place / "missing"), str(tmp_path / "s")]) == 2
    assert exit_code(["quantize", str(place / "checkpoint"), str(tmp_path / "s"), "--format", "nf5"]) == 2
    assert exit_code(train_arguments(place, "run")) == 2  # a run stands there already
    assert exit_code(["export", str(place / "run"), str(taken)]) == 2
    assert exit_code(["export", str(place / "store"), str(tmp_path / "e")]) == 2
    assert exit_code(["export", str(place / "run"), str(tmp_path / "e"), "--base", "other"]) == 2
    assert exit_code(["export", str(place / "run"), str(tmp_path / "e"), "--dtype", "bfloat16"]) == 2
    assert exit_code(["demo", "--out", str(taken)]) == 2
    assert exit_code(["eval", "--model", str(place / "run"), "--data", str(place / "missing.txt")]) == 2
    assert exit_code(["train", "--model", str(place / "run"), "--data", str(place / "text.txt"), "--out", "x"]) == 2
    assert exit_code([]) == 2
    assert exit_code(["fly"]) == 2
    assert [path.name for path in taken.iterdir()] == ["precious.txt"]
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "e").exists()
    assert "Traceback" not in capsys.readouterr().err
