"""On a CUDA device, sharded through NCCL: averages and adapters train in bfloat16, stop, and go on."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from mimir_train.loop import train  # noqa: E402
from tests.train.caches import build_cache, losses_of, resumed_config, tiny_config  # noqa: E402
from tests.train.checkpoints import tensors_of  # noqa: E402
from tests.train.initial_transformer import write_transformer  # noqa: E402


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_with_an_average_are_trained_and_go_on(tmp_path: Path, strategy: str) -> None:
    cache, base = build_cache(tmp_path / "cache"), write_transformer(tmp_path / "base")
    settings = {
        "model__init_from": str(base), "model__fit_to_cache": False, "model__lora__rank": 4, "run__device": "cuda",
        "ema__profiles": ["power:0.1"], "run__precision": "bfloat16", "parallel__strategy": strategy,
        "data__validation_shards": 1, "run__validation_steps": 5,
    }  # fmt: skip
    train(tiny_config(cache, tmp_path / "whole", **settings))
    train(tiny_config(cache, tmp_path / "parts", **settings, run__stop_at_step=5))
    train(resumed_config(tmp_path / "parts"), "latest")
    # attention's backward adds in no fixed order there
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-2)
    for part in ("model", "optimizer", "ema"):
        whole, parts = (tensors_of(tmp_path / run / "checkpoints/step-00000010", part) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=5e-2, atol=5e-2)
