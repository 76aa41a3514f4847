"""What a finished run leaves beside its checkpoints: its result, and two plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .plots import plot_expert_load, plot_loss
from .router import CollapsedLayer, LoadTracker
from .run_folder import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to.

    Attributes:
        out_dir: the run folder. steps: optimizer steps. density: trained share of the expert neurons.
        trained_parameters: weights the optimizer updates (bank rows and routers); 0 for the control.
        evaluations: name -> {step: mean next-token loss in nats}, step 0 being the untouched model.
        tokens_per_second: over all steps of the log. load_entropy: per MoE layer over all steps, 1 is uniform.
        device: where it ran, for people.
        collapsed: layers with dead or swamping experts in the latest steps (see usaf_ext.collapse).
    """

    out_dir: Path
    steps: int
    trained_parameters: int
    density: float
    evaluations: dict[str, dict[int, float]]
    tokens_per_second: float
    load_entropy: list[float]
    device: str
    collapsed: list[CollapsedLayer]


def finish_run(
    run: RunFolder,
    load: LoadTracker,
    *,
    steps: int,
    trained_parameters: int,
    density: float,
    device: str,
    collapsed: list[CollapsedLayer],
) -> TrainResult:
    """Plot loss.png and expert_load.png into the run's folder and return its result; the rest comes from its log."""
    records = run.log_records()
    of_steps = [record for record in records if record["event"] == "step"]
    evaluations: dict[str, dict[int, float]] = {}
    for record in records:
        if record["event"] == "evaluation":
            evaluations.setdefault(record["name"], {})[record["step"]] = record["loss"]
    plot_loss(
        run.path / "loss.png",
        [record["step"] for record in of_steps],
        [record["loss"] for record in of_steps],
        {name: (list(losses), list(losses.values())) for name, losses in evaluations.items()},
    )
    plot_expert_load(run.path / "expert_load.png", load.share())
    return TrainResult(
        out_dir=run.path,
        steps=steps,
        trained_parameters=trained_parameters,
        density=density,
        evaluations=evaluations,
        tokens_per_second=sum(r["tokens"] for r in of_steps) / sum(r["seconds"] for r in of_steps),
        load_entropy=load.entropy(),
        device=device,
        collapsed=collapsed,
    )
