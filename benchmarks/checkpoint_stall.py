"""How long the steps stand still for a checkpoint: written in the background, and waited for.

    python benchmarks/checkpoint_stall.py [--gigabytes 0.001 0.3] [--repeats 5] [--folder DIR]

The state is that of one process: weights and two moments of AdamW for each, float32. The two ways take turns, so that
both meet the same disk; medians. "stands still" is what `CheckpointSaver.start` takes, "in place after" the time from
its call to the renamed folder. The first save in the background also takes the memory of its copy, and is shown apart.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from mimir_shared.wording import format_size
from mimir_train.checkpoint.folder import (
    CheckpointInfo,
    DataRecord,
    FileDigest,
    ObjectiveRecord,
    TextRecord,
    TrainingRecord,
)
from mimir_train.checkpoint.parts import CheckpointPart, ModelPart, OptimizerPart
from mimir_train.checkpoint.saver import CheckpointSaver, Kept
from mimir_train.parallel.launch import Place
from mimir_train.parallel.processes import Parallel

BACKGROUND, WAITED_FOR = "in the background", "waited for"
_WIDTH = 1024


def describe(step: int, files: Mapping[str, FileDigest]) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        preset="tiny",
        files=dict(files),
        training=TrainingRecord(order={}, config_sha256="0" * 64),
        data=DataRecord(snapshot="", features={}, buckets=(), fps=8.0, latent_scaling_factor=1.0, latents_std=1.0),
        objective=ObjectiveRecord(snr_shift_scale=1.0),
        transformer={},
        fuser={},
        text=TextRecord(t5_rows=1, empty_text="zeros"),
        ema=(),
        lora=None,
    )


def state_of(nbytes: float) -> tuple[dict[str, CheckpointPart], int]:
    """Parts of about so many bytes, in matrices of 4 MB at most."""
    rows_left = max(int(nbytes / 3 / 4 / _WIDTH), 1)
    layers = []
    while rows_left > 0:
        layers.append(torch.nn.Linear(_WIDTH, min(rows_left, _WIDTH), bias=False))
        rows_left -= _WIDTH
    model = torch.nn.ModuleList(layers)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parts: dict[str, CheckpointPart] = {"model": ModelPart(model), "optimizer": OptimizerPart(optimizer, model)}
    return parts, sum(tensor.nbytes for part in parts.values() for tensor in part.tensors().values())


def save(saver: CheckpointSaver, step: int) -> tuple[float, float]:
    """Seconds that the steps stand still, and until the checkpoint is in place."""
    started = time.perf_counter()
    saver.start(step)
    stood_still = time.perf_counter() - started
    saver.wait()
    return stood_still, time.perf_counter() - started


def measure(gigabytes: float, repeats: int, folder: Path) -> None:
    parts, nbytes = state_of(gigabytes * 1e9)
    alone = Parallel(place=Place(), device=torch.device("cpu"))
    seconds: dict[str, list[tuple[float, float]]] = {BACKGROUND: [], WAITED_FOR: []}
    savers = {
        way: CheckpointSaver(folder / way, parts, describe, alone, kept=Kept(newest=1), background=way == BACKGROUND)
        for way in seconds
    }
    first = {way: save(saver, 1)[0] for way, saver in savers.items()}
    for step in range(2, repeats + 2):
        for way, saver in savers.items():
            seconds[way].append(save(saver, step))
    for way, found in seconds.items():
        stood_still, in_place = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"| {format_size(nbytes)} | {way} | {stood_still:.3f} | {first[way]:.3f} | {in_place:.3f} |")  # noqa: T201
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.001, 0.3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| state | saved | stands still, s | the first, s | in place after, s |")  # noqa: T201
    print("|---|---|---|---|---|")  # noqa: T201
    for gigabytes in arguments.gigabytes:
        measure(gigabytes, arguments.repeats, Path(tempfile.mkdtemp(dir=arguments.folder)))


if __name__ == "__main__":
    main()
