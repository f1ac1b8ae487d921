"""A training step: what our loop adds to the model's own work, and how fast a device trains the real sizes.

    python -m benchmarks.train_step                          on the CPU, at tiny size (train_loop.py)
    python -m benchmarks.train_step --device cuda            on a GPU, 2B and 5B with random weights (train_shapes.py)
    python -m benchmarks.train_step --device cuda --model 2b --attention sdpa --checkpointing none --compile on

Tables in Markdown, as BENCHMARKS.md has them; --json FILE keeps all figures. A GPU's rate of matrix products is
measured before and after each line, in the same process.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.train_loop import WAYS, measure_loop
from benchmarks.vae_measure import Machine

WHAT_IT_IS = {
    "ours": "`mimir-train run`, all of it",
    "bare": "our model alone: forward, backward, optimizer",
    "plain": "diffusers' model in a loop by hand, clips in memory",
    "diffusers": "diffusers' model alone: forward, backward, optimizer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken")
    parser.add_argument("--steps", type=int, default=30, help="of a round")
    parser.add_argument("--json", type=Path, help="file to keep all figures in")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(options.device)
    figures: dict[str, Any] = {"machine": machine.name, "torch": torch.__version__}
    say(f"{machine.name}, torch {torch.__version__}")
    if not machine.is_cuda:
        figures["loop"] = measure_loop(options.rounds, options.steps)
        print_loop(figures["loop"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def print_loop(found: dict[str, Any]) -> None:
    say("")
    row("what", "wall ms a step", "ours over it, wall", "thread ms a step", "ours over it, thread")
    row(*["---"] * 5)
    for way in WAYS:
        ratios = found["ours_over"][way]
        cells = [f"{1000 * found[name][way]:.1f}" for name in ("median_s", "median_thread_s")]
        row(WHAT_IT_IS[way], cells[0], f"{ratios['wall']:.3f}x", cells[1], f"{ratios['thread']:.3f}x")
    say("")
    say(f"of our step's wall time, waiting for data: {found['data_wait_share']:.2%}")


def row(*cells: str) -> None:
    say("| " + " | ".join(cells) + " |")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
