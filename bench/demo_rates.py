"""The demo's main run over the learning rates of bench/demo_model/baseline.py, to compare with full fine-tuning.

    python bench/demo_rates.py [--router frozen topk] [--learning-rate 1e-3 3e-3 1e-2 3e-2]

Appends one JSON line a run to bench/results/demo_rates.jsonl and prints a table. About half a minute a run on 2 cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer
from usaf_ext import __version__
from usaf_ext.checkpoint_source import ModelSource
from usaf_ext.demo import CONFIG, MODEL, expert_payload_bytes, run_once, texts
from usaf_ext.store import ExpertStore

RESULTS = Path(__file__).parent / "results" / "demo_rates.jsonl"
GRID = (1e-3, 3e-3, 1e-2, 3e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", nargs="+", choices=("frozen", "topk"), default=["frozen"])
    parser.add_argument("--learning-rate", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--router-learning-rate", type=float, default=CONFIG.router_learning_rate)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    data = texts(AutoTokenizer.from_pretrained(MODEL))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = ModelSource.open(MODEL)
        store = ExpertStore.quantize(source, "nf4")
        store.save(Path(scratch) / "store", source)
        budget = expert_payload_bytes(store) // 4
        for router in arguments.router:
            for rate in arguments.learning_rate:
                config = replace(
                    CONFIG, learning_rate=rate, router=router, router_learning_rate=arguments.router_learning_rate
                )
                out = Path(scratch) / f"{router}-{rate}"
                load_average = os.getloadavg()[0]
                _, result = run_once(
                    Path(scratch) / "store", budget, getattr(torch, arguments.dtype), config, data, out
                )
                new, old = result.evaluations["new"], result.evaluations["old"]
                row = {
                    "method": "usaf",
                    "router": router,
                    "learning_rate": rate,
                    "router_learning_rate": config.router_learning_rate if router != "frozen" else None,
                    "steps": config.steps,
                    "batch_tokens": config.batch_size * config.seq_len,
                    "density": result.density,
                    "loss_new_before": new[0],
                    "loss_new_after": new[config.steps],
                    "loss_old_before": old[0],
                    "loss_old_after": old[config.steps],
                    "tokens_per_second": result.tokens_per_second,
                    "dtype": arguments.dtype,
                    "seed": config.seed,
                    "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
                    "load_average_at_start": load_average,
                    "versions": {
                        "usaf_ext": __version__,
                        **{name: version(name) for name in ("torch", "transformers")},
                    },
                    "date": datetime.date.today().isoformat(),
                    "command": "python bench/demo_rates.py " + shlex.join(sys.argv[1:]),
                }
                rows.append(row)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print("| router | learning rate | new text | old text |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['router']} | {row['learning_rate']:g} "
            f"| {row['loss_new_before']:.4f} -> {row['loss_new_after']:.4f} "
            f"| {row['loss_old_before']:.4f} -> {row['loss_old_after']:.4f} |"
        )


if __name__ == "__main__":
    main()
