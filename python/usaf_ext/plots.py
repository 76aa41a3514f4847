"""Plots of a run, drawn off screen without touching the caller's matplotlib settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DOTS_PER_INCH = 150


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_loss(
    path: str | Path,
    steps: Sequence[int],
    losses: Sequence[float],
    evaluations: dict[str, tuple[Sequence[int], Sequence[float]]] | None = None,
) -> None:
    """Write a PNG of the training loss per step, with held-out losses by name -> (steps, losses)."""
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    if len(steps):
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
        window = max(1, len(losses) // 20)
        if window > 1:
            padded = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)
            axes.plot(steps[window - 1 :], padded, color="tab:blue", label=f"training, mean of {window} steps")
    for color, (name, (at, values)) in zip(
        ("tab:red", "tab:green", "tab:purple", "tab:brown"), (evaluations or {}).items()
    ):
        axes.plot(at, values, marker="o", color=color, label=f"held out: {name}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats a token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_expert_load(path: str | Path, share: torch.Tensor) -> None:
    """Write a PNG heat map of `share` [num_layers, num_experts], each row a layer's share of tokens per expert.

    Colours are relative to the uniform share 1 / num_experts, which is white.
    """
    num_layers, num_experts = share.shape
    figure = _figure(min(12.0, 3 + 0.14 * num_experts), min(9.0, 2 + 0.3 * num_layers))
    axes = figure.add_subplot()
    relative = share.double().cpu() * num_experts
    image = axes.imshow(relative.numpy(), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Tokens per expert over the uniform share (1 = {1 / num_experts:.2%})", fontsize="medium")
    bar = figure.colorbar(image, ax=axes, extend="max")
    bar.set_label("times uniform")
    figure.savefig(path, dpi=DOTS_PER_INCH)
