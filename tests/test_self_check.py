"""`usaf-ext info --check`: passes here, and tells what is wrong where something is."""

from __future__ import annotations

import pytest
import torch
from usaf_ext import ops, self_check
from usaf_ext.cli import main


def test_all_pass_on_the_cpu(capsys):
    assert main(["info", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    passed = [line for line in lines if line.startswith("pass")]
    assert len(passed) == len(self_check.devices()) * len(self_check.checks())
    assert lines[-1] == f"{len(passed)} checks against the CPU's plain path, 0 failed"


def _only(monkeypatch, name: str) -> None:
    monkeypatch.setattr(self_check, "devices", lambda: [torch.device("cpu")])
    chosen = [check for check in self_check.checks() if check.name == name]
    assert len(chosen) == 1
    monkeypatch.setattr(self_check, "checks", lambda: chosen)


@pytest.mark.parametrize(
    ("name", "op", "change"),
    [
        ("codec nf4", "dequantize_blocks", 1e-6),
        ("gather, scatter, backward", "expert_scatter", 0.1),
        ("glu silu", "glu", float("nan")),
    ],
)
def test_a_wrong_result_fails(monkeypatch, capsys, name, op, change):
    _only(monkeypatch, name)
    right, calls = getattr(ops, op), []

    def wrong(*arguments):
        calls.append(arguments)
        result = right(*arguments)
        return result if len(calls) <= expected_calls else result + change

    expected_calls = 3 if op == "dequantize_blocks" else 1  # those of the reference, which stays right
    monkeypatch.setattr(ops, op, wrong)
    assert main(["info", "--check"]) == 1
    out = capsys.readouterr().out
    assert f"FAIL   cpu ({self_check._C.detected_isa()})" in out.splitlines()[-3]
    assert out.splitlines()[-1].endswith("1 failed")


@pytest.mark.parametrize(("hip", "status"), [(None, 1), ("7.0", 0)])
def test_a_second_sweep_must_repeat_the_first(monkeypatch, capsys, hip, status):
    """To the bit; on ROCm, whose GEMMs may add in any order, within the tolerance."""
    _only(monkeypatch, "paged expert layer")
    right, calls = self_check.PagedExperts.forward, []

    def drifting(*arguments):
        calls.append(arguments)
        return right(*arguments) * (1.0 if len(calls) <= 2 else 1.0 + 1e-6 * len(calls))  # two of the reference

    monkeypatch.setattr(self_check.PagedExperts, "forward", drifting)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert main(["info", "--check"]) == status
    assert ("a second sweep of the same pages" in capsys.readouterr().out) == bool(status)


def test_an_op_without_a_kernel_is_absent_and_an_error_is_reported(monkeypatch, capsys):
    cpu = torch.device("cpu")
    runs = iter([[torch.zeros(1)], NotImplementedError("no kernel"), [torch.zeros(1)], RuntimeError("launch failed")])

    def run(device):
        result = next(runs)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(self_check, "devices", lambda: [cpu])
    monkeypatch.setattr(self_check, "checks", lambda: [self_check.Check(name, run, True) for name in ("one", "two")])
    outcomes = list(self_check.run_checks())
    assert [outcome.status for outcome in outcomes] == ["absent", "FAIL"]
    assert outcomes[1].detail == "RuntimeError: launch failed"
