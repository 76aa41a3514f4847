"""A training step of Qwen3-30B-A3B on cards that are not here: the real pager and the real order of the expert layers'
work on a virtual-time device, with assumed durations of kernels and copies. A simulation of the schedule, not a
measurement.

    python bench/timeline.py [--cards rx6750xt rtx3060] [--tokens 512 2048 8192] [--budgets 4 8 11] [--out DIR]

Writes timeline.md, timeline.json and timeline.png to DIR (bench/results). Needs a C++ compiler; takes about a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cards import CARDS, Card, Host, Model, qwen3_30b_a3b
from simulated_step import Simulation, Step, random_routing, slots_in
from timeline_plot import Lanes, plot_steps

RESULTS = Path(__file__).parent / "results"
STEPS = 3  # the last is shown: by then the pages that a step leaves on the card are those of the steps to come


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--tokens", nargs="+", type=positive_int, default=[512, 2048, 8192], help="tokens a step")
    parser.add_argument(
        "--budgets", nargs="+", type=positive_int, default=[4, 8, 11], help="GiB for pages and decode scratch"
    )
    parser.add_argument("--density", type=share, default=0.01, help="share of the neurons that is trained")
    parser.add_argument(
        "--gemm-share", type=share, help="share of the peak that GEMMs reach, instead of the cards' own"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the routing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(arguments)
    if not parsed.out.is_dir():
        parser.error(f"argument --out: expected a folder that exists, got {str(parsed.out)!r}")
    return parsed


def simulate(
    model: Model, card: Card, num_tokens: int, budget: int, density: float, seed: int
) -> tuple[dict[str, Any], Lanes]:
    """The last of STEPS steps: its figures, and what ran when."""
    num_slots = slots_in(model, budget << 30)
    with Simulation(model, card, num_tokens, num_slots, density) as simulation:
        for number in range(STEPS):
            step = simulation.step(random_routing(model, num_tokens, seed + number))
        lanes = Lanes.of(simulation.schedule.spans(), step.begin, step.begin + step.forward.seconds)
    if step.wrong_reads:
        raise RuntimeError(f"{step.wrong_reads} kernels read a page that was not there")
    return {
        "card": card.name,
        "tokens": num_tokens,
        "budget_gib": budget,
        "slots": num_slots,
        **_figures(step, num_tokens),
        "overlap_percent": 100 * lanes.overlap() if step.bytes_in else None,
    }, lanes


def _figures(step: Step, num_tokens: int) -> dict[str, Any]:
    return {
        "step_seconds": step.seconds,
        "tokens_per_second": num_tokens / step.seconds,
        "bytes_in": step.bytes_in,
        "stall_seconds": step.forward.stall_seconds + step.backward.stall_seconds,
        "backward_stall_seconds": step.backward.stall_seconds,
        "launch_seconds": step.forward.launch_seconds + step.backward.launch_seconds,
        "bound_seconds": step.bound,
        "over_bound": step.seconds / step.bound,
        "forward": asdict(step.forward),
        "backward": asdict(step.backward),
    }


def header(model: Model, cards: list[Card], density: float, command: str) -> list[str]:
    host = Host()
    lines = [
        "# A step's timeline, simulated",
        "",
        "**A simulation of the schedule with assumed rates, not a measurement: no such card was at hand.** The pager "
        "and the order of the expert layers' work are the real code; kernels and copies take the times below.",
        "",
        f"Model: {model.name}, {model.num_layers} layers x {model.num_experts} experts, pages of NF4, "
        f"{model.page_bytes * model.num_pages / 1e9:.1f} GB in all; density {density:.1%}; gradient checkpointing. A "
        "step is forward and backward of one micro-batch, without the optimiser's update (which moves no page).  ",
        "Budget: pages and decode scratch alone. Whether dense part, trained state and activations fit beside it is "
        "not looked at: on a 12 GB card they do not beside 11 GiB, unless they shrink or live elsewhere.  ",
        "Routing: each layer's experts at random popularities (log-normal, sigma 1), 5% of them without a token.  ",
        f"Command: `{command}`  ",
        f"Date: {datetime.date.today().isoformat()}",
        "",
        "| card | peak | GEMMs reach (assumed) | memory, of it reached (assumed) | link, usable | peaks from |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {card.name} | {card.peak_flops / 1e12:.1f} TFLOP/s {card.compute} | {card.gemm_share:.0%} "
        f"| {card.memory_bandwidth / 1e9:.0f} GB/s, {card.memory_share:.0%} "
        f"| {card.link}, {card.link_bandwidth / 1e9:.0f} GB/s | {card.sources} |"
        for card in cards
    ]
    return [
        *lines,
        "",
        f"Host (assumed): {host.call_seconds * 1e6:.0f} us a launch or copy, {host.event_seconds * 1e6:.0f} us an "
        f"event's record or wait, {host.wake_seconds * 1e6:.0f} us to go on behind an event, {host.queue_depth} "
        "launches or copies queued on a stream. The usable rate of the link is what pinned copies of megabytes reach "
        "elsewhere. "
        "Durations are roofs (`bench/cards.py` has the formulas): FLOPs at the share of the peak, bytes at the share "
        "of the bandwidth; GEMMs of few rows will be slower than that.",
        "",
        "bound: the longer of kernels and copies in forward, plus the same of backward. stall: kernels that wait for "
        "nothing but a copy. launch: kernels that wait for nothing but the host. overlap: the share of the copies' "
        "time in which kernels run.",
        "",
        "| card | tokens | budget | step | tokens/s | bytes in | stall | launch | overlap | step / bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]


def row_text(row: dict[str, Any]) -> str:
    overlap = "" if row["overlap_percent"] is None else f"{row['overlap_percent']:.0f}%"
    return (
        f"| {row['card']} | {row['tokens']} | {row['budget_gib']} GiB | {row['step_seconds']:.3f} s "
        f"| {row['tokens_per_second']:.0f} | {row['bytes_in'] / 1e9:.1f} GB | {row['stall_seconds'] * 1e3:.0f} ms "
        f"| {row['launch_seconds'] * 1e3:.0f} ms | {overlap} | {row['over_bound']:.3f} |"
    )


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    model = qwen3_30b_a3b()
    cards = [CARDS[name] for name in options.cards]
    if options.gemm_share is not None:
        cards = [replace(card, gemm_share=options.gemm_share) for card in cards]
    rows, panels = [], []
    for card in cards:
        for num_tokens in options.tokens:
            for budget in options.budgets:
                row, lanes = simulate(model, card, num_tokens, budget, options.density, options.seed)
                rows.append(row)
                panels.append((f"{card.name}, {num_tokens} tokens, {budget} GiB", lanes))
    lines = header(model, cards, options.density, shlex.join(["python", "bench/timeline.py", *arguments]))
    lines += map(row_text, rows)
    lines += ["", "![The same steps: how busy the link (above) and the card (below) are](timeline.png)", ""]
    text = "\n".join(lines)
    record = {
        "note": "simulation of the schedule with assumed rates, not a measurement",
        "model": asdict(model),
        "cards": [asdict(card) for card in cards],
        "host": asdict(Host()),
        "density": options.density,
        "seed": options.seed,
        "rows": rows,
    }
    (options.out / "timeline.md").write_text(text, encoding="utf-8")
    (options.out / "timeline.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot_steps(options.out / "timeline.png", panels, columns=len(options.budgets))
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
