"""The study's table and plot, from its results file alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import BUDGET, CELLS, GRID_FACTOR, QUESTIONS, SEEDS, VALIDATION_SEQUENCES, Cell, Question
from records import key_of, read_records
from state_bytes import PARTS
from study import standing

_IN_THE_MODEL = ("codes", "scales")


@dataclass(frozen=True)
class Row:
    """A complete cell: its runs at the best rate, one a seed, in the order of SEEDS."""

    cell: Cell
    rates: dict[str, float]
    runs: list[dict[str, Any]]
    grid_points: int

    def values(self, name: str) -> list[float]:
        """A loss by seed; not a number for a run that has none."""
        return [run["loss"][name] if run["outcome"] == "ok" else math.nan for run in self.runs]

    def bytes_per_parameter(self, parts: tuple[str, ...]) -> float:
        return sum(self.runs[0]["state_bytes"][part] for part in parts) / self.runs[0]["trained_parameters"]

    @property
    def state_per_parameter(self) -> float:
        return self.bytes_per_parameter(tuple(part for part in PARTS if part not in _IN_THE_MODEL))

    @property
    def total_bytes(self) -> float:
        return sum(self.runs[0]["state_bytes"].values())

    @property
    def failed(self) -> bool:
        return any(run["outcome"] != "ok" for run in self.runs)


def collect(records: list[dict[str, Any]], budget: dict[str, Any]) -> tuple[dict[str, Row], dict[str, str]]:
    """The complete cells by name, and for every other cell why it is none."""
    runs = {key_of(record["settings"], record["rates"], record["seed"]): record for record in records}
    now = standing(CELLS, budget, runs, {})
    rows, absent = {}, dict(now.failures)
    for cell in CELLS:
        where = now.progress.get(cell.name)
        if cell.name in absent:
            continue
        if where is None or where.best is None or where.missing:
            absent[cell.name] = "not run to its end"
            continue
        rates = cell.rates(where.best, now.best_rates)
        settings = cell.settings(budget)
        mine = [runs[key_of(settings, rates, seed)] for seed in SEEDS]
        rows[cell.name] = Row(cell, rates, mine, len(where.exponents))
    return rows, absent


def mean_and_spread(values: list[float], signed: bool = False) -> str:
    """Mean and standard deviation (of the sample)."""
    if any(math.isnan(value) for value in values):
        return "failed on a seed"
    mean = statistics.mean(values)
    return f"{mean:{'+' if signed else ''}.4f} ± {statistics.stdev(values):.4f}"


def difference(row: Row, baseline: Row, name: str) -> str:
    """Mean over seeds of (row - baseline) at the same seed, and its standard error."""
    differences = [a - b for a, b in zip(row.values(name), baseline.values(name))]
    if any(math.isnan(value) for value in differences):
        return "-"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"


def share_of_full(row: Row, full: Row | None) -> str:
    """Gain on the new text over the gain of full fine-tuning, both from their own start, mean over seeds."""
    if full is None or row.failed or full.failed:
        return "-"

    def gain(of: Row) -> float:
        return statistics.mean(of.values("new_before")) - statistics.mean(of.values("new_after"))

    return f"{100 * gain(row) / gain(full):.1f}%"


_HEADER = (
    "| | new text | difference to the first row | share of full's gain | old text | best rate (grid points) "
    "| state, B/parameter | codes + scales, B/parameter | all trained state, kB | trained parameters |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def _line(row: Row, baseline: Row | None, full: Row | None) -> str:
    rates = ", ".join(f"{row.rates[name]:.3g}" + _short(name) for name in sorted(row.rates))
    runs_ok = not row.failed
    return " | ".join(
        [
            f"| {row.cell.description}",
            mean_and_spread(row.values("new_after")),
            "" if baseline is row else "-" if baseline is None else difference(row, baseline, "new_after"),
            share_of_full(row, full),
            mean_and_spread(row.values("old_after")),
            f"{rates} ({row.grid_points})",
            f"{row.state_per_parameter:.2f}" if runs_ok else "-",
            f"{row.bytes_per_parameter(_IN_THE_MODEL):.2f}" if runs_ok else "-",
            f"{row.total_bytes / 1e3:.0f}" if runs_ok else "-",
            f"{row.runs[0]['trained_parameters']:,} |" if runs_ok else "- |",
        ]
    )


def _short(rate: str) -> str:
    return {"learning_rate": "", "router_learning_rate": " router", "lora_learning_rate": " LoRA"}[rate]


def _question(question: Question, rows: dict[str, Row], absent: dict[str, str]) -> list[str]:
    full, baseline = rows.get("full"), rows.get(question.cells[0])
    lines = ["", f"## {question.title}", ""]
    if question.note:
        lines += [question.note, ""]
    lines.append(_HEADER)
    lines += [_line(rows[name], baseline, full) for name in question.cells if name in rows]
    lines += ["", *(f"Not here: `{name}`: {absent[name]}." for name in question.cells if name in absent)]
    return lines


def _parts_table(rows: dict[str, Row]) -> list[str]:
    lines = [
        "",
        "## State by part, bytes a trained parameter",
        "",
        "`weights`: trained fp32 weights that are no expert codes (LoRA, router; all experts of `full`). "
        "`bookkeeping`: which rows, and their step counts.",
        "",
        "| | " + " | ".join(PARTS) + " | all | seconds a run |",
        "|---|" + "---|" * (len(PARTS) + 2),
    ]
    for row in rows.values():
        if row.failed:
            continue
        cells = [f"{row.bytes_per_parameter((part,)):.3f}" for part in PARTS]
        seconds = statistics.mean(run["training_seconds"] for run in row.runs)
        lines.append(
            f"| `{row.cell.name}` | " + " | ".join(cells) + f" | {row.bytes_per_parameter(PARTS):.3f} | {seconds:.1f} |"
        )
    return lines


def markdown(records: list[dict[str, Any]], budget: dict[str, Any]) -> str:
    rows, absent = collect(records, budget)

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(record[name]) for record in records}))

    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    lines = [
        "# Quality: the choices that the kernels must carry",
        "",
        f"Made by `python bench/quality/core.py table` from {len(records)} runs in `quality_core.jsonl`; see "
        "`bench/quality/README.md` for how. Loss in nats per token on held-out text after training, mean ± standard "
        f"deviation over {len(SEEDS)} seeds; differences are taken seed by seed, ± their standard error. Every run: "
        f"{budget['steps']} steps of {budget['batch_size']} x {budget['seq_len']} tokens. The rate is the best of a "
        f"grid (factor {GRID_FACTOR:g}) on the first seed, by {VALIDATION_SEQUENCES} sequences kept out of the new "
        "kind's training text; it is never at the grid's edge.",
        "",
        f"Commits: {all_of('commit')}. Versions: {'; '.join(versions)}. Dates: {all_of('date')}. Device: "
        f"{all_of('device')}.",
    ]
    for question in QUESTIONS:
        lines += _question(question, rows, absent)
    lines += _parts_table(rows)
    lines += ["", "![new text's loss against trained state](quality_core.png)"]
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, Row], path: Path) -> None:
    """Loss on the new text against all trained state in bytes, one point a cell, with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 8))
    points = []
    for row in rows.values():
        if row.failed:
            continue
        values = row.values("new_after")
        marker = {"neurons": "o", "blocks": "s", "lora": "^", "lora+neurons": "D", "full": "*"}[row.cell.kind]
        x, y = row.total_bytes, statistics.mean(values)
        axes.errorbar([x], [y], yerr=statistics.stdev(values), marker=marker, linestyle="none", capsize=2)
        points.append((y, x, row.cell.name))
    # Many cells lie close together: their names stand in one column, in the order of their losses, with lines to them.
    points.sort()
    for i, (y, x, name) in enumerate(points):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.04, (i + 0.5) / len(points)),
            textcoords="axes fraction",
            fontsize=8,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "alpha": 0.5},
        )
    axes.set_xscale("log")
    axes.set_xlabel("all trained state, codes included (bytes)")
    axes.set_ylabel("held-out loss on the new text (nats per token)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(results: Path) -> list[Path]:
    """Write the table and the plot beside `results`. Raises ValueError when there are no runs, or of several models."""
    records = read_records(results)[0] if results.is_file() else []
    if not records:
        raise ValueError(f"{results}: no runs yet; first: python bench/quality/core.py run")
    for name in ("model_fingerprint", "data_fingerprint"):
        if len({record[name] for record in records}) > 1:
            raise ValueError(f"{results} holds runs of different {name}s: they cannot be compared")
    table, picture = results.with_suffix(".md"), results.with_suffix(".png")
    table.write_text(markdown(records, BUDGET), encoding="utf-8")
    plot(collect(records, BUDGET)[0], picture)
    return [table, picture]
