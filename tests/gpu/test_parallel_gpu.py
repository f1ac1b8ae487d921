"""On one CUDA device through NCCL: a sharded model trains, saves and goes on as a whole one does."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from mimir_train.loop import train  # noqa: E402
from tests.train.caches import build_cache, resumed_config, tiny_config  # noqa: E402


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("small") / "cache")


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nccl_and_fsdp_give_the_losses_of_the_plain_model(small_cache: Path, tmp_path: Path, precision: str) -> None:
    common = {"run__device": "cuda", "run__precision": precision, "run__max_train_steps": 20}
    train(tiny_config(small_cache, tmp_path / "plain", **common))
    train(tiny_config(small_cache, tmp_path / "sharded", parallel__strategy="fsdp",
                      parallel__activation_checkpointing="selective", **common))  # fmt: skip
    plain, sharded = losses_of(tmp_path / "plain"), losses_of(tmp_path / "sharded")
    # in bfloat16 the scales of norms are rounded too where blocks are sharded
    assert sharded == pytest.approx(plain, abs=1e-5 if precision == "float32" else 2e-3)


def test_a_sharded_run_goes_on_from_its_checkpoint(small_cache: Path, tmp_path: Path) -> None:
    common = {"run__device": "cuda", "parallel__strategy": "fsdp", "run__max_train_steps": 10}
    train(tiny_config(small_cache, tmp_path / "whole", **common))
    train(tiny_config(small_cache, tmp_path / "parts", run__stop_at_step=5, **common))
    train(resumed_config(tmp_path / "parts"), "latest")
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-5)


def test_compiled_blocks_give_the_same_losses_on_the_device(small_cache: Path, tmp_path: Path) -> None:
    common = {"run__device": "cuda", "run__max_train_steps": 5, "parallel__activation_checkpointing": "selective"}
    train(tiny_config(small_cache, tmp_path / "plain", **common))
    train(tiny_config(small_cache, tmp_path / "compiled", parallel__compile=True, **common))
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), abs=1e-4)
