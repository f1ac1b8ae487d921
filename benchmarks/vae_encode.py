"""What encoding costs: the fast VAE engine and diffusers' own `encode`, in one run, against the device's floor.

python -m benchmarks.vae_encode [--device auto] [--model real toy] [--size 9x64x96 …] [--dtype float32 bfloat16]
                                [--batch 1] [--repeats 5] [--layers] [--memory] [--through-encoder] [--json]
python -m benchmarks.vae_encode --numerics [--clips ../shared/clips]

Times are medians of runs that take turns. The floor is that of planning/vae_roofline.py at the rates of matrix
products and copies that are measured first. Without --size: small frames on a CPU, 49x480x720 on a GPU. `real` is the
VAE of CogVideoX with random weights, which take as long as trained ones.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from benchmarks.vae_measure import (
    Case,
    Machine,
    measure,
    measure_layers,
    measure_memory,
    measure_numerics,
    measure_through_encoder,
)

from mimir_precompute.config import Bucket
from mimir_precompute.device import choose_device
from mimir_precompute.encoders.arrays import keep_kernels_repeatable

CPU_SIZES = {"toy": ("1x64x96", "9x64x96", "17x64x96", "49x64x96", "9x240x368"), "real": ("1x64x96", "9x64x96")}
GPU_SIZES = {"toy": ("49x64x96",), "real": ("1x480x720", "9x480x720", "49x480x720")}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    keep_kernels_repeatable()
    machine = Machine(choose_device(options.device))
    report: dict[str, Any] = {"machine": machine.name, "date": str(date.today()), "torch": torch.__version__}
    say = Printer(silent=options.json)
    say.line(f"{machine.name}; torch {torch.__version__}; {report['date']}")
    if options.numerics:
        report["numerics"] = [row for model in options.model for row in measure_numerics(model, machine, options.clips)]
        say.numerics(report["numerics"])
    else:
        report["cases"] = [run_case(case, machine, options, say) for case in cases(options, machine)]
        report["rates"] = {dtype: asdict(machine.rates(dtype)) for dtype in options.dtype}
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", nargs="+", default=["toy", "real"], choices=["toy", "real"])
    parser.add_argument("--size", nargs="+", default=None, help="FxHxW")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="clips a launch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--layers", action="store_true", help="each block's kinds of layers against their floors")
    parser.add_argument("--each-layer", action="store_true", help="every layer by itself")
    parser.add_argument("--memory", action="store_true", help="peak memory on a CPU, in a process for each engine")
    parser.add_argument("--through-encoder", action="store_true", help="also bytes in to stored bfloat16 out")
    parser.add_argument("--numerics", action="store_true", help="errors against diffusers in float32, instead of times")
    parser.add_argument("--clips", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "clips")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def cases(options: argparse.Namespace, machine: Machine) -> list[Case]:
    sizes = GPU_SIZES if machine.is_cuda else CPU_SIZES
    return [
        Case(model=model, bucket=Bucket.parse(size), dtype=dtype, batch=options.batch)
        for model in options.model
        for size in options.size or sizes[model]
        for dtype in options.dtype
    ]


def run_case(case: Case, machine: Machine, options: argparse.Namespace, say: "Printer") -> dict[str, Any]:
    row: dict[str, Any] = measure(case, machine, options.repeats)
    if options.memory and not machine.is_cuda:
        row["peak_bytes"] = measure_memory(case)
    if options.through_encoder:
        row["through_encoder"] = measure_through_encoder(case, machine, clips=options.repeats)
    say.case(row)
    if options.layers or options.each_layer:
        row["layers"] = measure_layers(case, machine, each=options.each_layer)
        say.layers(row["layers"])
    return row


class Printer:
    """Tables in Markdown, as BENCHMARKS.md has them; nothing where a program reads."""

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self.has_header = False

    def line(self, text: str) -> None:
        if not self.silent:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def table_row(self, cells: Sequence[str]) -> None:
        self.line("| " + " | ".join(cells) + " |")

    def header(self, names: Sequence[str]) -> None:
        self.line("")
        self.table_row(names)
        self.table_row(["---"] * len(names))

    def case(self, row: dict[str, Any]) -> None:
        if not self.has_header:
            names = ("VAE", "size", "dtype", "batch", "TFLOP", "diffusers s", "fast s", "ratio", "floor s")
            self.header(
                [*names, "of floor", "of matmul rate", "difference", "peak MB: diffusers / fast", "in VaeEncoder"]
            )
            self.has_header = True
        peaks, through = row["peak_bytes"], row.get("through_encoder")
        self.table_row(
            [
                *(row["model"], row["size"], row["dtype"], str(row["batch"]), f"{row['tflop']:.3g}"),
                *(f"{row['diffusers_s']:.4f}", f"{row['fast_s']:.4f}", f"{row['ratio']:.2f}x", f"{row['floor_s']:.4f}"),
                *(f"{row['share_of_floor']:.0%}", f"{row['share_of_matmul_rate']:.0%}", f"{row['difference']:.1e}"),
                f"{peaks['diffusers'] / 1e6:.0f} / {peaks['fast'] / 1e6:.0f}" if peaks else "",
                f"{through['clip_s']:.4f} s, {through['busy']:.0%} busy" if through else "",
            ]
        )

    def layers(self, rows: Sequence[dict[str, Any]]) -> None:
        self.header(["layer", "kind", "TFLOP", "GB", "floor s", "fast s", "of floor"])
        for row in rows:
            share = f"{row['floor_s'] / row['fast_s']:.0%}" if row["floor_s"] and row["fast_s"] else ""
            amounts = [f"{row['tflop']:.3g}", f"{row['gbyte']:.3g}", f"{row['floor_s']:.5f}", f"{row['fast_s']:.5f}"]
            self.table_row([row["layer"], row["kind"], *amounts, share])
        self.line("")
        self.has_header = False

    def numerics(self, rows: Sequence[dict[str, Any]]) -> None:
        self.header(["VAE", "size", "clips", "engine", "error, rms / rms", "largest / largest"])
        for row in rows:
            cells = [row["model"], row["size"], str(row["clips"]), row["way"], f"{row['rms']:.2e}"]
            self.table_row([*cells, f"{row['largest']:.2e}"])


if __name__ == "__main__":
    main()
