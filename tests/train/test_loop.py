"""The training loop: it learns, goes on bit for bit, stops before harm, and refuses what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mimir_precompute.encoders.base import Encoded
from mimir_shared.errors import CacheError, InputError, MachineError, NonFiniteLossError
from mimir_shared.fingerprint import differences
from mimir_train.cache_reader import open_cache
from mimir_train.checkpoint.folder import read_checkpoint_info
from mimir_train.config_document import train_config
from mimir_train.loop import TrainOutcome, train
from mimir_train.model.config import DiTConfig
from mimir_train.model.dit import DiT
from mimir_train.order.clip_order import TrainingOrder
from mimir_train.weights.transformer_folder import save_transformer
from tests.train.caches import (
    CHANNELS,
    IMAGE,
    T5_WIDTH,
    VIDEO,
    bf16,
    build_cache,
    losses_of,
    make_feature,
    metrics_of,
    resumed_config,
    tiny_config,
)
from tests.train.checkpoints import tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_by(outcome: TrainOutcome) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint that training changes."""
    assert outcome.checkpoint is not None
    tensors = tensors_of(outcome.checkpoint)
    assert {name.partition(".")[0] for name in tensors} == {"model", "optimizer", "random"}
    return tensors


def save_random_transformer(folder: Path, **sizes: int) -> Path:
    """A diffusers folder that fits the small cache, but for `sizes`."""
    fitting = {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_embed_dim": T5_WIDTH}
    config = DiTConfig(num_attention_heads=2, attention_head_dim=16, num_layers=1, **{**fitting, **sizes})
    save_transformer(config, DiT(config).state_dict(), folder)
    return folder


# --- learning -----------------------------------------------------------------------------------------------------


def test_training_learns(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=200, run__checkpointing_steps=200))
    losses = losses_of(tmp_path / "run")
    early, late = np.mean(losses[:20]), np.mean(losses[149:])
    assert late <= 0.6 * early, f"{late:.3f} after {early:.3f}"
    figures = metrics_of(tmp_path / "run")
    assert figures[0]["fuser/decoder_zero_proj_norm"] == 0.0  # the LLM's branch starts shut, and opens
    assert figures[180]["fuser/decoder_zero_proj_norm"] > 0.1
    assert figures[180]["fuser/encoder_zero_proj_norm"] > 0.1


@pytest.mark.parametrize("fuser", ["baseline", "direct", "norm_ss"])
def test_other_fusers_train_too(small_cache: Path, tmp_path: Path, fuser: str) -> None:
    outcome = train(tiny_config(small_cache, tmp_path / "run", model__fuser=fuser, run__max_train_steps=2))
    assert outcome.checkpoint is not None
    info = read_checkpoint_info(outcome.checkpoint)
    assert info.fuser["switches"]["stabilizer"] == (fuser == "norm_ss")


def test_the_stabilizer_waits_for_its_step(small_cache: Path, tmp_path: Path) -> None:
    def trained(name: str, **settings: object) -> tuple[list[float], list[torch.Tensor]]:
        common = {"run__max_train_steps": 8, "run__checkpointing_steps": 1, "optimizer__warmup_steps": 0}
        train(tiny_config(small_cache, tmp_path / name, **common, **settings))
        models = [tensors_of(path, "model") for path in sorted((tmp_path / name).glob("checkpoints/step-*"))]
        offsets = "model.fuser.stabilizer_offsets"
        return losses_of(tmp_path / name), [model[offsets] for model in models if offsets in model]

    late, late_offsets = trained("late", model__stabilizer_start_step=6)
    without, _ = trained("without", model__fuser="norm_zeroconv")
    early, early_offsets = trained("early")
    assert late[:6] == pytest.approx(without[:6], abs=1e-6)  # until then it is the fuser without a stabilizer
    assert late[7] != pytest.approx(without[7], abs=1e-6)
    assert early[5] != pytest.approx(without[5], abs=1e-6)
    assert torch.equal(late_offsets[0], late_offsets[5])
    assert not torch.equal(late_offsets[5], late_offsets[6])
    assert not torch.equal(early_offsets[0], early_offsets[5])


def test_metrics_have_one_object_a_step_with_all_figures(small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(
        small_cache, tmp_path / "run", run__max_train_steps=5, data__validation_shards=1, run__validation_steps=2,
        run__report_to=["tensorboard"],
    )  # fmt: skip
    train(config)
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 2]  # 16 clips of two shards, 8 a step
    for line in lines:
        assert {"loss", "grad_norm", "lr", "lr_fuser", "step_s", "data_wait_s", "samples_per_s"} <= line.keys()
    judged = [line["step"] for line in lines if "validation/loss" in line]
    assert judged == [1, 3, 4]  # after steps two and four, and at the end
    assert {f"validation/loss_t{t}" for t in (100, 300, 500, 700, 900)} <= lines[1].keys()
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_validation_loss_does_not_depend_on_micro_batches_or_time(small_cache: Path, tmp_path: Path) -> None:
    def judged(name: str, **settings: object) -> float:
        config = tiny_config(
            small_cache, tmp_path / name, data__validation_shards=1, run__max_train_steps=1,
            optimizer__learning_rate=1e-12, optimizer__fuser_learning_rate=1e-12, **settings,
        )  # fmt: skip
        train(config)
        return float(metrics_of(tmp_path / name)[0]["validation/loss"])

    first = judged("a")
    assert judged("b", data__micro_batch_size=2) == pytest.approx(first, abs=1e-6)


def test_held_out_clips_are_never_trained_on(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "run", data__validation_shards=1, run__max_train_steps=1))
    cache = open_cache(str(small_cache))
    order = TrainingOrder(cache.buckets((2,)), seed=42, global_batch_size=8)
    assert order.steps_per_epoch == 2
    assert all(place.shard < 2 for step in range(6) for place in order.batch(step).places)
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["data"]["validation_shards"] == 1


def test_holding_out_every_shard_is_refused(small_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--validation-shards 3: the cache has 3 shards"):
        train(tiny_config(small_cache, tmp_path / "run", data__validation_shards=3))


def test_the_cached_empty_prompt_can_stand_for_dropped_text(small_cache: Path, tmp_path: Path) -> None:
    common = {"objective__text_dropout": 1.0, "run__max_train_steps": 3}
    train(tiny_config(small_cache, tmp_path / "zeros", **common))
    outcome = train(tiny_config(small_cache, tmp_path / "cached", data__empty_text="cached", **common))
    assert losses_of(tmp_path / "zeros")[-1] != losses_of(tmp_path / "cached")[-1]
    assert outcome.checkpoint is not None
    assert read_checkpoint_info(outcome.checkpoint).text.empty_text == "cached"


def test_several_buckets_are_trained_and_a_small_one_is_left_out_aloud(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = build_cache(tmp_path / "c", {VIDEO: 9, IMAGE: 8, "5x32x32": 3}, shard_size=10)
    outcome = train(tiny_config(cache, tmp_path / "run", data__global_batch_size=4, run__max_train_steps=4))
    assert {line["bucket"] for line in metrics_of(tmp_path / "run")} == {VIDEO, IMAGE}
    told = capfd.readouterr().err
    assert "bucket 5x32x32 is left out: it has 3 clips, fewer than a batch of 4" in told
    assert f"bucket {VIDEO}: 1 clip is left over in every epoch" in told
    assert outcome.checkpoint is not None
    assert set(read_checkpoint_info(outcome.checkpoint).data.buckets) == {VIDEO, IMAGE}


# --- going on -----------------------------------------------------------------------------------------------------


def test_ten_steps_are_five_and_five_more_bit_for_bit(small_cache: Path, tmp_path: Path) -> None:
    whole = train(tiny_config(small_cache, tmp_path / "whole"))
    train(tiny_config(small_cache, tmp_path / "parts", run__stop_at_step=5))
    rest = train(resumed_config(tmp_path / "parts"), "latest")
    assert (whole.steps_done, rest.steps_done) == (10, 10)
    expected, found = saved_by(whole), saved_by(rest)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


def test_going_on_from_an_earlier_step_drops_the_metrics_behind_it(small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(small_cache, tmp_path / "run", run__max_train_steps=6, run__checkpointing_steps=2)
    train(config)
    first = losses_of(tmp_path / "run")
    train(resumed_config(tmp_path / "run"), "2")
    assert losses_of(tmp_path / "run") == first
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (2, 4, 6)]
    assert train(resumed_config(tmp_path / "run"), "latest").checkpoint is None  # all six steps are there
    with pytest.raises(InputError, match="has only step-00000002, step-00000004, step-00000006"):
        train(resumed_config(tmp_path / "run"), "5")


def test_a_checkpoint_of_another_run_can_be_gone_on_from(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "one", run__max_train_steps=4))
    longer = train(resumed_config(tmp_path / "one", run__max_train_steps=6), "latest")
    start = tmp_path / "one/checkpoints/step-00000004"
    other = train(resumed_config(tmp_path / "two", str(start), run__max_train_steps=6), str(start))
    expected, found = saved_by(longer), saved_by(other)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_latest_of_a_run_without_checkpoints_begins_anew_aloud(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1), "latest").steps_done == 1
    assert "no checkpoint to go on from; this is a new training" in capfd.readouterr().err


def test_a_run_that_goes_on_says_from_which_checkpoint(
    small_cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1))
    assert "\ntransformer from scratch" in capfd.readouterr().err
    train(resumed_config(tmp_path / "run", run__max_train_steps=2), "latest")
    told = capfd.readouterr().err
    assert told.startswith(f"goes on from {tmp_path}/run/checkpoints/step-00000001\n")
    assert "\ntransformer that began from scratch" in told


def test_a_run_is_not_written_over(small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1)
    train(config)
    with pytest.raises(
        InputError, match=r"holds a training already \(step-00000001\).*--resume-from-checkpoint latest"
    ):
        train(config)


def test_going_on_with_other_settings_is_refused_naming_them(small_cache: Path, tmp_path: Path) -> None:
    train(tiny_config(small_cache, tmp_path / "run", run__max_train_steps=1))
    changed = resumed_config(tmp_path / "run", run__seed=43, optimizer__clip_norm=0.5)
    with pytest.raises(InputError, match=r"optimizer.clip_norm: 1.0 → 0.5; run.seed: 42 → 43"):
        train(changed, "latest")


def test_the_snapshot_is_pinned(small_cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_cache, tmp_path / "copy"))
    train(tiny_config(copy, tmp_path / "run", run__max_train_steps=1))
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["data"]["snapshot"] == open_cache(str(copy)).snapshot.digest
    shutil.rmtree(copy / "snapshots")
    other = build_cache(tmp_path / "other", {VIDEO: 16})
    config = resumed_config(tmp_path / "run", data__cache=str(other))
    with pytest.raises(CacheError, match=r"snapshot .* is not here; .* give the cache that the run began with"):
        train(config, "latest")


def test_config_yaml_leaves_nothing_open_and_repeats_the_run(small_cache: Path, tmp_path: Path) -> None:
    config = tiny_config(small_cache, tmp_path / "run", run__max_train_steps=2)
    train(config)
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["model"]["latent_scaling_factor"] == pytest.approx(1.0, abs=0.2)
    assert written["model"]["t5_rms"] == pytest.approx(1.0, abs=0.2)
    assert written["model"]["transformer"]["in_channels"] == CHANNELS
    assert written["model"]["transformer"]["text_embed_dim"] == T5_WIDTH
    again = {**written, "run": {**written["run"], "output_dir": str(tmp_path / "again")}}
    train(train_config(again))
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "run")
    repeated = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert [name for name, _, _ in differences(written, repeated)] == ["run.output_dir"]


# --- what must not be trained -------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A cache with one clip whose latents are so large that its loss is not finite."""
    key = f"{VIDEO}-007"
    latents = make_feature("latents", key, VIDEO).tensors["vae_moments"].to_float32()
    latents[:CHANNELS] = 3e38
    latents[0, 0, 0, 0] = 0.0  # values that are all alike are quarantined
    return build_cache(
        tmp_path / "poisoned", replace={(key, "latents"): Encoded(tensors={"vae_moments": bf16(latents)})}
    )


def test_a_non_finite_loss_stops_before_the_optimizer_and_names_the_clip(poisoned: Path, tmp_path: Path) -> None:
    config = tiny_config(
        poisoned, tmp_path / "run", model__latent_scaling_factor=2.0, run__checkpointing_steps=1, run__max_train_steps=6
    )
    with pytest.raises(
        NonFiniteLossError,
        match=r"step \d: the loss is (nan|inf) on rank 0 for clip '9x32x32-007' "
        r"\(shard 0, row 7, source 9x32x32-007.mp4\)",
    ) as e:
        train(config)
    assert e.value.exit_code == 6
    # a run that goes on may not change its rates, so that cannot be the advice
    assert str(e.value).endswith("lower rates, in another --output-dir: one that goes on keeps its own")
    steps = [line["step"] for line in metrics_of(tmp_path / "run")] if (tmp_path / "run/metrics.jsonl").exists() else []
    bad_step = int(str(e.value).split("step ")[1].split(":")[0])
    assert steps == list(range(bad_step))  # nothing was recorded of the step, and nothing saved
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved == [f"step-{step:08d}" for step in range(1, bad_step + 1)]
    for path in (tmp_path / "run/checkpoints").rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_a_non_finite_gradient_stops_before_the_optimizer_too(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(gradients: Any) -> torch.Tensor:
        return torch.tensor(float("inf"))

    def no_step(*_: object) -> None:
        raise AssertionError("the optimizer stepped")

    monkeypatch.setattr("torch.nn.utils.get_total_norm", poison)
    monkeypatch.setattr("torch.optim.AdamW.step", no_step)
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 0: the norm of the gradient over all ranks is inf, though all losses are finite; the largest of "
        r"each rank: 1\.\d+ on rank 0 for clip '9x32x32-\d+' \(shard \d, row \d, source 9x32",
    ):
        train(tiny_config(small_cache, tmp_path / "run"))


def test_a_batch_larger_than_every_bucket_is_refused(small_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--global-batch-size 25 is larger than every bucket.*9x32x32 has 24"):
        train(tiny_config(small_cache, tmp_path / "run", data__global_batch_size=25))
    assert not (tmp_path / "run").exists()


def test_a_fuser_that_needs_llm_is_refused_on_a_cache_without(tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "c", features=("latents", "t5"))
    with pytest.raises(InputError, match=r"--fuser mimir reads the feature `llm`, which .* does not have"):
        train(tiny_config(cache, tmp_path / "run"))
    assert train(tiny_config(cache, tmp_path / "run", model__fuser="baseline", run__max_train_steps=1)).steps_done == 1


def test_training_goes_on_from_a_diffusers_folder(small_cache: Path, tmp_path: Path) -> None:
    folder = save_random_transformer(tmp_path / "pipeline/transformer")
    (tmp_path / "pipeline/vae").mkdir()
    (tmp_path / "pipeline/vae/config.json").write_text(json.dumps({"scaling_factor": 1.25}))
    settings = {"model__fit_to_cache": False, "run__max_train_steps": 1, "optimizer__learning_rate": 1e-12}
    train(tiny_config(small_cache, tmp_path / "run", model__init_from=str(tmp_path / "pipeline"), **settings))
    trained = tensors_of(tmp_path / "run/checkpoints/step-00000001", "model")
    initial = load_file(folder / "diffusion_pytorch_model.safetensors")
    for name, tensor in initial.items():
        assert torch.allclose(tensor, trained[f"model.dit.{name}"], atol=1e-9), name
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["model"]["latent_scaling_factor"] == 1.25  # of the VAE that lies beside it
    with pytest.raises(CacheError, match=r"scaled by 0.7, but the VAE beside .* has the scaling factor 1.25"):
        train(tiny_config(small_cache, tmp_path / "b", model__init_from=str(folder), model__latent_scaling_factor=0.7,
                          **settings))  # fmt: skip


def test_latents_of_a_known_vae_must_be_scaled_as_it_says(tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "c", vae_name="THUDM/CogVideoX-2b")
    with pytest.raises(CacheError, match=r"scaled by 0.7, but the VAE of THUDM/CogVideoX-2b.* factor 1.15258"):
        train(tiny_config(cache, tmp_path / "run", model__latent_scaling_factor=0.7))


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/at/all", "what is this"])
def test_an_initial_transformer_that_is_not_there_is_refused(small_cache: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"--init-from {name}: expected a diffusers folder, a hub id"):
        train(tiny_config(small_cache, tmp_path / "run", model__init_from=name, model__fit_to_cache=False))


def test_a_device_without_memory_ends_the_run_as_a_fault_of_the_machine(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("mimir_train.loop.clip_losses", fail)
    told = r"the device has not memory enough \(CUDA out of memory\..*\); give a smaller --micro-batch-size"
    with pytest.raises(MachineError, match=told):
        train(tiny_config(small_cache, tmp_path / "run"))
