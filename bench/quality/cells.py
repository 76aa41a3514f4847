"""What the study compares: its fixed budget, its cells, and the questions that group them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SEEDS = (0, 1, 2)  # the learning rate is tuned on the first
GRID_FACTOR = 2.0

# The budget of every run. A step is batch_size sequences; validation_sequences at the end of the training text are
# kept out of training and decide the learning rate, so that the held-out text decides nothing.
BUDGET = {
    "steps": 200,
    "batch_size": 8,
    "seq_len": 128,
    "importance_batches": 8,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 10,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "activation_threshold": 0.0,
}
VALIDATION_SEQUENCES = 128

KINDS = ("neurons", "blocks", "lora", "lora+neurons", "full")


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        name: unique. description: for the table.
        kind: "neurons": the library's own training loop. "blocks": quantisation blocks as the unit, emulated.
            "lora": LoRA on attention over the frozen quantised experts; "lora+neurons": together with ours.
            "full": every expert weight of the unquantised model in fp32.
        format: of the experts (not for "full"). config: TrainConfig fields, on top of BUDGET. lora_rank: r.
        start: the first grid is start / 2, start, start * 2.
        tuned: rates that a grid point x multiplies. inherited: rate -> cell whose best rate it starts from (1 for the
            others). A rate is the product: one rate is tuned by itself, two together by a common factor.
    """

    name: str
    description: str
    start: float
    kind: str = "neurons"
    format: str | None = "nf4"
    config: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    tuned: tuple[str, ...] = ("learning_rate",)
    inherited: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of cell {self.name}: expected one of {KINDS}, got {self.kind!r}")
        if self.start <= 0:
            raise ValueError(f"start of cell {self.name}: expected a positive rate, got {self.start}")

    def settings(self, budget: dict[str, Any]) -> dict[str, Any]:
        """All that decides a run's result but its rates and seed. Equal settings of two cells share their runs."""
        return {
            "kind": self.kind,
            "format": self.format,
            "lora_rank": self.lora_rank,
            "config": {**budget, **self.config},
            "validation_sequences": VALIDATION_SEQUENCES,
        }

    def point(self, exponent: int) -> float:
        return self.start * GRID_FACTOR**exponent

    def rates(self, exponent: int, best: dict[str, float]) -> dict[str, float]:
        """The rates of grid point `exponent`; best: cell name -> the rate it was tuned to."""
        x = self.point(exponent)
        return {
            rate: (best[self.inherited[rate]] if rate in self.inherited else 1.0) * (x if rate in self.tuned else 1.0)
            for rate in sorted({*self.tuned, *self.inherited})
        }


@dataclass(frozen=True)
class Question:
    """Cells that answer one question; the first is the baseline."""

    title: str
    cells: tuple[str, ...]
    note: str = ""


# The baseline, in full: a changed default of the library changes no cell.
_NEURONS = {
    "density": 0.02,
    "selection_scope": "model",
    "selection_metric": "gradient",
    "selection_sampling": "top",
    "mode": "master",
    "master_dtype": "bfloat16",
    "grad_dtype": "float32",
    "moments": "fp32",
    "router": "frozen",
}


def _mode(format: str, mode: str, start: float, rounding: str | None = None, **config: Any) -> Cell:
    suffix = "".join(f"_{part}" for part in (rounding, *config.values()) if part is not None)
    rounded = {} if rounding is None else {"rounding": rounding}
    what = mode if rounding is None else f"{mode}, {rounding}"
    return Cell(
        f"{format}_{mode}{suffix}",
        ", ".join([f"{format}, {what}", *(f"{key} {value}" for key, value in config.items())]),
        start,
        format=format,
        config={**_NEURONS, "mode": mode, **rounded, **config},
    )


def _selection(name: str, description: str, start: float, **config: Any) -> Cell:
    return Cell(name, description, start, config={**_NEURONS, **config})


BASE = "nf4_master"

CELLS: tuple[Cell, ...] = (
    *(
        cell
        for format in ("nf4", "int8")
        for cell in (
            _mode(format, "master", 0.02),
            _mode(format, "residual", 0.02),
            _mode(format, "eco", 0.02, "nearest"),
            _mode(format, "eco", 0.02, "stochastic"),
            _mode(format, "in_place", 0.08 if format == "nf4" else 0.02, "nearest"),
            _mode(format, "in_place", 0.02, "stochastic"),
        )
    ),
    _mode("nf4", "master", 0.02, master_dtype="float32"),
    Cell("unit_block", "blocks of 64, emulated", 0.02, kind="blocks", config=_NEURONS),
    _selection("select_gradient_weight", "|g*w|, top", 0.02, selection_metric="gradient_weight"),
    _selection("select_proportional", "|g|^2, sampled in proportion", 0.02, selection_sampling="proportional"),
    _selection("select_random", "random", 0.02, selection_metric="random"),
    _selection("density_0.5%", "0.5%", 0.02, density=0.005),
    _selection("density_1%", "1%", 0.02, density=0.01),
    _selection("density_5%", "5%", 0.02, density=0.05),
    _selection("threshold_0.1", "experts under 0.1 of the mean load get no gradient", 0.02, activation_threshold=0.1),
    _mode("nf4", "master", 0.02, moments="8bit"),
    _mode("nf4", "eco", 0.02, "stochastic", moments="8bit"),
    _mode("nf4", "master", 0.02, grad_dtype="bfloat16"),
    _mode("nf4", "eco", 0.02, "stochastic", moments="8bit", grad_dtype="bfloat16"),
    *(
        Cell(
            f"router_{router}",
            router,
            0.001,
            config={**_NEURONS, "router": router, "aux_loss_coef": 0.001},
            tuned=("router_learning_rate",),
            inherited={"learning_rate": BASE},
        )
        for router in ("topk", "gumbel")
    ),
    *(
        Cell(f"lora_r{rank}", f"LoRA on attention, r {rank}", start, kind="lora", lora_rank=rank,
             tuned=("lora_learning_rate",))
        for rank, start in ((8, 0.02), (32, 0.01))
    ),
    *(
        Cell(
            f"lora_r{rank}_and_neurons",
            f"LoRA r {rank} and neurons",
            0.5,
            kind="lora+neurons",
            config=_NEURONS,
            lora_rank=rank,
            tuned=("learning_rate", "lora_learning_rate"),
            inherited={"learning_rate": BASE, "lora_learning_rate": f"lora_r{rank}"},
        )
        for rank in (8, 32)
    ),
    Cell("full", "all expert weights, fp32, nothing quantised", 0.004, kind="full", format=None),
)  # fmt: skip

QUESTIONS: tuple[Question, ...] = (
    Question(
        "How a trained weight is kept: NF4",
        (
            BASE,
            "nf4_master_float32",
            "nf4_residual",
            "nf4_eco_nearest",
            "nf4_eco_stochastic",
            "nf4_in_place_nearest",
            "nf4_in_place_stochastic",
        ),
    ),
    Question(
        "How a trained weight is kept: int8",
        (
            "int8_master",
            "int8_residual",
            "int8_eco_nearest",
            "int8_eco_stochastic",
            "int8_in_place_nearest",
            "int8_in_place_stochastic",
        ),
    ),
    Question(
        "The unit: a neuron or a quantisation block",
        (BASE, "unit_block"),
        "The block unit is an emulation: whole neurons are attached, and the gradients of all blocks that were not "
        "chosen are zeroed before each step, so that as many parameters train as with neurons. Its bytes are those "
        "that a bank of blocks would need; its time means nothing.",
    ),
    Question(
        "Which neurons: importance or random", (BASE, "select_gradient_weight", "select_proportional", "select_random")
    ),
    Question("Density", (BASE, "density_0.5%", "density_1%", "density_5%")),
    Question(
        "Activation threshold", (BASE, "threshold_0.1"), "Off in every other cell; by the counts of the step before."
    ),
    Question(
        "Moments: fp32 or 8 bit; gradients: fp32 or bf16",
        (
            BASE,
            "nf4_master_8bit",
            "nf4_master_bfloat16",
            "nf4_eco_stochastic",
            "nf4_eco_stochastic_8bit",
            "nf4_eco_stochastic_8bit_bfloat16",
        ),
    ),
    Question(
        "Router: frozen, topk, gumbel",
        (BASE, "router_topk", "router_gumbel"),
        "The experts keep the baseline's learning rate; the grid is over the router's.",
    ),
    Question(
        "The peer: LoRA on attention (q, k, v, o)",
        (BASE, "lora_r8", "lora_r32", "lora_r8_and_neurons", "lora_r32_and_neurons", "full"),
        "LoRA is a minimal one written for this study (B = 0 at the start, scale 2), with torch's AdamW, over the same "
        "NF4 experts. Together with ours, both rates start from each one's own best and are tuned by a common factor.",
    ),
)


def cell_named(name: str) -> Cell:
    for cell in CELLS:
        if cell.name == name:
            return cell
    raise ValueError(f"no cell named {name!r}; there are {', '.join(cell.name for cell in CELLS)}")


def with_inherited(names: list[str]) -> list[Cell]:
    """The named cells and those whose rates they start from, in the study's order."""
    wanted: set[str] = set()
    todo = [cell_named(name) for name in names]
    while todo:
        cell = todo.pop()
        wanted.add(cell.name)
        todo.extend(cell_named(name) for name in cell.inherited.values() if name not in wanted)
    return [cell for cell in CELLS if cell.name in wanted]
