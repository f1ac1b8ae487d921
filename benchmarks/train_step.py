"""A training step: what our loop adds to the model's own work, and how fast a device trains the real sizes.

    python -m benchmarks.train_step                          on the CPU, at tiny size (train_loop.py)
    python -m benchmarks.train_step --device cuda            on a GPU, 2B and 5B with random weights (train_shapes.py)
    python -m benchmarks.train_step --device cuda --model 2b --attention sdpa --checkpointing none --compile on

Tables in Markdown, as BENCHMARKS.md has them; --json FILE keeps all figures. A GPU's rate of matrix products is
measured in the same process.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from benchmarks.train_loop import WAYS, measure_loop
from benchmarks.train_shapes import Models, Variant, measure_variant
from benchmarks.vae_measure import Machine

from mimir_train.config import ActivationCheckpointing
from mimir_train.model.config import AttentionName

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
    parser.add_argument("--model", nargs="+", choices=tuple(Models), default=("2b", "5b"), help="on a GPU")
    parser.add_argument("--attention", nargs="+", default=get_args(AttentionName), help="on a GPU")
    parser.add_argument("--checkpointing", nargs="+", default=get_args(ActivationCheckpointing), help="on a GPU")
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=("off", "on"), help="on a GPU")
    parser.add_argument("--steps-on-device", type=int, default=7, help="of a line, of which the median is taken")
    parser.add_argument("--json", type=Path, help="file to keep all figures in")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(options.device)
    figures: dict[str, Any] = {"machine": machine.name, "torch": torch.__version__}
    say(f"{machine.name}, torch {torch.__version__}")
    if machine.is_cuda or "tiny" in options.model:
        figures["shapes"] = measure_shapes(options, machine)
    else:
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


def measure_shapes(options: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """Every attention without the others' options, then checkpointing and compiling with torch's own; diffusers' last,
    each in the line's own way, so that what can be compared stands together.
    """
    say("")
    row("model", "whose", "attention", "checkpointing", "compiled", "optimizer", "step s", "TFLOP/s", "of matmul rate",
        "MFU", "memory GB", "note")  # fmt: skip
    row(*["---"] * 12)
    found = []
    for variant in variants_of(options):
        line = measure_variant(variant, machine, options.steps_on_device)
        found.append(line)
        print_shape(line)
    return found


def variants_of(options: argparse.Namespace) -> list[Variant]:
    """Those asked for; attention varies at each model's own checkpointing, so that the table stays within minutes."""
    variants = []
    for model in options.model:
        usual: ActivationCheckpointing = "selective" if model == "5b" else "none"
        for compiled in (name == "on" for name in options.compile):
            for attention in options.attention:
                if usual in options.checkpointing:
                    variants.append(Variant(model=model, ours=True, attention=attention, checkpointing=usual,
                                            compiled=compiled))  # fmt: skip
            for checkpointing in options.checkpointing:
                if checkpointing != usual:
                    variants.append(Variant(model=model, ours=True, checkpointing=checkpointing, compiled=compiled))
            variants += [
                Variant(model=model, ours=False, checkpointing="none", compiled=compiled),
                Variant(model=model, ours=False, checkpointing="full", compiled=compiled),
            ]
    return variants


def print_shape(line: dict[str, Any]) -> None:
    whose = "ours" if line["ours"] else "diffusers"
    cells = [line["model"], whose, line["attention"], line["checkpointing"], "yes" if line["compiled"] else "no"]
    if "fault" in line:
        row(*cells, *[""] * 6, line["fault"][:100])
        return
    mfu, memory = line["mfu"], line["memory_gb"]
    row(*cells, line["optimizer"], f"{line['step_s']:.3f}", f"{line['tflops']:.3g}", f"{line['of_matmul_rate']:.1%}",
        "" if mfu is None else f"{mfu:.1%}", "" if memory is None else f"{memory:.1f}", "")  # fmt: skip


def row(*cells: str) -> None:
    say("| " + " | ".join(cells) + " |")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
