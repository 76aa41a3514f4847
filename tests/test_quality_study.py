"""The quality study's own logic, with runs that are made up; and its loop and emulations on the demo's model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

STUDY = Path(__file__).parent.parent / "bench" / "quality"
sys.path.insert(0, str(STUDY))

import block_unit  # noqa: E402
import cells as study_cells  # noqa: E402
import lora  # noqa: E402
import material  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
from cells import CELLS, QUESTIONS, SEEDS, Cell, cell_named, with_inherited  # noqa: E402
from records import Results, key_of, read_records  # noqa: E402
from study import CellsFailed, check_cells, run_study  # noqa: E402
from tuning import MAX_POINTS, NoInteriorBest, progress  # noqa: E402

BUDGET = {"steps": 1}
PRINTS = {"model_fingerprint": "m" * 64, "data_fingerprint": "d" * 64}
A = Cell("a", "a", 0.01, config={"mode": "master"})


def record(loss: float, outcome: str = "ok") -> dict:
    result = {"outcome": outcome, "seconds": 1.0, **PRINTS}
    if outcome == "ok":
        result["loss"] = {
            f"{name}_{when}": loss for name in ("new", "old", "validation") for when in ("before", "after")
        }
    return result


class Bowl:
    """A made-up runner: the loss is a parabola in log2 of the tuned rate, lowest at `best`; it remembers its calls."""

    def __init__(self, best: float = 0.01, fail: str | None = None) -> None:
        self.best, self.fail, self.calls = best, fail, []

    def __call__(self, settings, rates, seed):
        self.calls.append((settings["config"].get("mode"), dict(rates), seed))
        if settings["config"].get("mode") == self.fail:
            raise TypeError("no such feature")
        return record(3 + math.log2(max(rates.values()) / self.best) ** 2 + 0.01 * seed)


def run(tmp_path, cells, runner, path="r.jsonl"):
    said = []
    with Results(tmp_path / path, PRINTS) as results, ThreadPoolExecutor(2) as pool:
        run_study(cells, BUDGET, results, runner, pool, 2, said.append)
    return said


def test_a_second_call_runs_nothing(tmp_path):
    first, second = Bowl(), Bowl()
    run(tmp_path, [A], first)
    lines = (tmp_path / "r.jsonl").read_text()
    run(tmp_path, [A], second)
    assert len(first.calls) == 5  # three grid points, two more seeds
    assert second.calls == []
    assert (tmp_path / "r.jsonl").read_text() == lines


def test_other_settings_are_other_runs(tmp_path):
    run(tmp_path, [A], Bowl())
    again = Bowl()
    run(tmp_path, [replace(A, config={"mode": "eco"})], again)
    assert len(again.calls) == 5
    renamed = Bowl()
    run(tmp_path, [replace(A, name="the same under another name")], renamed)
    assert renamed.calls == []


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_cut_last_line_is_dropped_and_run_again(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    run(tmp_path, [A], Bowl())
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    again = Bowl()
    run(tmp_path, [A], again)
    assert len(again.calls) == 1
    records, whole = read_records(path)
    assert whole == path.stat().st_size
    assert {r["seed"] for r in records} == set(SEEDS)
    assert len(records) == 5


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "r.jsonl"
    run(tmp_path, [A], Bowl())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40] + "\n" + "".join(lines[2:]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2: not JSON"):
        Results(path, PRINTS)
    path.write_text(lines[0] + "{}\n")
    with pytest.raises(ValueError, match="line 2: not a run of this study"):
        Results(path, PRINTS)
    path.write_bytes(before)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["model", "data"])
def test_results_of_another_model_or_data_are_refused(tmp_path, name):
    run(tmp_path, [A], Bowl())
    before = (tmp_path / "r.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"another {name}"):
        Results(tmp_path / "r.jsonl", {**PRINTS, f"{name}_fingerprint": "x" * 64})
    assert (tmp_path / "r.jsonl").read_bytes() == before
    with Results(tmp_path / "new.jsonl", PRINTS) as results, pytest.raises(ValueError, match=f"another {name}"):
        results.add({"settings": {}, "rates": {}, "seed": 0, **record(1.0), f"{name}_fingerprint": "x" * 64})


def test_one_writer_at_a_time(tmp_path):
    with Results(tmp_path / "r.jsonl", PRINTS), pytest.raises(ValueError, match="another run"):
        Results(tmp_path / "r.jsonl", PRINTS)


@pytest.mark.parametrize(("best", "points"), [(0.01, 3), (0.08, 6), (0.0006, 7)])
def test_the_grid_grows_until_its_best_lies_inside(tmp_path, best, points):
    runner = Bowl(best)
    run(tmp_path, [A], runner)
    tuned = sorted(rates["learning_rate"] for _mode, rates, seed in runner.calls if seed == SEEDS[0])
    assert len(tuned) == points
    others = {(rates["learning_rate"], seed) for _mode, rates, seed in runner.calls if seed != SEEDS[0]}
    chosen = min(tuned, key=lambda rate: abs(math.log2(rate / best)))
    assert tuned[0] < chosen < tuned[-1]
    assert others == {(chosen, seed) for seed in SEEDS[1:]}


def test_equal_and_failed_points():
    def at(*outcomes):
        settings = A.settings(BUDGET)
        found = {
            key_of(settings, A.rates(e, {}), 0): record(1.0 if o == "ok" else math.nan, o)
            for e, o in zip((-1, 0, 1), outcomes)
        }
        return progress(A, BUDGET, {}, found)

    assert at("stalled", "stalled", "stalled").exponents == (-1, 0, 1, 2)
    assert at("diverged", "diverged", "diverged").exponents == (-2, -1, 0, 1)
    assert at("ok", "ok", "ok").exponents == (-1, 0, 1, 2)
    assert at("stalled", "ok", "diverged").best == 0


def test_a_grid_without_an_inside_best_ends():
    class Sloping(dict):
        def get(self, key, default=None):
            return record(-json.loads(key)["rates"]["learning_rate"])

    with pytest.raises(NoInteriorBest, match=f"best of {MAX_POINTS} grid points"):
        progress(A, BUDGET, {}, Sloping())


def test_inherited_rates_wait_for_their_cells(tmp_path):
    b = replace(A, name="b", config={"mode": "b"}, tuned=("lora_learning_rate",))
    both = replace(
        A,
        name="both",
        config={"mode": "both"},
        start=0.5,
        tuned=("learning_rate", "lora_learning_rate"),
        inherited={"learning_rate": "a", "lora_learning_rate": "b"},
    )
    runner = Bowl(0.04)
    run(tmp_path, [A, b, both], runner)
    rates = [rates for mode, rates, seed in runner.calls if mode == "both" and seed == 0]
    assert sorted(rate["learning_rate"] for rate in rates) == pytest.approx([0.01, 0.02, 0.04, 0.08])
    assert all(rate["learning_rate"] == rate["lora_learning_rate"] for rate in rates)


def test_a_failing_cell_is_reported_and_the_others_go_on(tmp_path):
    bad = replace(A, name="bad", config={"mode": "bad"})
    child = replace(A, name="child", config={"mode": "child"}, inherited={"learning_rate": "bad"})
    runner = Bowl(fail="bad")
    with pytest.raises(CellsFailed) as caught:
        run(tmp_path, [bad, child, A], runner)
    assert caught.value.failures == {
        "bad": "TypeError: no such feature",
        "child": "needs the rate of bad, which failed",
    }
    assert {r["cell"] for r in read_records(tmp_path / "r.jsonl")[0]} == {"a"}
    assert len(read_records(tmp_path / "r.jsonl")[0]) == 5
    with ThreadPoolExecutor(1) as pool, pytest.raises(CellsFailed, match="bad: TypeError"):
        check_cells([bad, A], BUDGET, runner, pool, lambda line: None)


def test_cells_fit_together():
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    asked = {name for question in QUESTIONS for name in question.cells}
    assert asked == set(names)
    for cell in CELLS:  # a cell comes after those it inherits from
        assert all(names.index(parent) < names.index(cell.name) for parent in cell.inherited.values())
    assert [cell.name for cell in with_inherited(["lora_r8_and_neurons"])] == [
        "nf4_master",
        "lora_r8",
        "lora_r8_and_neurons",
    ]
    with pytest.raises(ValueError, match="no cell named"):
        cell_named("nothing")
    with pytest.raises(ValueError, match="kind of cell"):
        replace(A, kind="other")
    with pytest.raises(ValueError, match="start of cell"):
        replace(A, start=0.0)


def test_table(tmp_path, monkeypatch):
    base, other, unrun = A, replace(A, name="b", description="b", config={"mode": "b"}), replace(A, name="c")
    unrun = replace(unrun, config={"mode": "c"})
    monkeypatch.setattr(report, "CELLS", (base, other, unrun))
    monkeypatch.setattr(report, "QUESTIONS", (study_cells.Question("Q", ("a", "b", "c")),))
    monkeypatch.setattr(report, "BUDGET", {**BUDGET, "batch_size": 1, "seq_len": 2})
    after = {"master": [1.0, 1.2, 1.4], "b": [1.1, 1.1, 1.7]}
    with Results(tmp_path / "r.jsonl", PRINTS) as results:
        for cell in (base, other):
            for exponent, seed in ((-1, 0), (1, 0), (0, 0), (0, 1), (0, 2)):
                loss = after[cell.config["mode"]][seed] if exponent == 0 else 9.0
                results.add(
                    {
                        "cell": cell.name,
                        "settings": cell.settings(report.BUDGET),
                        "rates": cell.rates(exponent, {}),
                        "seed": seed,
                        **record(loss),
                        "trained_parameters": 100,
                        "training_seconds": 2.0,
                        "state_bytes": dict.fromkeys(report.PARTS, 0) | {"codes": 50, "master": 200, "moments": 800},
                        "versions": {"torch": "1"},
                        "commit": "c0ffee",
                        "date": "2026-01-01",
                        "device": "cpu",
                    }
                )
    table, picture = report.write_report(tmp_path / "r.jsonl")
    text = table.read_text()
    assert "| a | 1.2000 ± 0.2000 |  | - | 1.2000 ± 0.2000 | 0.01 (3) | 10.00 | 0.50 | 1 | 100 |" in text
    assert "| b | 1.3000 ± 0.3464 | +0.1000 ± 0.1155 |" in text  # differences 0.1, -0.1, 0.3: sd 0.2 / sqrt 3
    assert "Not here: `c`: not run to its end." in text
    assert picture.stat().st_size > 1000
    with pytest.raises(ValueError, match="no runs yet"):
        report.write_report(tmp_path / "absent.jsonl")


# The demo's model itself: a few steps

SHORT = {
    **study_cells.BUDGET,
    "steps": 3,
    "batch_size": 2,
    "seq_len": 32,
    "importance_batches": 2,
    "lr_warmup_steps": 0,
}


@pytest.fixture(scope="module")
def data():
    whole = material.texts(SHORT["seq_len"])
    return material.Texts(whole.train[:64], whole.validation[:4], whole.new[:4], whole.old[:4])


@pytest.fixture
def short(monkeypatch, data):
    monkeypatch.setattr(runs, "texts", lambda seq_len: data)

    def perform(name: str, rates: dict[str, float], **changes):
        settings = cell_named(name).settings(SHORT)
        return runs.perform({**settings, **changes}, rates, 0)

    return perform


def test_the_studys_loop_does_what_train_does(short, monkeypatch):
    theirs = short("nf4_master", {"learning_rate": 0.02})
    # "lora+neurons" without its LoRA is the study's own loop over neurons alone.
    monkeypatch.setattr(runs, "add_lora", lambda model, rank: [torch.nn.Parameter(torch.zeros(1))])
    ours = short("lora_r8_and_neurons", {"learning_rate": 0.02, "lora_learning_rate": 0.0})
    assert ours["loss"] == theirs["loss"]
    assert ours["loss"]["new_after"] < ours["loss"]["new_before"] - 0.02
    for part in ("codes", "scales", "master", "moments", "gradient"):
        assert ours["state_bytes"][part] == pytest.approx(theirs["state_bytes"][part], abs=16)  # the one dummy weight


def test_state_bytes_of_the_baseline(short):
    result = short("nf4_master", {"learning_rate": 0.02})
    neurons, parameters = 102, 102 * 3 * 128
    assert result["trained_parameters"] == parameters
    assert result["state_bytes"] == {
        "codes": parameters // 2,
        "scales": 4 * parameters // 64,
        "master": 2 * parameters,
        "residual": 0,
        "moments": 8 * parameters,
        "gradient": 4 * parameters,
        "weights": 0,
        "bookkeeping": neurons * (2 + 3) * 4,
    }


def test_blocks_that_were_not_chosen_keep_their_bits(data):
    config = runs.TrainConfig(**SHORT, learning_rate=0.02, density=0.02)
    model = runs._quantised({"format": "nf4"})
    runs._prepare(model, config)
    runs._enable_anchors(model)
    importance = block_unit.block_importance(model, runs._importance_batches(config, data))
    unit = block_unit.BlockUnit(
        model, importance, 0.02, originals=material.source(), mode="master", master_dtype=torch.bfloat16
    )
    assert unit.num_blocks == round(0.02 * sum(scores.numel() for scores in importance))
    assert sum(int(mask.sum()) for mask in unit.masks.values()) == unit.num_blocks
    chosen = torch.cat([scores.reshape(-1) for scores in importance]).topk(unit.num_blocks).values
    for layer, mask in unit.masks.items():
        bank = layer.bank
        scores = importance[layer.index][bank.neuron_expert.long(), bank.neuron_index.long()]
        assert bool((scores[mask] >= chosen[-1]).all())
        assert bool((scores[~mask] <= chosen[-1]).all())
    before = {layer: (layer.bank.master.clone(), layer.bank.codes.clone()) for layer in unit.masks}
    optimizer = runs.MaskedAdam(model, lr=0.02)

    def mask_and_look() -> None:
        unit.mask_gradients()
        for layer, mask in unit.masks.items():
            kept = layer.bank.grad.unflatten(-1, (-1, 64))
            assert not bool(kept[~mask].any())
            norm = float(kept[mask].double().norm())
            assert norm > 0
            assert float(layer.anchor.grad) == pytest.approx(norm, rel=1e-6)
            assert float(layer.bank.grad_squares.sum()) == pytest.approx(norm**2, rel=1e-6)

    runs.fit(model, data.train, config, [optimizer], mask_and_look)
    unit.check_untrained(optimizer)
    for layer, mask in unit.masks.items():
        master, codes = before[layer]
        moved = (layer.bank.master != master).unflatten(-1, (-1, 64)).any(-1)
        assert bool((mask | ~moved).all())
        assert bool(moved.any())
        recoded = (layer.bank.codes != codes).unflatten(-1, (-1, 32)).any(-1)
        assert bool((mask | ~recoded).all())
    optimizer.state[layer.anchor]["exp_avg"][0, ~mask[0].all(-1)] += 1.0
    with pytest.raises(ValueError, match="was not chosen has exp_avg"):
        unit.check_untrained(optimizer)


def test_block_importance_adds_up_to_the_neurons(data):
    config = runs.TrainConfig(**SHORT, density=0.02)
    model = runs._quantised({"format": "nf4"})
    runs._prepare(model, config)
    runs._enable_anchors(model)
    batches = runs._importance_batches(config, data)
    blocks = block_unit.block_importance(model, batches)
    neurons = runs.compute_importance(model, batches)
    for mine, theirs in zip(blocks, neurons):
        torch.testing.assert_close(mine.sum((2, 3)), theirs, rtol=1e-4, atol=0)


def test_lora_starts_as_nothing_and_alone_is_trained(data):
    model = runs._quantised({"format": "nf4"})
    ids = torch.stack(data.train[:2])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    config = runs.TrainConfig(**SHORT, learning_rate=0.01)
    runs._prepare(model, config)
    parameters = lora.add_lora(model, 8)
    assert sum(p.numel() for p in parameters) == 4 * 8 * ((128 + 128) + 2 * (128 + 64) + (128 + 128))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    runs.fit(model, data.train, config, [runs._adamw(parameters, 0.01, "lora", config)])
    assert all(bool((p != 0).any()) for p in parameters)
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    for name, value in frozen.items():
        assert torch.equal(after[name], value), name
    with torch.no_grad():
        assert float((model(input_ids=ids).logits - before).abs().max()) > 0.01
    with pytest.raises(ValueError, match="no q_proj"):
        lora.add_lora(torch.nn.Linear(2, 2), 8)


def test_a_run_without_a_loss_is_recorded_and_a_defect_is_not(short, monkeypatch):
    def raising(message):
        def run(*arguments):
            raise runs.UsafError(message)

        return run

    for message, outcome in (
        ("the training loss of step 3 is nan", "diverged"),
        ("steps with a gradient changed no trained weight: ...", "stalled"),
    ):
        monkeypatch.setitem(runs._KINDS, "neurons", raising(message))
        result = short("nf4_master", {"learning_rate": 0.02})
        assert (result["outcome"], result["error"]) == (outcome, message)
    monkeypatch.setitem(runs._KINDS, "neurons", raising("the store is damaged"))
    with pytest.raises(runs.UsafError, match="damaged"):
        short("nf4_master", {"learning_rate": 0.02})


@pytest.mark.parametrize(("ending", "status"), [("9", -9), ("2", 130)])
def test_a_killed_or_interrupted_study_leaves_no_process(tmp_path, ending, status):
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(STUDY)!r})\nimport core\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's children ignore it
        "def work(pool):\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        f"    os.kill(os.getpid(), {ending})\n"
        "    pool.submit(time.sleep, 0).result()\n"
        "if __name__ == '__main__':\n"
        "    core.with_pool(1, work)\n"
    )
    # The worker inherits stdout: run() returns only when it has ended too.
    done = subprocess.run([sys.executable, driver], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == status
    assert int(done.stdout) > 0


def test_the_studys_loop_refuses_what_it_does_not_do():
    config = runs.TrainConfig(**{**SHORT, "activation_threshold": 0.1})
    with pytest.raises(ValueError, match="activation_threshold: the study's own loop"):
        runs._prepare(torch.nn.Linear(2, 2), config)
