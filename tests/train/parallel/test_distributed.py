"""Several processes train as one does. Gloo on the CPU; each test starts two ranks by torchrun."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mimir_precompute.encoders.base import Encoded
from mimir_train.loop import train
from tests.programs import environment
from tests.train.caches import CHANNELS, VIDEO, bf16, build_cache, make_feature, metrics_of, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(config_of: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Train on two ranks with the settings of another run's config.yaml."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "mimir_train", "run", "--preset", "tiny", "--config", str(config_of), "--output-dir", str(output),
               *options]  # fmt: skip
    variables = {**environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


def test_two_ranks_give_the_losses_of_one_process(small_cache: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    settings = {"data__validation_shards": 1, "run__validation_steps": 10, "run__max_train_steps": 20,
                "run__validation_samples": 2, "run__validation_clips": 6}  # fmt: skip
    train(tiny_config(small_cache, one, **settings))
    # micro-batches of two: gradients are exchanged once a step, after both
    done = torchrun(one / "config.yaml", tmp_path / "two", "--micro-batch-size", "2")
    assert done.returncode == 0, done.stderr
    expected, found = metrics_of(one), metrics_of(tmp_path / "two")
    assert [line["step"] for line in found] == list(range(20))
    for line, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
        assert other.get("validation/loss") == pytest.approx(line.get("validation/loss"), abs=1e-5)
    one_rank, two_ranks = ([line["tokens_per_s"] * line["step_s"] for line in lines] for lines in (expected, found))
    assert two_ranks == pytest.approx(one_rank)
    assert {line["slowest_rank"] for line in found} <= {0, 1}
    assert all(line["slowest_rank_s"] >= line["fastest_rank_s"] > 0 for line in found)
    assert done.stderr.count("clips in 1 bucket,") == 1  # one rank speaks
    assert "nothing to do" not in done.stdout + done.stderr


def test_a_non_finite_loss_on_one_rank_stops_all_and_names_rank_and_clip(tmp_path: Path) -> None:
    key = f"{VIDEO}-007"
    latents = make_feature("latents", key, VIDEO).tensors["vae_moments"].to_float32()
    latents[:CHANNELS] = 3e38
    latents[0, 0, 0, 0] = 0.0  # values that are all alike are quarantined
    cache = build_cache(tmp_path / "c", replace={(key, "latents"): Encoded(tensors={"vae_moments": bf16(latents)})})
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"data: {{cache: {cache}}}\nmodel: {{latent_scaling_factor: 2.0}}\n"
                        "run: {report_to: [], device: cpu, max_train_steps: 6}\n")  # fmt: skip
    done = torchrun(settings, tmp_path / "run")
    assert done.returncode == 1  # torchrun's own
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told, done.stderr
    assert all(re.search(rf"step \d: the loss is (nan|inf) on rank [01] for clip '{key}'", line) for line in told)
    assert re.search(r"exitcode\s*: 6", done.stderr)
    assert not (tmp_path / "run/checkpoints").exists()
