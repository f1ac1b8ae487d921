"""Several processes that train together, started without a launcher, so that none is ended by one.

As a program: a rank, which runs trainings one after another in one group of processes.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mimir_train.config import TrainConfig
from mimir_train.config_document import read_document, train_config, write_document
from tests.programs import environment


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return {**environment(), **{name: str(value) for name, value in variables.items()}}


def start_ranks(world_size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` once for each rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=rank_environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def train_on_ranks(world_size: int, configs: Sequence[TrainConfig], resume: str | None = None) -> list[str]:
    """Train each config in its output_dir, on ranks that are started once; gives what each rank wrote to stderr."""
    for config in configs:
        Path(config.run.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(config.run.output_dir) / "asked.yaml").write_text(write_document(config))
    files = [str(Path(config.run.output_dir) / "asked.yaml") for config in configs]
    ranks = start_ranks(world_size, "-m", "tests.train.ranks", resume or "", *files)
    told = [rank.communicate(timeout=240) for rank in ranks]
    for rank, (_, err) in zip(ranks, told, strict=True):
        assert rank.returncode == 0, err
    return [err for _, err in told]


def main() -> None:
    import torch
    import torch.distributed as dist

    from mimir_train.loop import train

    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    resume, *files = sys.argv[1:]
    for file in files:
        train(train_config(read_document(Path(file))), resume or None)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
